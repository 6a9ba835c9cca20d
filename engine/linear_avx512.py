"""Linear layers on AVX-512: weights packed once, one pass over them a product, everything fused.

One kernel serves three precisions. A tile of 8 rows and 48 outputs stays in vector registers while
the kernel walks the inputs in steps of 4 bytes a row: one float32, two bfloat16 or four int8, which
one instruction multiplies and adds into 16 outputs. What surrounds a product in a transformer (the
LayerNorm before it; bias, activation and residual after it) happens on the way in and out.

An output is the sum over its row's inputs in their order, whatever rows come with it: a row has
the same bytes alone and in any batch. Compiled by numba on first use and cached on the disk.
"""

from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from torch import Tensor, nn

from engine.cpu_math import (
    FAST_MATH,
    Array,
    gelu_erf,
    gelu_tanh,
    narrow,
    same,
    view,
    widen,
)
from model.config import Activation

FLOAT32, BFLOAT16, INT8 = 0, 1, 2
_NEEDS = {FLOAT32: "avx512f", BFLOAT16: "avx512bf16", INT8: "avx512vnni"}
_VALUES = {FLOAT32: 1, BFLOAT16: 2, INT8: 4}  # inputs that one instruction takes of a row

_ROWS = 8  # of a tile: with 48 outputs it takes 24 of the 32 registers
_LANES = 16
_BLOCKS = 3
_WIDTH = _BLOCKS * _LANES
_FEW_ROWS = 64  # below, starting threads costs more than they save on the way in

_ACTIVATIONS: dict[Activation | None, int] = {None: 0, "gelu_new": 1, "gelu": 2, "relu": 3}


def has_avx512(kind: int) -> bool:
    """Whether this processor multiplies in the kind of precision."""
    try:
        features = llvmlite.binding.get_host_cpu_features()
    except RuntimeError:  # unknown to LLVM
        return False
    return bool(features.get("avx512f") and features.get(_NEEDS[kind]))


