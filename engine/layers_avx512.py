"""All layers of a step in one kernel, whose threads share out phase after phase.

The residual stream is float32 and stays in the caches from layer to layer; precisions differ in
the products' inputs and weights. A kernel a product would cost more than the smaller ones take.
"""

import functools
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor, nn

from engine.attention_cpu import (
    CPUPagedAttention,
    attend_task,
    expect_write,
    write_task,
)
from engine.cpu_math import KERNEL, Array, view
from engine.cpu_memory import Scratch, borrow
from engine.cpu_tasks import counters, finish, phase_ends, take, team, wait
from engine.linear_avx512 import (
    ACTIVATION_NUMBERS,
    ADDED,
    INPUTS,
    INT8,
    PHASES,
    STORED,
    FusedLinear,
    PackedWeights,
    borrow_inputs,
    borrow_weights,
    group_bytes,
    kind_of,
    layer_address,
)
from model.attention import Attend
from model.gpt import GPT, Block

PHASES_A_LAYER = (
    "LayerNorm", "c_attn", "keys and values", "attention", "quantisation", "c_proj", "LayerNorm",
    "c_fc", "quantisation", "MLP's c_proj",
)  # fmt: skip
_ROWS_A_TASK = 4  # of those whose keys and values are stored
_TAKES_A_THREAD = 16  # of attention's tasks: enough of them to share out evenly
_FEW_ROWS = 64  # whose places in the KV cache the caches hold beside the weights

_jitable = numba.extending.register_jitable


class Attention(NamedTuple):
    """What attention reads and writes beside queries, keys and values."""

    scales: Array  # (n_layer,) float32
    cache_k: Array
    cache_v: Array
    blocks: Array
    offsets: Array
    tables: Array
    tasks: Array
    room: Array


