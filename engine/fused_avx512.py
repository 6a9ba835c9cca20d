"""What surrounds a product, on vectors of 16: rounding of its inputs, and all that follows its sum.

In LLVM's own language, because a compiler that vectorises loops as it sees fit leaves such short
ones as they are. Addresses are integers; who calls sees that arrays live as long.
"""

from collections.abc import Sequence
from typing import Any

import numba
from llvmlite import ir
from numba.core import types

from engine.vectors import (
    _WHOLE,
    LANES,
    _byte,
    _call,
    _exp,
    _float,
    _floats,
    _floats_of,
    _fold,
    _larger,
    _load,
    _load_some,
    _multiply_add,
    _narrow,
    _number,
    _splat,
    _store_some,
    _vectors,
    _vectors_with,
    _word,
    _words,
    _words_of,
)
from model.config import Activation

BLOCKS = 3  # of 16 outputs, which a tile of a product has
FLOAT32, BFLOAT16, INT8 = 0, 1, 2  # kinds of products, by their inputs and weights
STORED, ADDED, INPUTS = 0, 1, 2  # what becomes of a product
ACTIVATION_NUMBERS: dict[Activation | None, int] = {None: 0, "gelu_new": 1, "gelu": 2, "relu": 3}
_INPUT_BYTES = {FLOAT32: 4, BFLOAT16: 2, INT8: 1}


@numba.extending.intrinsic(prefer_literal=True)
def bring(context: Any, kind: Any, row: Any, size: Any, inputs: Any, scale: Any, zero: Any) -> Any:
    """Bring a row of `size` float32 to a product's inputs; kind is a constant, the rest addresses.

    8 bits are by the row's own range, value = scale * (code - zero), and rounded to nearest; scale
    (float32) and zero (int32) are written for them alone. What is not finite makes the scale NaN.
    """
    which = kind.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, row, size, inputs, scale, zero = arguments

        def read(d: Any, mask: Any) -> Any:
            return _load_some(builder, builder.add(row, builder.mul(d, _number(4))), 4, mask)

        def write(d: Any, values: Any, mask: Any) -> None:
            place = builder.add(inputs, builder.mul(d, _number(_INPUT_BYTES[which])))
            _store_some(builder, values, place, mask)

        if which != INT8:
            bits = _INPUT_BYTES[which]
            _vectors(
                builder, size, lambda d, mask: write(d, _narrow(builder, read(d, mask), bits), mask)
            )
            return context.get_dummy_value()

        zeros = ir.Constant(_floats, None)

        def look(d: Any, carried: Sequence[Any], mask: Any) -> list[Any]:
            values = read(d, mask)
            return [
                _larger(builder, builder.fneg(values), carried[0]),
                _larger(builder, values, carried[1]),
                builder.fadd(carried[2], builder.fmul(values, zeros)),  # NaN where not finite
            ]

        below, above, broken = _vectors_with(builder, size, [zeros] * 3, look)
        below, above = _fold(builder, below, _larger), _fold(builder, above, _larger)
        broken = _fold(builder, broken, lambda builder, a, b: builder.fadd(a, b))
        nothing, one = ir.Constant(_float, 0.0), ir.Constant(_float, 1.0)
        step = builder.fdiv(builder.fadd(above, below), ir.Constant(_float, 255.0))
        has_range = builder.fcmp_ordered(">", step, nothing)
        factor = builder.select(has_range, builder.fdiv(one, step), nothing)
        step = builder.fadd(builder.select(has_range, step, nothing), broken)
        whole = _floats_of(_WHOLE)
        offset = _multiply_add(builder, _splat(builder, below), _splat(builder, factor), whole)
        offsets = builder.sub(builder.bitcast(offset, _words), builder.bitcast(whole, _words))
        builder.store(step, builder.inttoptr(scale, _float.as_pointer()), align=4)
        first = builder.extract_element(offsets, ir.Constant(_word, 0))
        builder.store(first, builder.inttoptr(zero, _word.as_pointer()), align=4)
        factors = _splat(builder, factor)
        codes_at = builder.sub(offsets, builder.bitcast(whole, _words))

        def code(d: Any, mask: Any) -> None:
            rounded = _multiply_add(builder, read(d, mask), factors, whole)
            codes = builder.add(builder.bitcast(rounded, _words), codes_at)
            codes = _call(builder, "llvm.smax.v16i32", _words, codes, ir.Constant(_words, None))
            codes = _call(builder, "llvm.smin.v16i32", _words, codes, _words_of(255))
            write(d, builder.trunc(codes, ir.VectorType(_byte, LANES)), mask)

        _vectors(builder, size, code)
        return context.get_dummy_value()

    place = types.uintp
    return types.void(kind, place, place, place, place, place), generate


