"""What surrounds a product, on vectors of 16: rounding of its inputs, and all that follows its sum.

In LLVM's own language, because a compiler that vectorises loops as it sees fit leaves such short
ones as they are. Addresses are integers; who calls sees that arrays live as long.
"""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types

from engine.cpu_ir import (
    FLOAT,
    FLOATS,
    LANES,
    WHOLE,
    WORD,
    WORDS,
    ZEROS,
    call,
    exp,
    first,
    floats_of,
    fold,
    larger,
    load,
    load_some,
    minus,
    multiply_add,
    narrow,
    number,
    over,
    plus,
    splat,
    store_some,
    times,
    vectors,
    vectors_with,
    words_of,
)
from engine.tile_cpu import BLOCKS, INT8, arithmetic
from model.config import Activation

STORED, ADDED, INPUTS = 0, 1, 2  # what becomes of a product
ACTIVATION_NUMBERS: dict[Activation | None, int] = {None: 0, "gelu_new": 1, "gelu": 2, "relu": 3}


@numba.extending.intrinsic(prefer_literal=True)
def bring(context: Any, kind: Any, row: Any, size: Any, inputs: Any, scale: Any, zero: Any) -> Any:
    """Bring a row of `size` float32 to a product's inputs; kind is a constant, the rest addresses.

    8 bits are by the row's own range, value = scale * (code - zero), and rounded to nearest; scale
    (float32) and zero (int32) are written for them alone. What is not finite makes the scale NaN.
    Codes are 0 to 255, or 128 less where the processor multiplies signed bytes: the sums that
    `deliver` makes of them are the same.
    """
    which = kind.literal_value
    input_type = np.dtype(arithmetic(which).input_type)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, row, size, inputs, scale, zero = arguments

        def read(d: Any, mask: Any) -> Any:
            return load_some(builder, builder.add(row, builder.mul(d, number(4))), 4, mask)

        def write(d: Any, values: Any, mask: Any) -> None:
            place = builder.add(inputs, builder.mul(d, number(input_type.itemsize)))
            store_some(builder, values, place, mask)

        if which != INT8:
            item_bytes = input_type.itemsize
            vectors(
                builder, size,
                lambda d, mask: write(d, narrow(builder, read(d, mask), item_bytes), mask),
            )  # fmt: skip
            return context.get_dummy_value()

        def look(d: Any, carried: Sequence[Any], mask: Any) -> list[Any]:
            values = read(d, mask)
            return [
                larger(builder, builder.fneg(values), carried[0]),
                larger(builder, values, carried[1]),
                plus(builder, carried[2], times(builder, values, ZEROS)),  # NaN where not finite
            ]

        below, above, broken = vectors_with(builder, size, [ZEROS] * 3, look)
        below, above, broken = (
            first(builder, fold(builder, values, combine))
            for values, combine in ((below, larger), (above, larger), (broken, plus))
        )
        nothing, one = ir.Constant(FLOAT, 0.0), ir.Constant(FLOAT, 1.0)
        step = over(builder, plus(builder, above, below), ir.Constant(FLOAT, 255.0))
        has_range = builder.fcmp_ordered(">", step, nothing)
        factor = builder.select(has_range, over(builder, one, step), nothing)
        step = plus(builder, builder.select(has_range, step, nothing), broken)
        whole = floats_of(WHOLE)
        offset = multiply_add(builder, splat(builder, below), splat(builder, factor), whole)
        offsets = builder.sub(builder.bitcast(offset, WORDS), builder.bitcast(whole, WORDS))
        builder.store(step, builder.inttoptr(scale, FLOAT.as_pointer()), align=4)
        least = words_of(-128 if input_type == np.int8 else 0)
        zeros = builder.add(offsets, least)
        builder.store(first(builder, zeros), builder.inttoptr(zero, WORD.as_pointer()), align=4)
        factors = splat(builder, factor)
        codes_at = builder.sub(offsets, builder.bitcast(whole, WORDS))

        def code(d: Any, mask: Any) -> None:
            rounded = multiply_add(builder, read(d, mask), factors, whole)
            codes = builder.add(builder.bitcast(rounded, WORDS), codes_at)
            codes = call(builder, "llvm.smax.v16i32", WORDS, codes, ir.Constant(WORDS, None))
            codes = call(builder, "llvm.smin.v16i32", WORDS, codes, words_of(255))
            codes = builder.add(codes, least)
            bits = ir.IntType(8 * input_type.itemsize)
            write(d, builder.trunc(codes, ir.VectorType(bits, LANES)), mask)

        vectors(builder, size, code)
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
    input_bytes = np.dtype(arithmetic(which).input_type).itemsize

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (_, sums, count, scale, zero, column_scales, column_sums, bias, activation, becomes,
         out) = arguments  # fmt: skip

        def part(start: Any, block: int, kind: Any = FLOATS) -> Any:
            return load(builder, builder.add(start, number(4 * LANES * block)), kind, 4)

        results = []
        for block in range(BLOCKS):
            if which == INT8:
                # Exact up to the last two multiplications.
                shift = builder.mul(splat(builder, zero), part(column_sums, block, WORDS))
                total = builder.sub(part(sums, block, WORDS), shift)
                factor = times(builder, splat(builder, scale), part(column_scales, block))
                y = times(builder, builder.sitofp(total, FLOATS), factor)
            else:
                y = part(sums, block)
            results.append(plus(builder, y, part(bias, block)))
        results = _activate(builder, results, activation)

        def put(purpose: int, masks: Sequence[Any]) -> None:
            item_bytes = input_bytes if purpose == INPUTS else 4
            for block, (y, mask) in enumerate(zip(results, masks, strict=True)):
                place = builder.add(out, number(item_bytes * LANES * block))
                if purpose == ADDED:
                    y = plus(builder, y, load_some(builder, place, 4, mask))
                elif purpose == INPUTS:
                    y = narrow(builder, y, item_bytes)
                store_some(builder, y, place, mask)

        after = builder.append_basic_block()
        purposes = (STORED, ADDED) if which == INT8 else (STORED, ADDED, INPUTS)
        cases = {purpose: builder.append_basic_block() for purpose in purposes}
        switch = builder.switch(becomes, cases[STORED])
        for purpose in purposes[1:]:
            switch.add_case(ir.Constant(becomes.type, purpose), cases[purpose])
        lanes = ir.Constant(WORDS, list(range(LANES)))
        for purpose, case in cases.items():
            builder.position_at_end(case)
            is_whole = builder.icmp_unsigned(">=", count, number(BLOCKS * LANES))
            with builder.if_else(is_whole) as (all_of_them, some):
                with all_of_them:
                    put(purpose, [None] * BLOCKS)
                with some:
                    left = builder.trunc(count, WORD)
                    put(purpose, [
                        builder.icmp_signed(
                            "<", builder.add(lanes, words_of(LANES * block)), splat(builder, left)
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
    found = [builder.phi(FLOATS) for _ in values]
    for place, phi in enumerate(found):
        phi.add_incoming(values[place], before)
        for result, block in results:
            phi.add_incoming(result[place], block)
    return found


def _relu(builder: Any, x: Any) -> Any:
    zeros = ZEROS
    return builder.select(builder.fcmp_ordered("<", x, zeros), zeros, x)  # NaN stays


def _gelu_tanh(builder: Any, x: Any) -> Any:
    """GELU by its tanh form, x * sigmoid(2 u) with u = sqrt(2 / pi) * (x + 0.044715 x^3)."""
    one, zeros = floats_of(1), ZEROS
    square = times(builder, x, x)
    slope = multiply_add(
        builder, square, floats_of(1.5957691216 * 0.044715), floats_of(1.5957691216)
    )
    u = times(builder, x, slope)
    is_positive = builder.fcmp_ordered(">", u, zeros)
    e = exp(builder, builder.select(is_positive, builder.fneg(u), u))  # at most 1, of either sign
    top = builder.select(is_positive, one, e)
    return times(builder, x, over(builder, top, plus(builder, one, e)))


def _gelu_erf(builder: Any, x: Any) -> Any:
    """GELU by its exact form, within 2e-7: x / 2 * erfc(-x / sqrt(2)).

    The complementary error function by Abramowitz and Stegun's formula 7.1.26.
    """
    one, half = floats_of(1), floats_of(0.5)
    z = times(builder, call(builder, "llvm.fabs.v16f32", FLOATS, x), floats_of(0.70710678))
    t = over(builder, one, multiply_add(builder, z, floats_of(0.3275911), one))
    y = floats_of(1.061405429)
    for term in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        y = multiply_add(builder, y, t, floats_of(term))
    y = times(
        builder, times(builder, y, t), exp(builder, builder.fneg(times(builder, z, z)))
    )  # erfc(z)
    y = times(builder, y, half)
    is_positive = builder.fcmp_ordered(">", x, ZEROS)
    return times(builder, x, builder.select(is_positive, minus(builder, one, y), y))