@numba.extending.intrinsic(prefer_literal=True)
def _tile(
    context: Any, kind: Any, rows: Any, inputs: Any, first_row: Any, packed: Any, group: Any,
    sums: Any,
) -> Any:  # fmt: skip
    """Multiply 1 to 8 rows of inputs, from `first_row` on, with the 48 outputs of a packed group.

    sums (8, 48) float32, or int32 for INT8, are overwritten as far as there are rows. The
    instructions: fused multiply-add, VDPBF16PS and VPDPBUSD.
    """
    which = kind.literal_value
    word = ir.IntType(32)
    words = ir.VectorType(word, _LANES)
    totals_type = words if which == INT8 else ir.VectorType(ir.FloatType(), _LANES)

    def multiply(builder: Any, total: Any, a: Any, b: Any) -> Any:
        def call(name: str, *arguments: Any) -> Any:
            signature = ir.FunctionType(totals_type, [argument.type for argument in arguments])
            function = cgutils.get_or_insert_function(builder.module, signature, name)
            return builder.call(function, arguments)

        if which == BFLOAT16:
            return call("llvm.x86.avx512bf16.dpbf16ps.512", total, a, b)
        if which == INT8:
            return call("llvm.x86.avx512.vpdpbusd.512", total, a, b)
        return call("llvm.fma.v16f32", *(builder.bitcast(x, totals_type) for x in (a, b)), total)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, rows, inputs, first_row, packed, group, sums = arguments
        size = rows.type

        def address(place: int, value: Any) -> Any:
            data = context.make_array(signature.args[place])(context, builder, value).data
            return builder.ptrtoint(data, size)

        shape = context.make_array(signature.args[4])(context, builder, packed).shape
        steps = builder.extract_value(shape, 1)
        x_stride = builder.mul(steps, ir.Constant(size, 4))
        w_stride = builder.mul(steps, ir.Constant(size, 4 * _LANES))
        x = builder.add(address(2, inputs), builder.mul(first_row, x_stride))
        blocks = builder.mul(group, ir.Constant(size, _BLOCKS))
        w = builder.add(address(4, packed), builder.mul(blocks, w_stride))
        out = address(6, sums)
        after = builder.append_basic_block()
        unreachable = builder.append_basic_block()
        switch = builder.switch(rows, unreachable)
        for num_rows in range(1, _ROWS + 1):
            case = builder.append_basic_block()
            switch.add_case(ir.Constant(rows.type, num_rows), case)
            builder.position_at_end(case)
            generate_case(builder, num_rows, x, x_stride, w, w_stride, steps, out)
            builder.branch(after)
        builder.position_at_end(unreachable)
        builder.unreachable()
        builder.position_at_end(after)
        return context.get_dummy_value()

    def generate_case(
        builder: Any, num_rows: int, x: Any, x_stride: Any, w: Any, w_stride: Any, steps: Any,
        out: Any,
    ) -> None:  # fmt: skip
        size = steps.type

        def at(address: Any, stride: Any, count: int, kind: Any) -> Any:
            offset = builder.mul(stride, ir.Constant(size, count))
            return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

        before = builder.block
        loop, done = builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(size)
        step.add_incoming(ir.Constant(size, 0), before)
        totals = [[builder.phi(totals_type) for _ in range(_BLOCKS)] for _ in range(num_rows)]
        weights_at = builder.add(w, builder.mul(step, ir.Constant(size, 4 * _LANES)))
        inputs_at = builder.add(x, builder.mul(step, ir.Constant(size, 4)))
        weights = [
            builder.load(at(weights_at, w_stride, block, words), align=4 * _LANES)
            for block in range(_BLOCKS)
        ]
        next_step = builder.add(step, ir.Constant(size, 1))
        step.add_incoming(next_step, loop)
        nothing = ir.Constant(words, ir.Undefined)
        results = []
        for row in range(num_rows):
            value = builder.load(at(inputs_at, x_stride, row, word), align=4)
            lane = builder.insert_element(nothing, value, ir.Constant(word, 0))
            lanes = builder.shuffle_vector(lane, nothing, ir.Constant(words, [0] * _LANES))
            for total, weight in zip(totals[row], weights, strict=True):
                result = multiply(builder, total, lanes, weight)
                total.add_incoming(ir.Constant(totals_type, None), before)
                total.add_incoming(result, loop)
                results.append(result)
        builder.cbranch(builder.icmp_signed("<", next_step, steps), loop, done)
        builder.position_at_end(done)
        for place, result in enumerate(results):
            builder.store(
                result, at(out, ir.Constant(size, 4 * _LANES), place, totals_type), align=4
            )

    place = types.intp
    return types.void(kind, place, inputs, place, packed, place, sums), generate


_jitable = numba.extending.register_jitable


@_jitable
def _normalize(x: Any, load: Any, gain: Any, offset: Any, epsilon: Any, row: Any) -> None:
    """LayerNorm of x (C,) into row (C,) float32; without a gain, x itself."""
    size = len(x)
    if len(gain) == 0:
        for c in range(size):
            row[c] = load(x[c])
        return
    total = np.float32(0)
    for c in range(size):
        row[c] = load(x[c])
        total += row[c]
    mean = total / np.float32(size)
    squares = np.float32(0)
    for c in range(size):
        row[c] -= mean
        squares += row[c] * row[c]
    factor = np.float32(1) / np.sqrt(squares / np.float32(size) + epsilon)
    for c in range(size):
        row[c] = row[c] * factor * gain[c] + offset[c]


@_jitable
def _round(row: Any, inputs: Any, store: Any) -> Any:
    """Bring a row (C,) to the inputs' precision; returns scale and zero, which mean nothing."""
    for c in range(len(row)):
        inputs[c] = store(row[c])
    return np.float32(1), np.int32(0)


@_jitable
def _quantize(row: Any, inputs: Any, store: Any) -> Any:
    """Bring a row (C,) to 8 bits by its own range: value = scale * (code - zero)."""
    lowest = highest = np.float32(0)
    for c in range(len(row)):
        lowest = row[c] if row[c] < lowest else lowest
        highest = row[c] if row[c] > highest else highest
    broken = np.float32(0)
    for c in range(len(row)):
        broken += row[c] * np.float32(0)  # NaN where any value is not finite
    scale = (highest - lowest) / np.float32(255)
    if not scale > np.float32(0):
        for c in range(len(row)):
            inputs[c] = np.uint8(0)
        return np.float32(0) + broken, np.int32(0)
    factor = np.float32(1) / scale
    zero = np.int32(np.floor(-lowest * factor + np.float32(0.5)))
    for c in range(len(row)):
        code = np.int32(np.floor(row[c] * factor + np.float32(0.5))) + zero
        inputs[c] = np.uint8(min(max(code, np.int32(0)), np.int32(255)))
    return scale + broken, zero


