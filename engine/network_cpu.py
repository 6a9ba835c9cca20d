"""The whole network of a step in one kernel, whose threads share out phase after phase.

From token ids to logits: a kernel a product would cost more to call than the smaller ones take.
The residual stream is float32 and stays in the caches from layer to layer; precisions differ in
the products' inputs and weights.
"""

import functools
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor, nn

from engine.attention_cpu import (
    attend_task,
    expect_write,
    list_tiles,
    share_out,
    thread_room,
    write_task,
)
from engine.batch import NetworkOutput, Rows
from engine.cpu_math import KERNEL, Array, same, view, widen
from engine.cpu_memory import Scratch, borrow, keep, restore
from engine.cpu_tasks import counters, finish, leave, phase_ends, take, team, wait
from engine.fused_cpu import ACTIVATION_NUMBERS, ADDED, INPUTS, STORED
from engine.kv_cache import KVCache
from engine.linear_cpu import (
    PHASES,
    Inputs,
    PackedWeights,
    Weights,
    group_bytes,
    kind_of,
    layer_address,
)
from engine.sampler_cpu import first_best
from engine.tile_cpu import FLOAT32, INT8
from engine.vectors import ROWS
from model.gpt import GPT, Block

_PHASES_A_LAYER = (
    "LayerNorm", "c_attn", "keys and values", "attention", "quantisation", "c_proj", "LayerNorm",
    "c_fc", "quantisation", "MLP's c_proj",
)  # fmt: skip
_PHASES_BEHIND = ("last rows", "last LayerNorm", "head", "best tokens")
_ROWS_A_TASK = 4  # of those that are embedded, or whose keys and values are stored
_TAKES_A_THREAD = 16  # of attention's tasks: enough of them to share out evenly
_FEW_ROWS = 64  # whose places in the KV cache the caches hold beside the weights

_jitable = numba.extending.register_jitable


class Attention(NamedTuple):
    """What attention reads and writes beside queries, keys and values."""

    scales: Array  # (n_layer,) float32
    cache: Array  # `KVCache.kv`
    blocks: Array
    offsets: Array
    tables: Array
    tiles: Array
    num_several: int  # of the tiles, those of more than one row
    room: Array


@_jitable
def _write(counts: Any, phase: Any, layer: Any, qkv: Any, attention: Any) -> None:
    """Store the keys and values of all rows."""
    num_rows = len(qkv)
    num_tasks = (num_rows + _ROWS_A_TASK - 1) // _ROWS_A_TASK
    while True:
        task = take(counts, phase)
        if task >= num_tasks:
            break
        for row in range(task * _ROWS_A_TASK, min((task + 1) * _ROWS_A_TASK, num_rows)):
            write_task(
                row, layer, qkv, attention.cache, attention.blocks,
                attention.offsets,
            )  # fmt: skip
        finish(counts, phase)
    wait(counts, phase, num_tasks)


