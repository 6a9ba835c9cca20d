"""Linear layers on a CPU: weights packed once, one pass over them a product, everything fused.

One kernel serves three precisions. A tile of some rows and 48 outputs (`engine.tile_cpu`) stays in
vector registers while the kernel walks the inputs in steps of 4 bytes of weights: one float32, two
bfloat16 or four int8, for each of 16 outputs. What surrounds a product in a transformer (the
LayerNorm before it; bias, activation and residual after it) happens on the way in and out.

An output is the sum over its row's inputs in their order, whatever rows come with it: a row has
the same bytes alone and in any batch. Compiled by numba on first use and cached on the disk.
"""

import functools
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor, nn

from engine.cpu_ir import LANES
from engine.cpu_math import KERNEL, Array
from engine.cpu_memory import Scratch, borrow, huge_pages
from engine.cpu_tasks import counters, finish, take, team, wait
from engine.fused_cpu import (
    ACTIVATION_NUMBERS,
    ADDED,
    INPUTS,
    STORED,
    bring,
    deliver,
)
from engine.tile_cpu import (
    BFLOAT16,
    BLOCKS,
    FLOAT32,
    INT8,
    ROWS,
    VALUES,
    arithmetic,
    multiply_tile,
)
from model.config import Activation

_WIDTH = BLOCKS * LANES  # outputs of a tile
_VALUES_AT_ONCE = 2**19  # of weights that are packed
_ROWS_A_TASK = 4  # of those that are made a product's inputs
_FEW_ROWS = 4  # so few wait for memory alone, and the processor's own looking ahead serves best


_jitable = numba.extending.register_jitable


@_jitable
def _normalize(x: Any, at: Any, gain: Any, offset: Any, layer: Any, epsilon: Any, row: Any) -> None:
    """LayerNorm of row `at` of x (N, C) into row (C,) float32."""
    size = np.uintp(len(row))
    total = np.float32(0)
    for c in range(size):
        row[c] = x[at, c]
        total += row[c]
    mean = total / np.float32(size)
    squares = np.float32(0)
    for c in range(size):
        row[c] -= mean
        squares += row[c] * row[c]
    factor = np.float32(1) / np.sqrt(squares / np.float32(size) + epsilon)
    for c in range(size):
        row[c] = row[c] * factor * gain[layer, c] + offset[layer, c]


class Weights(NamedTuple):
    """The weights of one product in L layers, and what surrounds them, for a kernel."""

    packed: Array  # (L, blocks of 16 outputs, steps, 64 bytes)
    column_scales: Array  # (L, outputs) float32, of INT8
    column_sums: Array  # (L, outputs) int32, of INT8
    bias: Array  # (L, outputs) float32
    gain: Array  # (L, C) float32, or (L, 0) where no LayerNorm comes before
    offset: Array
    num_outputs: int


class Inputs(NamedTuple):
    """Rows as a product takes them, for a kernel."""

    rows: Array  # (N, steps * values), padded with zeros
    scales: Array  # (N,) float32, of INT8
    zeros: Array  # (N,) int32, of INT8


@_jitable
def group_bytes(weights: Any) -> Any:
    """What the weights of 48 outputs take."""
    return np.uintp(BLOCKS * 4 * LANES) * np.uintp(weights.packed.shape[2])