@_jitable
def _plain(total: Any, scale: Any, zero: Any, column_scale: Any, column_sum: Any) -> Any:
    return total


@_jitable
def _scaled(total: Any, scale: Any, zero: Any, column_scale: Any, column_sum: Any) -> Any:
    """The product of what the codes stand for; exact up to the last two multiplications."""
    return np.float32(total - zero * column_sum) * (scale * column_scale)


def _compile(
    kind: int, input_type: Any, sum_type: Any, bring: Any, finish: Any, load: Any, store: Any,
    keep: Any,
) -> Any:  # fmt: skip
    """Build the kernel of one kind of product with one type of numbers around it.

    `load` reads what comes in as float32, `bring` makes a row the product's inputs, `store` rounds
    them, `finish` makes float32 of the product's sums, `keep` rounds what goes out.
    """
    values = _VALUES[kind]

    @numba.njit(parallel=True, nogil=True, cache=True, boundscheck=False, fastmath=FAST_MATH)
    def linear(
        x: Array, gain: Array, offset: Array, epsilon: Any, packed: Array, column_scales: Array,
        column_sums: Array, bias: Array, activation: Any, residual: Array, adds_residual: Any,
        out: Array,
    ) -> None:  # fmt: skip
        num_rows, size = x.shape
        num_outputs = out.shape[1]
        num_blocks, steps, _ = packed.shape
        inputs = np.zeros((num_rows, steps * values), input_type)
        scales = np.empty(num_rows, np.float32)
        zeros = np.empty(num_rows, np.int32)
        if num_rows < _FEW_ROWS:
            for r in range(num_rows):
                normalized = np.empty(size, np.float32)
                _normalize(x[r], load, gain, offset, epsilon, normalized)
                scales[r], zeros[r] = bring(normalized, inputs[r], store)
        else:
            for r in numba.prange(num_rows):
                normalized = np.empty(size, np.float32)
                _normalize(x[r], load, gain, offset, epsilon, normalized)
                scales[r], zeros[r] = bring(normalized, inputs[r], store)
        for group in numba.prange(num_blocks // _BLOCKS):
            # Indices are unsigned: one that might be negative keeps a loop from being vectorised,
            # and a slice counts its references, which threads would wait for.
            first = np.uintp(group * _WIDTH)
            width = np.uintp(min(_WIDTH, num_outputs - group * _WIDTH))
            sums = np.empty((_ROWS, _WIDTH), sum_type)
            y = np.empty(_WIDTH, np.float32)
            for start in range(0, num_rows, _ROWS):
                rows = min(_ROWS, num_rows - start)
                _tile(kind, rows, inputs, start, packed, group, sums)
                for r in range(rows):
                    row = np.uintp(start + r)
                    scale, zero = scales[row], zeros[row]
                    for c in range(np.uintp(_WIDTH)):
                        at = first + c
                        y[c] = finish(sums[r, c], scale, zero, column_scales[at], column_sums[at])
                        y[c] += bias[at]
                    if activation == 1:
                        for c in range(_WIDTH):
                            y[c] = gelu_tanh(y[c])
                    elif activation == 2:
                        for c in range(_WIDTH):
                            y[c] = gelu_erf(y[c])
                    elif activation == 3:
                        for c in range(_WIDTH):  # NaN stays: comparing with it is false
                            y[c] = np.float32(0) if y[c] < np.float32(0) else y[c]
                    if adds_residual:
                        for c in range(width):
                            y[c] += load(residual[row, first + c])
                    for c in range(width):
                        out[row, first + c] = keep(y[c])

    return linear


_linear_float32 = _compile(FLOAT32, np.float32, np.float32, _round, _plain, same, same, same)
_linear_bfloat16 = _compile(BFLOAT16, np.uint16, np.float32, _round, _plain, widen, narrow, narrow)
_head_bfloat16 = _compile(BFLOAT16, np.uint16, np.float32, _round, _plain, widen, narrow, same)
_linear_int8 = _compile(INT8, np.uint8, np.int32, _quantize, _scaled, widen, narrow, narrow)
_head_int8 = _compile(INT8, np.uint8, np.int32, _quantize, _scaled, widen, narrow, same)


class FusedLinear(nn.Module):
    """y = activation(LayerNorm(x) W^T + b) + residual, with W packed; each part but W optional.

    x is (N, in) in float32 or bfloat16, y (N, out) in the same or, as an output head, in float32.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        norm: nn.LayerNorm | None = None,
        activation: Activation | None = None,
        quantizes: bool = False,
        is_head: bool = False,
    ) -> None:
        """Pack weight (out, in) float32 or bfloat16; the caller may drop its own copy.

        With `quantizes`, weights become 8 bits by the range of each output, and inputs 8 bits by
        the range of each row. `can_fuse` says whether this machine has the kernels.
        """
        super().__init__()
        weight = weight.detach()
        dtype = weight.dtype
        self._num_outputs = len(weight)
        self._out_dtype = torch.float32 if is_head else dtype
        padded = -(-len(weight) // _WIDTH) * _WIDTH
        column_scales = torch.ones(padded)
        column_sums = torch.zeros(padded, dtype=torch.int32)
        gain: Tensor | None = None if norm is None else norm.weight
        offset: Tensor | None = None if norm is None else norm.bias
        if quantizes:
            weight = weight.float()
            if norm is not None:
                # A norm's gains may make a few channels loud, and 8 bits would hold only those. So
                # weights and bias take gains and offsets over: what is quantised is even.
                if offset is not None:
                    added = weight @ offset.detach().float()
                    bias = added if bias is None else bias.detach().float() + added
                weight = weight * norm.weight.detach().float()
                gain, offset = torch.ones(weight.shape[1]), None
            scales = weight.abs().amax(1).clamp(min=1e-30) / 127
            weight = (weight / scales[:, None]).round().to(torch.int8)
            column_scales[: len(weight)] = scales
            column_sums[: len(weight)] = weight.sum(1, dtype=torch.int32)
        self._packed = _pack(weight)
        self._columns = (column_scales.numpy(), column_sums.numpy())
        self._bias = _float32(bias, padded)
        self._gain = _float32(gain, 0)
        self._offset = _float32(offset, len(self._gain))
        self._epsilon = np.float32(0 if norm is None else norm.eps)
        self._activation = _ACTIVATIONS[activation]
        if dtype == torch.float32 and not quantizes:
            self._kernel = _linear_float32
        elif quantizes:
            self._kernel = _head_int8 if is_head else _linear_int8
        else:
            self._kernel = _head_bfloat16 if is_head else _linear_bfloat16

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map x (N, in) to (N, out), plus a residual (N, out)."""
        out = torch.empty(len(x), self._num_outputs, dtype=self._out_dtype)
        y = view(out)
        self._kernel(
            view(x), self._gain, self._offset, self._epsilon, self._packed, *self._columns,
            self._bias, self._activation, view(x if residual is None else residual),
            residual is not None, y,
        )  # fmt: skip
        return out


def _pack(weight: Tensor) -> Array:
    """Order a weight (out, in) as tiles read it: (blocks of 16 outputs, steps, 64 bytes)."""
    values = 4 // weight.itemsize
    num_outputs, size = weight.shape
    steps = -(-size // values)
    padded = weight.new_zeros(-(-num_outputs // _WIDTH) * _WIDTH, steps * values)
    padded[:num_outputs, :size] = weight
    blocks = padded.view(-1, _LANES, steps, values).transpose(1, 2).contiguous()
    packed: Array = blocks.view(torch.uint8).view(len(blocks), steps, 4 * _LANES).numpy()
    return packed


def _float32(values: Tensor | None, size: int) -> Array:
    """Values as float32 for a kernel, padded with zeros to a size."""
    padded = np.zeros(max(size, 0 if values is None else len(values)), np.float32)
    if values is not None:
        padded[: len(values)] = values.detach().float().numpy()
    return padded