@numba.extending.intrinsic(prefer_literal=True)
def deliver(
    context: Any, kind: Any, sums: Any, count: Any, scale: Any, zero: Any, column_scales: Any,
    column_sums: Any, bias: Any, activation: Any, becomes: Any, out: Any,
) -> Any:  # fmt: skip
    """Make the first `count` of a row's 48 sums results, and put them where they belong.

    kind is a constant, scale and zero are those of the row (for INT8), activation and becomes
    are of the numbers above, everything else addresses. out holds float32, or for INPUTS what the
    kind's inputs are.
    """
    which = kind.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (_, sums, count, scale, zero, column_scales, column_sums, bias, activation, becomes,
         out) = arguments  # fmt: skip

        def part(start: Any, block: int, kind: Any = _floats) -> Any:
            return _load(builder, builder.add(start, _number(4 * LANES * block)), kind, 4)

        results = []
        for block in range(BLOCKS):
            if which == INT8:
                # Exact up to the last two multiplications.
                shift = builder.mul(_splat(builder, zero), part(column_sums, block, _words))
                total = builder.sub(part(sums, block, _words), shift)
                factor = builder.fmul(_splat(builder, scale), part(column_scales, block))
                y = builder.fmul(builder.sitofp(total, _floats), factor)
            else:
                y = part(sums, block)
            results.append(builder.fadd(y, part(bias, block)))
        results = _activate(builder, results, activation)

        def put(number: int, masks: Sequence[Any]) -> None:
            item_bytes = _INPUT_BYTES[which] if number == INPUTS else 4
            for block, (y, mask) in enumerate(zip(results, masks, strict=True)):
                place = builder.add(out, _number(item_bytes * LANES * block))
                if number == ADDED:
                    y = builder.fadd(y, _load_some(builder, place, 4, mask))
                elif number == INPUTS:
                    y = _narrow(builder, y, item_bytes)
                _store_some(builder, y, place, mask)

        after = builder.append_basic_block()
        numbers = (STORED, ADDED) if which == INT8 else (STORED, ADDED, INPUTS)
        cases = {number: builder.append_basic_block() for number in numbers}
        switch = builder.switch(becomes, cases[STORED])
        for number in numbers[1:]:
            switch.add_case(ir.Constant(becomes.type, number), cases[number])
        lanes = ir.Constant(_words, list(range(LANES)))
        for number, case in cases.items():
            builder.position_at_end(case)
            is_whole = builder.icmp_unsigned(">=", count, _number(BLOCKS * LANES))
            with builder.if_else(is_whole) as (all_of_them, some):
                with all_of_them:
                    put(number, [None] * BLOCKS)
                with some:
                    left = builder.trunc(count, _word)
                    put(number, [
                        builder.icmp_signed(
                            "<", builder.add(lanes, _words_of(LANES * block)), _splat(builder, left)
                        )
                        for block in range(BLOCKS)
                    ])  # fmt: skip
            builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    place = types.uintp
    return types.void(
        kind, place, place, types.float32, types.int32, *[place] * 3, types.intp, types.intp, place
    ), generate


def _activate(builder: Any, values: Sequence[Any], activation: Any) -> list[Any]:
    """Apply the activation of a number, or none."""
    before = builder.block
    after = builder.append_basic_block()
    switch = builder.switch(activation, after)
    results = []
    functions: dict[Activation, Any] = {"gelu_new": _gelu_tanh, "gelu": _gelu_erf, "relu": _relu}
    for name, function in functions.items():
        case = builder.append_basic_block()
        switch.add_case(ir.Constant(activation.type, ACTIVATION_NUMBERS[name]), case)
        builder.position_at_end(case)
        results.append(([function(builder, x) for x in values], builder.block))
        builder.branch(after)
    builder.position_at_end(after)
    found = [builder.phi(_floats) for _ in values]
    for place, phi in enumerate(found):
        phi.add_incoming(values[place], before)
        for result, block in results:
            phi.add_incoming(result[place], block)
    return found


def _relu(builder: Any, x: Any) -> Any:
    zeros = ir.Constant(_floats, None)
    return builder.select(builder.fcmp_ordered("<", x, zeros), zeros, x)  # NaN stays


def _gelu_tanh(builder: Any, x: Any) -> Any:
    """GELU by its tanh form, x * sigmoid(2 u) with u = sqrt(2 / pi) * (x + 0.044715 x^3)."""
    one, zeros = _floats_of(1), ir.Constant(_floats, None)
    square = builder.fmul(x, x)
    slope = _multiply_add(
        builder, square, _floats_of(1.5957691216 * 0.044715), _floats_of(1.5957691216)
    )
    u = builder.fmul(x, slope)
    is_positive = builder.fcmp_ordered(">", u, zeros)
    e = _exp(builder, builder.select(is_positive, builder.fneg(u), u))  # at most 1, of either sign
    top = builder.select(is_positive, one, e)
    return builder.fmul(x, builder.fdiv(top, builder.fadd(one, e)))


def _gelu_erf(builder: Any, x: Any) -> Any:
    """GELU by its exact form, within 2e-7: x / 2 * erfc(-x / sqrt(2)).

    The complementary error function by Abramowitz and Stegun's formula 7.1.26.
    """
    one, half = _floats_of(1), _floats_of(0.5)
    z = builder.fmul(_call(builder, "llvm.fabs.v16f32", _floats, x), _floats_of(0.70710678))
    t = builder.fdiv(one, _multiply_add(builder, z, _floats_of(0.3275911), one))
    y = _floats_of(1.061405429)
    for term in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        y = _multiply_add(builder, y, t, _floats_of(term))
    y = builder.fmul(builder.fmul(y, t), _exp(builder, builder.fneg(builder.fmul(z, z))))  # erfc(z)
    y = builder.fmul(y, half)
    is_positive = builder.fcmp_ordered(">", x, ir.Constant(_floats, None))
    return builder.fmul(x, builder.select(is_positive, builder.fsub(one, y), y))