@_jitable
def _borrow_attention(attention: Any) -> Any:
    return Attention(
        borrow(attention.scales), borrow(attention.cache_k), borrow(attention.cache_v),
        borrow(attention.blocks), borrow(attention.offsets), borrow(attention.tables),
        borrow(attention.tasks), borrow(attention.room),
    )  # fmt: skip


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
                row, layer, qkv, attention.cache_k, attention.cache_v, attention.blocks,
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
    num_tasks = len(attention.tasks)
    # Several at a time: threads that count together wait for each other's counting.
    some = max(1, num_tasks // (_TAKES_A_THREAD * num_threads))
    num_takes = (num_tasks + some - 1) // some
    while True:
        taken = take(counts, phase)
        if taken >= num_takes:
            break
        for task in range(taken * some, min((taken + 1) * some, num_tasks)):
            attend_task(
                task, thread, layer, attention.scales[layer], qkv, attention.cache_k,
                attention.cache_v, attention.tables, attention.tasks, attention.room, out,
            )  # fmt: skip
        finish(counts, phase)
    wait(counts, phase, num_takes)


@functools.cache
def _compile(kind: int) -> Any:
    """Build the kernel for a kind of product."""
    prepare, multiply = PHASES[kind].prepare, PHASES[kind].multiply
    quantizes = kind == INT8

    @numba.njit(**KERNEL)
    def layers(
        thread: Any, num_threads: Any, counts: Any, x: Any, qkv: Any, mixed: Any, wide: Any,
        inputs: Any, wide_inputs: Any, attn: Any, attn_proj: Any, fc: Any, fc_proj: Any,
        activation: Any, epsilon: Any, attention: Any,
    ) -> None:  # fmt: skip
        # 8 bits want to know a row's range, so the whole of it: elsewhere what one product gives
        # is stored as what the next one takes.
        num_layers = len(attn.packed)
        counts, x, qkv = borrow(counts), borrow(x), borrow(qkv)
        mixed, wide = borrow(mixed), borrow(wide)
        inputs, wide_inputs = borrow_inputs(inputs), borrow_inputs(wide_inputs)
        attn, attn_proj = borrow_weights(attn), borrow_weights(attn_proj)
        fc, fc_proj = borrow_weights(fc), borrow_weights(fc_proj)
        attention = _borrow_attention(attention)
        for layer in range(num_layers):
            phase = layer * len(PHASES_A_LAYER)
            if len(x) <= _FEW_ROWS:
                for row in range(thread, len(x), num_threads):
                    expect_write(
                        row, layer, attention.cache_k, attention.cache_v, attention.blocks,
                        attention.offsets,
                    )  # fmt: skip
            prepare(counts, phase, x, attn.gain, attn.offset, layer, epsilon, inputs)
            multiply(
                counts, phase + 1, num_threads, inputs, attn, layer, 0, STORED, qkv, inputs.rows,
                layer_address(attn_proj, layer), group_bytes(attn_proj),
            )  # fmt: skip
            _write(counts, phase + 2, layer, qkv, attention)
            if quantizes:
                _attend(counts, phase + 3, thread, num_threads, layer, qkv, attention, mixed)
                prepare(
                    counts, phase + 4, mixed, attn_proj.gain, attn_proj.offset, 0, epsilon, inputs
                )
            else:
                _attend(counts, phase + 3, thread, num_threads, layer, qkv, attention, inputs.rows)
            multiply(
                counts, phase + 5, num_threads, inputs, attn_proj, layer, 0, ADDED, x, inputs.rows,
                layer_address(fc, layer), group_bytes(fc),
            )  # fmt: skip
            prepare(counts, phase + 6, x, fc.gain, fc.offset, layer, epsilon, inputs)
            if quantizes:
                multiply(
                    counts, phase + 7, num_threads, inputs, fc, layer, activation, STORED, wide,
                    wide_inputs.rows, layer_address(fc_proj, layer), group_bytes(fc_proj),
                )  # fmt: skip
                prepare(
                    counts, phase + 8, wide, fc_proj.gain, fc_proj.offset, 0, epsilon, wide_inputs
                )
            else:
                multiply(
                    counts, phase + 7, num_threads, inputs, fc, layer, activation, INPUTS, x,
                    wide_inputs.rows, layer_address(fc_proj, layer), group_bytes(fc_proj),
                )  # fmt: skip
            multiply(
                counts, phase + 9, num_threads, wide_inputs, fc_proj, layer, 0, ADDED, x,
                inputs.rows, layer_address(attn, (layer + 1) % num_layers), group_bytes(attn),
            )  # fmt: skip

    return layers


class FusedLayers(nn.Module):
    """All layers of a model, over the paged cache of a CPU."""

    def __init__(self, model: GPT, *, quantizes: bool) -> None:
        """Pack the weights of all layers, taking each block out of the model: memory is short."""
        super().__init__()
        config = model.config
        kind = self._kind = kind_of(model.wte.weight.dtype, quantizes=quantizes)
        num_layers, width, wide = config.n_layer, config.n_embd, config.mlp_width
        self._attn = PackedWeights(num_layers, 3 * width, width, kind)
        self._attn_proj = PackedWeights(num_layers, width, width, kind)
        self._fc = PackedWeights(num_layers, wide, width, kind)
        self._fc_proj = PackedWeights(num_layers, width, wide, kind)
        for layer, block in enumerate(model.h):
            assert isinstance(block, Block)
            attn, mlp = block.attn, block.mlp
            self._attn.take(layer, attn.c_attn.weight, attn.c_attn.bias, block.ln_1)
            self._attn_proj.take(layer, attn.c_proj.weight, attn.c_proj.bias)
            self._fc.take(layer, mlp.c_fc.weight, mlp.c_fc.bias, block.ln_2)
            self._fc_proj.take(layer, mlp.c_proj.weight, mlp.c_proj.bias)
            model.h[layer] = nn.Identity()
        self._activation = ACTIVATION_NUMBERS[config.activation]
        self._epsilon = np.float32(config.layer_norm_epsilon)
        scales = [config.attention_scale(layer) for layer in range(num_layers)]
        self._attention_scales = np.array(scales, np.float32)
        self._scratch = Scratch()
        self._counts = counters(0)

    @property
    def products(self) -> list[FusedLinear]:
        """Those of the first layer that take rows of the model's width, each by itself."""
        some = (self._attn, self._attn_proj, self._fc)
        return [FusedLinear.of(weights, layer=0) for weights in some]

    @property
    def phase_ends(self) -> Array:
        """When the phases of the last call ended, (n_layer, phases), in ticks of some clock.

        0 where there was none: see `PHASES_A_LAYER`.
        """
        return phase_ends(self._counts).reshape(-1, len(PHASES_A_LAYER))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Map x (N, C) to (N, C) float32."""
        assert isinstance(attend, CPUPagedAttention)
        out = x.to(torch.float32, copy=True)
        num_rows, width = x.shape
        array = self._scratch.array
        num_quantized = num_rows if self._kind == INT8 else 1
        cache = attend.cache
        attention = Attention(
            self._attention_scales, view(cache.k), view(cache.v), attend.blocks, attend.offsets,
            attend.tables, attend.tasks, attend.room,
        )  # fmt: skip
        self._counts = counters(len(self._attention_scales) * len(PHASES_A_LAYER))
        team(torch.get_num_threads()).run(
            _compile(self._kind),
            self._counts,
            out.numpy(),
            array("qkv", num_rows, 3 * width, np.float32),
            array("mixed", num_quantized, width, np.float32),
            array("wide", num_quantized, self._fc.num_outputs, np.float32),
            self._attn.inputs(num_rows, self._scratch, "inputs"),
            self._fc_proj.inputs(num_rows, self._scratch, "wide inputs"),
            self._attn.weights,
            self._attn_proj.weights,
            self._fc.weights,
            self._fc_proj.weights,
            self._activation,
            self._epsilon,
            attention,
        )
        return out