@_jitable
def _attend(
    counts: Any, phase: Any, thread: Any, num_threads: Any, layer: Any, qkv: Any, attention: Any,
    out: Any,
) -> None:  # fmt: skip
    """Attend with all rows and heads."""
    # By numbers that belong to the call: a thread that comes late sees other tiles already.
    num_parts, num_tasks = share_out(
        attention.num_several, len(attention.tiles), attention.cache.shape[3], num_threads
    )
    # Several at a time: threads that count together wait for each other's counting.
    some = max(1, num_tasks // (_TAKES_A_THREAD * num_threads))
    num_takes = (num_tasks + some - 1) // some
    while True:
        taken = take(counts, phase)
        if taken >= num_takes:
            break
        for task in range(taken * some, min((taken + 1) * some, num_tasks)):
            attend_task(
                task, attention.num_several, num_parts, thread, layer, attention.scales[layer], qkv,
                attention.cache, attention.tables, attention.tiles,
                attention.room, out,
            )  # fmt: skip
        finish(counts, phase)
    wait(counts, phase, num_takes)


class Model(NamedTuple):
    """What of a model is the same in every step."""

    wte: Array  # (V, C), float32 or bfloat16's bits
    wpe: Array  # (n_ctx, C)
    attn: Weights
    attn_proj: Weights
    fc: Weights
    fc_proj: Weights
    head: Weights
    activation: int
    epsilon: np.float32


class Space(NamedTuple):
    """What a step of N rows writes beside the cache, R of them with logits."""

    x: Array  # (N, C) float32: the residual stream
    qkv: Array  # (N, 3 C) float32
    mixed: Array  # (N, C) float32, of INT8
    wide: Array  # (N, mlp_width) float32, of INT8
    inputs: Inputs  # (N, C)
    wide_inputs: Inputs  # (N, mlp_width)
    last: Array  # (R, C) float32
    logits: Array  # (R, vocab_size) float32
    flat: Array  # the same as one row
    best: Array  # (R,) int64: the first of each row's best tokens, of those that are asked for
    is_finite: Array  # (R,) bool: and whether their logits are finite


@_jitable
def _begin(
    counts: Any, phase: Any, tokens: Any, positions: Any, sequences: Any, wte: Any, wpe: Any,
    widen: Any, x: Any, block_size: Any, tables: Any, blocks: Any, offsets: Any, tiles: Any,
) -> None:  # fmt: skip
    """Embed tokens at their positions, say where their keys and values go, and list the tiles."""
    num_rows = len(tokens)
    num_tasks = 1 + (num_rows + _ROWS_A_TASK - 1) // _ROWS_A_TASK
    while True:
        task = take(counts, phase)
        if task >= num_tasks:
            break
        if task == 0:
            list_tiles(positions, sequences, tiles)
            finish(counts, phase)
            continue
        for r in range((task - 1) * _ROWS_A_TASK, min(task * _ROWS_A_TASK, num_rows)):
            row, token, position = np.uintp(r), np.uintp(tokens[r]), np.uintp(positions[r])
            for c in range(np.uintp(x.shape[1])):
                x[row, c] = widen(wte[token, c]) + widen(wpe[position, c])
            place = positions[r] // block_size
            blocks[row] = tables[sequences[r], place]
            offsets[row] = positions[r] - place * block_size
        finish(counts, phase)
    wait(counts, phase, num_tasks)


@_jitable
def _pick(counts: Any, phase: Any, x: Any, rows: Any, out: Any) -> None:
    """Copy some rows of x (N, C)."""
    num_tasks = (len(rows) + _ROWS_A_TASK - 1) // _ROWS_A_TASK
    while True:
        task = take(counts, phase)
        if task >= num_tasks:
            break
        for r in range(task * _ROWS_A_TASK, min((task + 1) * _ROWS_A_TASK, len(rows))):
            row, source = np.uintp(r), np.uintp(rows[r])
            for c in range(np.uintp(x.shape[1])):
                out[row, c] = x[source, c]
        finish(counts, phase)
    wait(counts, phase, num_tasks)


@_jitable
def _find_best(
    counts: Any, phase: Any, logits: Any, vocab_size: Any, best: Any, is_finite: Any
) -> None:
    """Find the first of the best tokens of each row of logits, which lie one behind the other."""
    num_rows, size = len(best), np.uintp(vocab_size)
    while True:
        row = take(counts, phase)
        if row >= num_rows:
            break
        best[row], is_finite[row] = first_best(logits, np.uintp(row) * size, size)
        finish(counts, phase)
    wait(counts, phase, num_rows)


@functools.cache
def _compile(kind: int, kept_name: str) -> Any:
    """Build the kernel for a kind of product; what it works on was kept by that name."""
    prepare, multiply = PHASES[kind].prepare, PHASES[kind].multiply
    widened = same if kind == FLOAT32 else widen
    quantizes = kind == INT8

    @numba.njit(**KERNEL)
    def network(
        thread: Any, num_threads: Any, counts: Any, tokens: Any, positions: Any, sequences: Any,
        chosen: Any, num_layers: Any, wants_best: Any, kept: Any, slots: Any,
    ) -> None:  # fmt: skip
        """Run some layers, after the embedding if there are tokens, and then the head.

        Logits are those of all rows, or of the `chosen` ones if there are any. `slots` are given
        to live as long as a thread that comes late, which looks at them.
        """
        counts, chosen = borrow(counts), borrow(chosen)
        tokens, positions, sequences = borrow(tokens), borrow(positions), borrow(sequences)
        model, attention, space = restore(kept_name, np.intp(kept.ctypes.data))
        attn, attn_proj, fc, fc_proj = model.attn, model.attn_proj, model.fc, model.fc_proj
        epsilon = model.epsilon
        x, inputs, wide_inputs = space.x, space.inputs, space.wide_inputs
        if len(tokens) > 0:
            _begin(
                counts, 0, tokens, positions, sequences, model.wte, model.wpe, widened, x,
                attention.cache.shape[4], attention.tables, attention.blocks, attention.offsets,
                attention.tiles,
            )  # fmt: skip
        for layer in range(num_layers):
            phase = 1 + layer * len(_PHASES_A_LAYER)
            if len(x) <= _FEW_ROWS:
                for row in range(thread, len(x), num_threads):
                    expect_write(
                        row, layer, attention.cache, attention.blocks,
                        attention.offsets,
                    )  # fmt: skip
            prepare(counts, phase, x, attn.gain, attn.offset, layer, epsilon, inputs)
            multiply(
                counts, phase + 1, num_threads, inputs, attn, layer, 0, STORED, space.qkv,
                inputs.rows, layer_address(attn_proj, layer), group_bytes(attn_proj),
            )  # fmt: skip
            _write(counts, phase + 2, layer, space.qkv, attention)
            # 8 bits want to know a row's range, so the whole of it: elsewhere what one product
            # gives is stored as what the next one takes.
            mixed = space.mixed if quantizes else inputs.rows
            _attend(counts, phase + 3, thread, num_threads, layer, space.qkv, attention, mixed)
            if quantizes:
                prepare(
                    counts, phase + 4, mixed, attn_proj.gain, attn_proj.offset, 0, epsilon, inputs
                )
            multiply(
                counts, phase + 5, num_threads, inputs, attn_proj, layer, 0, ADDED, x, inputs.rows,
                layer_address(fc, layer), group_bytes(fc),
            )  # fmt: skip
            prepare(counts, phase + 6, x, fc.gain, fc.offset, layer, epsilon, inputs)
            multiply(
                counts, phase + 7, num_threads, inputs, fc, layer, model.activation,
                STORED if quantizes else INPUTS, space.wide if quantizes else x, wide_inputs.rows,
                layer_address(fc_proj, layer), group_bytes(fc_proj),
            )  # fmt: skip
            if quantizes:
                prepare(
                    counts, phase + 8, space.wide, fc_proj.gain, fc_proj.offset, 0, epsilon,
                    wide_inputs,
                )  # fmt: skip
            following = layer_address(attn, layer + 1)
            following_bytes = group_bytes(attn)
            if layer + 1 == num_layers:
                following, following_bytes = layer_address(model.head, 0), group_bytes(model.head)
            multiply(
                counts, phase + 9, num_threads, wide_inputs, fc_proj, layer, 0, ADDED, x,
                inputs.rows, following, following_bytes,
            )  # fmt: skip
        if len(space.logits) > 0:
            phase = 1 + num_layers * len(_PHASES_A_LAYER)
            last = x
            if len(chosen) > 0:
                last = space.last
                _pick(counts, phase, x, chosen, last)
            head = model.head
            prepare(counts, phase + 1, last, head.gain, head.offset, 0, epsilon, inputs)
            multiply(
                counts, phase + 2, num_threads, inputs, head, 0, 0, STORED, space.logits,
                inputs.rows, layer_address(attn, 0), group_bytes(attn),
            )  # fmt: skip
            if wants_best:
                _find_best(
                    counts, phase + 3, space.flat, head.num_outputs, space.best, space.is_finite
                )
        leave(thread)

    return network


_NOTHING = np.empty(0, np.int64)


class FusedNetwork:
    """A model and its head over the paged cache of a CPU, in one kernel."""

    def __init__(self, model: GPT, cache: KVCache, vocab_size: int, *, quantizes: bool) -> None:
        """Pack all weights, taking each block out of the model: memory is short.

        Of the embedding, the head has the rows below `vocab_size`; those above are padding.
        """
        config = model.config
        kind = self._kind = kind_of(model.wte.weight.dtype, quantizes=quantizes)
        num_layers, width, wide = config.n_layer, config.n_embd, config.mlp_width
        self._attn = PackedWeights(num_layers, 3 * width, width, kind)
        attn_proj = PackedWeights(num_layers, width, width, kind)
        fc = PackedWeights(num_layers, wide, width, kind)
        self._fc_proj = PackedWeights(num_layers, width, wide, kind)
        self._head = PackedWeights(1, vocab_size, width, kind)
        for layer, block in enumerate(model.h):
            assert isinstance(block, Block)
            attn, mlp = block.attn, block.mlp
            self._attn.take(layer, attn.c_attn.weight, attn.c_attn.bias, block.ln_1)
            attn_proj.take(layer, attn.c_proj.weight, attn.c_proj.bias)
            fc.take(layer, mlp.c_fc.weight, mlp.c_fc.bias, block.ln_2)
            self._fc_proj.take(layer, mlp.c_proj.weight, mlp.c_proj.bias)
            model.h[layer] = nn.Identity()
        self._head.take(0, model.wte.weight[:vocab_size], None, model.ln_f)
        dtype = torch.float32 if kind == FLOAT32 else torch.bfloat16
        wte, wpe = (view(part.weight.detach().to(dtype)) for part in (model.wte, model.wpe))
        self._model = Model(
            wte, wpe, self._attn.weights, attn_proj.weights, fc.weights, self._fc_proj.weights,
            self._head.weights, ACTIVATION_NUMBERS[config.activation],
            np.float32(config.layer_norm_epsilon),
        )  # fmt: skip
        scales = [config.attention_scale(layer) for layer in range(num_layers)]
        self._attention_scales = np.array(scales, np.float32)
        self._config = config
        self._cache = view(cache.kv)
        self._name = f"network {kind} {self._cache.dtype}"
        self._scratch = Scratch()
        self._key: tuple[object, ...] = ()
        self._tables = np.empty((0, 0), np.int32)
        self._num_threads = 0
        self._counts = counters(0)
        self._num_phases = len(self.phases(num_layers))

    def run(
        self, rows: Rows, chosen: Array | None = None, *, wants_best: bool = False
    ) -> NetworkOutput:
        """See `Network`. What it returns is there until the next call."""
        num_rows = num_tiles = len(rows.tokens)
        num_several = 0
        if rows.spans:
            counts = [span.end - span.start for span in rows.spans]
            num_tiles = sum(-(-count // ROWS) for count in counts)
            num_several = num_tiles - sum(count % ROWS == 1 for count in counts)
        num_chosen = num_rows if chosen is None else len(chosen)
        self._reserve(rows.block_tables, num_rows, num_chosen, (num_tiles, num_several), wants_best)
        # New ones each time: a thread that comes late may still look at the last call's.
        self._counts = counters(self._num_phases)
        team(self._num_threads).run(
            _compile(self._kind, self._name), self._counts, rows.tokens, rows.positions,
            rows.row_sequences, _NOTHING if chosen is None else chosen,
            len(self._attention_scales), wants_best, self._kept, self._slots,
        )  # fmt: skip
        return self._output

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Network`."""
        num_rows = len(hidden)
        self._reserve(self._tables, num_rows, num_rows, (0, 0), wants_best=False)
        space = self._space._replace(x=hidden.numpy())
        kept = keep(self._name, (self._model, self._attention, space))
        team(self._num_threads).run(
            _compile(self._kind, self._name), counters(len(self.phases(0))), *[_NOTHING] * 4, 0,
            False, kept, self._slots,
        )  # fmt: skip
        return self._output.logits

    @property
    def weights_bytes(self) -> int:
        """What the weights take as they are held."""
        model = self._model
        arrays = [model.wte, model.wpe]
        for weights in (model.attn, model.attn_proj, model.fc, model.fc_proj, model.head):
            arrays += weights[:-1]
        return sum(array.nbytes for array in arrays)

    @staticmethod
    def phases(num_layers: int) -> list[str]:
        """The phases of `run`, in order."""
        return ["embedding", *_PHASES_A_LAYER * num_layers, *_PHASES_BEHIND]

    @property
    def phase_ends(self) -> Array:
        """When the phases of the last `run` ended, in ticks of a clock; 0 where there was none."""
        return phase_ends(self._counts)

    def _reserve(
        self,
        tables: Array,
        num_rows: int,
        num_chosen: int,
        num_tiles: tuple[int, int],
        wants_best: bool,
    ) -> None:
        """Make room for a step: one step of decoding is like the other, and finds it made.

        num_tiles is of tiles in all, and of those with several rows.
        """
        num_threads = torch.get_num_threads()
        key = (num_rows, num_chosen, num_tiles, wants_best, num_threads)
        if key == self._key and tables is self._tables:
            return
        config, array = self._config, self._scratch.array
        width = config.n_embd
        num_quantized = num_rows if self._kind == INT8 else 1
        logits = array("logits", num_chosen, self._head.num_outputs, np.float32)
        self._space = Space(
            array("x", num_rows, width, np.float32),
            array("qkv", num_rows, 3 * width, np.float32),
            array("mixed", num_quantized, width, np.float32),
            array("wide", num_quantized, config.mlp_width, np.float32),
            self._attn.inputs(num_rows, self._scratch, "inputs"),
            self._fc_proj.inputs(num_rows, self._scratch, "wide inputs"),
            array("last", num_chosen, width, np.float32),
            logits,
            logits.reshape(-1),
            np.empty(num_chosen, np.int64),
            np.empty(num_chosen, np.bool_),
        )
        self._output = NetworkOutput(
            torch.from_numpy(self._space.x), torch.from_numpy(logits),
            self._space.best if wants_best else None,
            self._space.is_finite if wants_best else None,
        )  # fmt: skip
        if num_threads != self._num_threads:
            self._num_threads = num_threads
            self._room = thread_room(config, num_threads=num_threads, length=config.n_ctx)
        self._slots = np.empty((2, num_rows), np.int64)
        self._attention = Attention(
            self._attention_scales, self._cache, self._slots[0], self._slots[1], tables,
            np.empty((num_tiles[0], 4), np.int64), num_tiles[1], self._room,
        )  # fmt: skip
        self._kept = keep(self._name, (self._model, self._attention, self._space))
        self._key, self._tables = key, tables