@_jitable
def layer_address(weights: Any, layer: Any) -> Any:
    """Where the weights of a layer begin."""
    groups = np.uintp(weights.packed.shape[1] // BLOCKS)
    return np.uintp(weights.packed.ctypes.data) + np.uintp(layer) * groups * group_bytes(weights)


class Phases(NamedTuple):
    """The phases of one kind of product, plain functions for kernels (see `engine.cpu_tasks`)."""

    prepare: Any
    multiply: Any


def _phases(kind: int) -> Phases:
    """Build the phases of one kind."""
    sum_type = np.int32 if kind == INT8 else np.float32
    input_bytes = np.uintp(np.dtype(arithmetic(kind).input_type).itemsize)
    step_bytes = np.uintp(4 * arithmetic(kind).words)  # of a row's inputs

    @_jitable
    def prepare(
        counts: Any, phase: Any, x: Any, gain: Any, offset: Any, layer: Any, epsilon: Any,
        inputs: Any,
    ) -> None:  # fmt: skip
        """Make rows x (N, C) float32 the inputs of a product, after a LayerNorm if it has gains."""
        num_rows, size = x.shape
        num_tasks = (num_rows + _ROWS_A_TASK - 1) // _ROWS_A_TASK
        normalized = np.empty(size, np.float32)
        has_norm = gain.shape[1] > 0
        row_bytes = np.uintp(inputs.rows.shape[1]) * input_bytes
        while True:
            task = take(counts, phase)
            if task >= num_tasks:
                break
            for r in range(task * _ROWS_A_TASK, min((task + 1) * _ROWS_A_TASK, num_rows)):
                row = np.uintp(r)
                if has_norm:
                    _normalize(x, row, gain, offset, np.uintp(layer), epsilon, normalized)
                    at = np.uintp(normalized.ctypes.data)
                else:
                    at = np.uintp(x.ctypes.data) + row * np.uintp(4 * size)
                bring(
                    kind, at, np.uintp(size), np.uintp(inputs.rows.ctypes.data) + row * row_bytes,
                    np.uintp(inputs.scales.ctypes.data) + np.uintp(4) * row,
                    np.uintp(inputs.zeros.ctypes.data) + np.uintp(4) * row,
                )  # fmt: skip
            finish(counts, phase)
        wait(counts, phase, num_tasks)

    @_jitable
    def multiply(
        counts: Any, phase: Any, num_threads: Any, inputs: Any, weights: Any, layer: Any,
        activation: Any, becomes: Any, out: Any, out_inputs: Any, following: Any,
        following_bytes: Any,
    ) -> None:  # fmt: skip
        """Multiply inputs with the weights of a layer.

        What comes of it is stored in out (N, C) float32, added to it, or stored in out_inputs, the
        next product's. `following` is the address of the weights that will be wanted next,
        `following_bytes` what lies between groups of theirs.
        """
        num_rows, num_outputs = len(out), weights.num_outputs
        num_groups = weights.packed.shape[1] // BLOCKS
        steps = np.uintp(weights.packed.shape[2])
        x_bytes, block_bytes = steps * step_bytes, steps * np.uintp(4 * LANES)
        own_bytes = group_bytes(weights)
        own = layer_address(weights, layer)
        x = np.uintp(inputs.rows.ctypes.data)
        at_layer = np.uintp(layer)
        sums = np.empty((ROWS * _WIDTH + LANES,), sum_type)
        padded = np.uintp(weights.bias.shape[1])
        bias = np.uintp(weights.bias.ctypes.data)
        column_scales = np.uintp(weights.column_scales.ctypes.data)
        column_sums = np.uintp(weights.column_sums.ctypes.data)
        if becomes == INPUTS:
            out_at, out_bytes = np.uintp(out_inputs.ctypes.data), input_bytes
            out_width = np.uintp(out_inputs.shape[1])
        else:
            out_at, out_bytes = np.uintp(out.ctypes.data), np.uintp(4)
            out_width = np.uintp(out.shape[1])
        while True:
            group = take(counts, phase)
            if group >= num_groups:
                break
            group_at = own + np.uintp(group) * own_bytes
            # What this thread will most likely take next.
            if group + num_threads < num_groups:
                ahead = group_at + np.uintp(num_threads) * own_bytes
            else:
                ahead = following + np.uintp(group + num_threads - num_groups) * following_bytes
            # Indices are unsigned: one that might be negative keeps a loop from being vectorised,
            # and a slice counts its references, which threads would wait for.
            first = np.uintp(group * _WIDTH)
            # Here, or the array would not outlive it; on a line's beginning.
            sums_at = (np.uintp(sums.ctypes.data) + np.uintp(63)) & ~np.uintp(63)
            width = np.uintp(min(_WIDTH, num_outputs - group * _WIDTH))
            at = np.uintp(4) * (at_layer * padded + first)
            for start in range(0, num_rows, ROWS):
                rows = np.uintp(min(ROWS, num_rows - start))
                turn = np.uintp(start // ROWS)
                # All of the next weights in the first of two tiles, or a third in each of three.
                asked, asked_a_step = group_at, np.uintp(0)
                if _FEW_ROWS < num_rows <= 2 * ROWS:
                    if start == 0:
                        asked, asked_a_step = ahead, np.uintp(4 * _WIDTH)
                elif num_rows > 2 * ROWS and turn < np.uintp(BLOCKS):
                    asked, asked_a_step = ahead + turn * block_bytes, np.uintp(4 * LANES)
                multiply_tile(
                    kind, rows, x + np.uintp(start) * x_bytes, group_at, steps, asked,
                    asked_a_step, sums_at,
                )  # fmt: skip
                for r in range(rows):
                    row = np.uintp(start) + r
                    deliver(
                        kind, sums_at + r * np.uintp(4 * _WIDTH), width, inputs.scales[row],
                        inputs.zeros[row], column_scales + at, column_sums + at, bias + at,
                        activation, becomes, out_at + out_bytes * (row * out_width + first),
                    )  # fmt: skip
            finish(counts, phase)
        wait(counts, phase, num_groups)

    return Phases(_importable(prepare, kind), _importable(multiply, kind))


def _importable(function: Any, kind: int) -> Any:
    """Give a function a name of its own in this module.

    Kernels close over it. numba finds a kernel on the disk by a hash of what it closes over, and a
    function that cannot be imported by its name has another hash in every process.
    """
    name = f"_{function.__name__}_{kind}"
    function.__name__ = function.__qualname__ = name
    globals()[name] = function
    return function


PHASES = {kind: _phases(kind) for kind in (FLOAT32, BFLOAT16, INT8)}


@functools.cache
def _compile(kind: int) -> Any:
    """Build the kernel of one product by itself."""
    prepare, multiply = PHASES[kind]

    @numba.njit(**KERNEL)
    def linear(
        thread: Any, num_threads: Any, counts: Any, x: Any, epsilon: Any, inputs: Any,
        weights: Any, layer: Any, activation: Any, becomes: Any, out: Any,
    ) -> None:  # fmt: skip
        counts, x, out = borrow(counts), borrow(x), borrow(out)
        inputs, weights = borrow(inputs), borrow(weights)
        prepare(counts, 0, x, weights.gain, weights.offset, layer, epsilon, inputs)
        multiply(
            counts, 1, num_threads, inputs, weights, layer, activation, becomes, out, inputs.rows,
            layer_address(weights, 0), group_bytes(weights),
        )  # fmt: skip

    return linear


class PackedWeights:
    """Where the weights of one product in all layers are packed."""

    def __init__(self, num_layers: int, num_outputs: int, size: int, kind: int) -> None:
        """Make room for weights (num_outputs, size) of each layer; `take` fills it."""
        self.kind = kind
        self.num_outputs = num_outputs
        self._size = size
        padded = -(-num_outputs // _WIDTH) * _WIDTH
        self._steps = -(-size // VALUES[kind])
        self._packed = huge_pages((num_layers, padded // LANES, self._steps, 4 * LANES), np.uint8)
        self._column_scales = np.ones((num_layers, padded), np.float32)
        self._column_sums = np.zeros((num_layers, padded), np.int32)
        self._bias = np.zeros((num_layers, padded), np.float32)
        self._gain = np.zeros((num_layers, 0), np.float32)
        self._offset = np.zeros((num_layers, 0), np.float32)
        self.epsilon = np.float32(0)

    def take(
        self, layer: int, weight: Tensor, bias: Tensor | None, norm: nn.LayerNorm | None = None
    ) -> None:
        """Pack weight (out, in), float32 or bfloat16; the caller may drop its own copy.

        Weights of kind INT8 become 8 bits by the range of each output, and their inputs will by
        the range of each row.
        """
        weight = weight.detach()
        gain = offset = None
        if norm is not None:
            self.epsilon = np.float32(norm.eps)
            if not self._gain.size:
                shape = (len(self._gain), self._size)
                self._gain, self._offset = np.ones(shape, np.float32), np.zeros(shape, np.float32)
            gain = norm.weight.detach().float()
            offset = None if norm.bias is None else norm.bias.detach().float()
        if bias is not None:
            self._bias[layer, : len(weight)] = bias.detach().float().numpy()
        if self.kind != INT8 and gain is not None:
            self._gain[layer] = gain.numpy()
            if offset is not None:
                self._offset[layer] = offset.numpy()
        # Some outputs at a time: as much memory as the head would take at once is slow to come.
        count = max(1, _VALUES_AT_ONCE // (_WIDTH * self._size)) * _WIDTH
        for first in range(0, len(weight), count):
            some = weight[first : first + count]
            outputs = slice(first, first + len(some))
            if self.kind == INT8:
                some = self._quantize(layer, outputs, some.float(), gain, offset)
            blocks = slice(first // LANES, -(-(first + len(some)) // _WIDTH) * BLOCKS)
            _pack(some, self._packed[layer, blocks], swaps=arithmetic(self.kind).swaps)

    def _quantize(
        self, layer: int, outputs: slice, weight: Tensor, gain: Tensor | None, offset: Tensor | None
    ) -> Tensor:
        """Bring weights (out, in) of some outputs to 8 bits.

        A norm's gains may make a few channels loud, and 8 bits would hold only those. So weights
        and bias take gains and offsets over: what is quantised is even.
        """
        if offset is not None:
            self._bias[layer, outputs] += (weight @ offset).numpy()
        if gain is not None:
            weight = weight * gain
        scales = weight.abs().amax(1).clamp(min=1e-30) / 127
        codes = (weight / scales[:, None]).round_().to(torch.int8)
        self._column_scales[layer, outputs] = scales.numpy()
        self._column_sums[layer, outputs] = codes.sum(1, dtype=torch.int32).numpy()
        return codes

    @property
    def weights(self) -> Weights:
        """What kernels read."""
        return Weights(
            self._packed, self._column_scales, self._column_sums, self._bias, self._gain,
            self._offset, self.num_outputs,
        )  # fmt: skip

    def inputs(self, num_rows: int, scratch: Scratch, name: str) -> Inputs:
        """Make room for rows of its inputs."""
        width = self._steps * VALUES[self.kind]
        return Inputs(
            scratch.array(name, num_rows, width, arithmetic(self.kind).input_type),
            np.empty(num_rows, np.float32),
            np.empty(num_rows, np.int32),
        )


class FusedLinear(nn.Module):
    """y = activation(LayerNorm(x) W^T + b) + residual, with W packed; each part but W optional.

    x is (N, in) and y (N, out), both float32.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        norm: nn.LayerNorm | None = None,
        activation: Activation | None = None,
        quantizes: bool = False,
    ) -> None:
        """Pack weight (out, in) float32 or bfloat16; the caller may drop its own copy.

        With `quantizes`, the product has weights of 8 bits.
        """
        super().__init__()
        kind = kind_of(weight.dtype, quantizes=quantizes)
        self._weights = PackedWeights(1, weight.shape[0], weight.shape[1], kind)
        self._weights.take(0, weight, bias, norm)
        self._activation = ACTIVATION_NUMBERS[activation]
        self._scratch = Scratch()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map x (N, in) to (N, out), plus a residual (N, out)."""
        packed = self._weights
        if residual is None:
            out, becomes = torch.empty(len(x), packed.num_outputs), STORED
        else:
            out, becomes = residual.to(torch.float32, copy=True), ADDED
        team(torch.get_num_threads()).run(
            _compile(packed.kind), counters(2), x.float().contiguous().numpy(), packed.epsilon,
            packed.inputs(len(x), self._scratch, "inputs"), packed.weights, 0,
            self._activation, becomes, out.numpy(),
        )  # fmt: skip
        return out


def kind_of(dtype: torch.dtype, *, quantizes: bool) -> int:
    """The kind of product for weights of a type."""
    if quantizes:
        return INT8
    return BFLOAT16 if dtype == torch.bfloat16 else FLOAT32


def _pack(weight: Tensor, packed: Array, *, swaps: bool) -> None:
    """Order a weight (out, in) as tiles read it: (blocks of 16 outputs, steps, 64 bytes).

    With `swaps`, the second and third of four bytes change places.
    """
    values = 4 // weight.itemsize
    num_outputs, size = weight.shape
    num_blocks, steps, _ = packed.shape
    if (num_outputs, size) != (num_blocks * LANES, steps * values):
        padded = weight.new_zeros(num_blocks * LANES, steps * values)
        padded[:num_outputs, :size] = weight
        weight = padded
    # By words of 4 bytes: numbers moved one by one take torch ten times as long.
    words = weight.contiguous().view(torch.int32)
    if swaps:
        words = (words & ~0xFFFF00) | ((words >> 8) & 0xFF00) | ((words << 8) & 0xFF0000)
    words = words.view(num_blocks, LANES, steps)
    torch.from_numpy(packed).view(torch.int32).copy_(words.transpose(1, 2))
