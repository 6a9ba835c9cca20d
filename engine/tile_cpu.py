"""A tile of a product: some rows times 48 outputs, in the instructions that the processor has.

Everything else of a CPU's kernels is written in LLVM's vectors of 16, which it splits where
registers are shorter. A product is not: how many totals registers hold decides how often weights
are read, and which numbers an instruction multiplies decides how they lie. So that is said here,
and chosen for the processor that numba compiles for.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import types

from engine.cpu_features import ARM, processor
from engine.cpu_ir import (
    FLOATS,
    LANES,
    WORD,
    WORDS,
    ask_for,
    call,
    load,
    number,
    plus,
    splat,
    store,
    times,
    words_of,
)

FLOAT32, BFLOAT16, INT8 = 0, 1, 2  # kinds of products, by their weights
BLOCKS = 3  # of 16 outputs, which a tile has
VALUES = {FLOAT32: 1, BFLOAT16: 2, INT8: 4}  # inputs of a row in a step: 4 bytes of weights
_SHORTS = ir.VectorType(ir.IntType(16), 2 * LANES)
_BYTES = ir.VectorType(ir.IntType(8), 16)  # of a register of ARM's


class Arithmetic(NamedTuple):
    """How a processor multiplies one kind of weights with inputs."""

    name: str  # for people
    input_type: Any  # of numpy: what a product's inputs are stored as
    words: int  # of 4 bytes, which a row's inputs take in a step
    swaps: bool  # whether weights lie by fours in the order 0, 2, 1, 3
    # Of the weights in a step, what goes with one word of inputs: (builder, weights, which word).
    part: Callable[[Any, Any, int], Any]
    # Totals and a word's products, 16 at once: (builder, totals, inputs, part of the weights).
    add_products: Callable[[Any, Any, Any, Any], Any]


@functools.cache
def arithmetic(kind: int) -> Arithmetic:
    """The fastest that the processor has for a kind."""
    architecture, features = processor()
    name = {"x86_64": "SSE2", **dict.fromkeys(ARM, "NEON")}.get(architecture, architecture)
    vectors = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX"}
    name = next((vectors[one] for one in vectors if one in features), name)
    if kind == FLOAT32:
        return Arithmetic(name, np.float32, 1, False, _whole, _add_floats)
    if kind == BFLOAT16:
        if {"avx512f", "avx512bf16"} <= features:
            return Arithmetic("AVX-512 BF16", np.uint16, 1, False, _whole, _add_bfloat16_pairs)
        # Weights of 2 bytes, everything else float32: half of what is read, and no less exact.
        return Arithmetic(f"{name} in float32", np.float32, 2, False, _bfloat16_half, _add_floats)
    if {"avx512f", "avx512vnni"} <= features:
        return Arithmetic("AVX-512 VNNI", np.uint8, 1, False, _whole, _add_byte_fours(512))
    if {"avx2", "avxvnni"} <= features:
        return Arithmetic("AVX-VNNI", np.uint8, 1, False, _whole, _add_byte_fours(256))
    if architecture in ARM:
        if "dotprod" in features:
            return Arithmetic("NEON dot products", np.int8, 1, False, _whole, _add_signed_fours)
        return Arithmetic("NEON in pairs", np.int8, 1, False, _whole, _add_signed_pairs)
    # AVX2's own product of bytes gives sums of 16 bits, which would not hold them.
    return Arithmetic(f"{name} in 16 bits", np.int16, 2, True, _byte_pair, _add_short_pairs)


def _registers() -> int:
    """How many vectors of 16 totals stay in registers, beside what is multiplied."""
    architecture, features = processor()
    if "avx512f" in features:
        return 24  # of 32
    # Of 16 registers of 8 numbers or 32 of 4 (ARM); of 16 with 4, as the oldest have, less is left.
    # AVX is one of these: its registers of 8 hold no whole numbers.
    return 6 if "avx2" in features or architecture in ARM else 3


_TOTALS = _registers()
ROWS = min(8, _TOTALS)  # of a tile


def _whole(builder: Any, weights: Any, word: int) -> Any:
    return weights


def _bfloat16_half(builder: Any, weights: Any, word: int) -> Any:
    """The float32 of the first or the second of two bfloat16."""
    if word == 0:
        return builder.shl(weights, words_of(16))
    return builder.and_(weights, words_of(0xFFFF0000))


def _byte_pair(builder: Any, weights: Any, word: int) -> Any:
    """Pairs of 16 bits: of four bytes the first and the third, or the second and the fourth."""
    eight = ir.Constant(_SHORTS, [8] * (2 * LANES))
    shorts = builder.bitcast(weights, _SHORTS)
    if word == 0:
        shorts = builder.shl(shorts, eight)
    return builder.bitcast(builder.ashr(shorts, eight), WORDS)


def _add_floats(builder: Any, totals: Any, inputs: Any, weights: Any) -> Any:
    a, b = (builder.bitcast(x, FLOATS) for x in (inputs, weights))
    architecture, features = processor()
    if architecture.startswith("x86") and "fma" not in features:
        return plus(builder, totals, times(builder, a, b))
    return call(builder, "llvm.fma.v16f32", FLOATS, a, b, totals)


def _add_bfloat16_pairs(builder: Any, totals: Any, inputs: Any, weights: Any) -> Any:
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    return call(builder, name, FLOATS, totals, inputs, weights)


def _add_byte_fours(bits: int) -> Callable[[Any, Any, Any, Any], Any]:
    """With registers of some bits."""
    name = f"llvm.x86.avx512.vpdpbusd.{bits}"

    def add(builder: Any, *vectors: Any) -> Any:
        return _by_parts(builder, bits, lambda *v: call(builder, name, v[0].type, *v), vectors)

    return add


def _add_signed_fours(builder: Any, *vectors: Any) -> Any:
    def add(totals: Any, inputs: Any, weights: Any) -> Any:
        a, b = (builder.bitcast(x, _BYTES) for x in (inputs, weights))
        return call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", totals.type, totals, a, b)

    return _by_parts(builder, 128, add, vectors)


def _add_signed_pairs(builder: Any, *vectors: Any) -> Any:
    """Two products of bytes beside each other fit into 16 bits, as no code of a weight is -128."""
    shorts = ir.VectorType(ir.IntType(16), 8)

    def add(totals: Any, inputs: Any, weights: Any) -> Any:
        a, b = (builder.bitcast(x, _BYTES) for x in (inputs, weights))
        halves = []
        for start in (0, 8):
            lanes = ir.Constant(ir.VectorType(WORD, 8), list(range(start, start + 8)))
            x, y = (builder.shuffle_vector(z, z, lanes) for z in (a, b))
            halves.append(call(builder, "llvm.aarch64.neon.smull.v8i16", shorts, x, y))
        pairs = call(builder, "llvm.aarch64.neon.addp.v8i16", shorts, *halves)
        fours = call(builder, "llvm.aarch64.neon.saddlp.v4i32.v8i16", totals.type, pairs)
        return builder.add(totals, fours)

    return _by_parts(builder, 128, add, vectors)


def _add_short_pairs(builder: Any, totals: Any, inputs: Any, weights: Any) -> Any:
    architecture, features = processor()
    if not architecture.startswith("x86"):
        sixteen = words_of(16)
        a, b = (
            builder.mul(first, second)
            for first, second in (
                [builder.ashr(builder.shl(x, sixteen), sixteen) for x in (inputs, weights)],
                [builder.ashr(x, sixteen) for x in (inputs, weights)],
            )
        )
        return builder.add(totals, builder.add(a, b))
    bits, name = 128, "llvm.x86.sse2.pmadd.wd"
    if "avx512bw" in features:
        bits, name = 512, "llvm.x86.avx512.pmaddw.d.512"
    elif "avx2" in features:
        bits, name = 256, "llvm.x86.avx2.pmadd.wd"

    def multiply(x: Any, y: Any) -> Any:
        shorts = ir.VectorType(ir.IntType(16), bits // 16)
        return call(builder, name, x.type, *(builder.bitcast(z, shorts) for z in (x, y)))

    return builder.add(totals, _by_parts(builder, bits, multiply, (inputs, weights)))


def _by_parts(builder: Any, bits: int, function: Callable[..., Any], vectors: Sequence[Any]) -> Any:
    """Apply a function of registers of some bits to vectors of 16 words, part by part."""
    size = bits // 32
    if size == LANES:
        return function(*vectors)
    results = []
    for start in range(0, LANES, size):
        lanes = ir.Constant(ir.VectorType(WORD, size), list(range(start, start + size)))
        results.append(function(*(builder.shuffle_vector(v, v, lanes) for v in vectors)))
    while len(results) > 1:
        size = results[0].type.count
        lanes = ir.Constant(ir.VectorType(WORD, 2 * size), list(range(2 * size)))
        results = [
            builder.shuffle_vector(a, b, lanes)
            for a, b in zip(results[::2], results[1::2], strict=True)
        ]
    return results[0]


@numba.extending.intrinsic(prefer_literal=True)
def multiply_tile(
    context: Any, kind: Any, rows: Any, inputs: Any, weights: Any, steps: Any, asked: Any,
    asked_a_step: Any, sums: Any,
) -> Any:  # fmt: skip
    """Multiply 1 to ROWS rows of inputs with the 48 outputs of a packed group, over all steps.

    All but kind, rows and steps are addresses. sums (ROWS, 48) float32, or int32 for INT8, are
    overwritten as far as there are rows. 0, 64 or 192 bytes a step are asked for from `asked` on,
    where the next weights lie: so memory works while the processor multiplies. An output's products
    are added up in the order of its inputs, whatever the number of rows.
    """
    how = arithmetic(kind.literal_value)
    total_type = WORDS if kind.literal_value == INT8 else FLOATS

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows = arguments[1]
        after = builder.append_basic_block()
        unreachable = builder.append_basic_block()
        switch = builder.switch(rows, unreachable)
        for num_rows in range(1, ROWS + 1):
            case = builder.append_basic_block()
            switch.add_case(ir.Constant(rows.type, num_rows), case)
            builder.position_at_end(case)
            # As many blocks at a time as there are registers for.
            some = BLOCKS if num_rows * BLOCKS <= _TOTALS else 1
            for block in range(0, BLOCKS, some):
                blocks = range(block, block + some)
                _multiply_blocks(builder, how, total_type, num_rows, blocks, *arguments[2:])
            builder.branch(after)
        builder.position_at_end(unreachable)
        builder.unreachable()
        builder.position_at_end(after)
        return context.get_dummy_value()

    place = types.uintp
    return types.void(kind, place, place, place, place, place, place, place), generate


def _multiply_blocks(
    builder: Any, how: Arithmetic, total_type: Any, num_rows: int, blocks: range, inputs: Any,
    weights: Any, steps: Any, asked: Any, asked_a_step: Any, sums: Any,
) -> None:  # fmt: skip
    """Write the loop over all steps for some rows and blocks of a tile."""
    line, input_bytes = number(4 * LANES), number(4 * how.words)

    def at(begin: Any, stride: Any, count: int) -> Any:
        return builder.add(begin, builder.mul(stride, number(count)))

    row_bytes, block_bytes = builder.mul(steps, input_bytes), builder.mul(steps, line)
    asks_for_three = builder.icmp_unsigned(">", asked_a_step, line)
    if len(blocks) < BLOCKS:
        # Of three lines a step each loop asks for one; one a step is the first loop's to ask for.
        alone = number(0) if blocks[0] else asked_a_step
        asked = builder.select(asks_for_three, at(asked, block_bytes, blocks[0]), asked)
        asked_a_step = builder.select(asks_for_three, line, alone)
    before = builder.block
    loop, done = builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(steps.type)
    step.add_incoming(number(0), before)
    totals = {(row, block): builder.phi(total_type) for row in range(num_rows) for block in blocks}
    weights_at = builder.add(weights, builder.mul(step, line))
    inputs_at = builder.add(inputs, builder.mul(step, input_bytes))
    asked_at = builder.add(asked, builder.mul(step, asked_a_step))
    ask_for(builder, asked_at, cache=2)
    if len(blocks) == BLOCKS:
        with builder.if_then(asks_for_three):
            for block in range(1, BLOCKS):
                ask_for(builder, at(asked_at, line, block), cache=2)
    lines = {b: load(builder, at(weights_at, block_bytes, b), WORDS, 4 * LANES) for b in blocks}

    @functools.cache
    def input_of(row: int, word: int) -> Any:
        place = builder.add(at(inputs_at, row_bytes, row), number(4 * word))
        return splat(builder, load(builder, place, WORD, 4))

    @functools.cache
    def part_of(block: int, word: int) -> Any:
        return how.part(builder, lines[block], word)

    results = dict(totals)
    # Whichever are fewer, rows or blocks, stay in registers while the others come and go.
    order = sorted(totals, key=lambda pair: pair[1 if num_rows < len(blocks) else 0])
    for word in range(how.words):
        for row, block in order:
            result = results[row, block]
            result = how.add_products(builder, result, input_of(row, word), part_of(block, word))
            results[row, block] = result
    for pair, total in totals.items():
        total.add_incoming(ir.Constant(total_type, None), before)
        total.add_incoming(results[pair], builder.block)
    next_step = builder.add(step, number(1))
    step.add_incoming(next_step, builder.block)
    builder.cbranch(builder.icmp_unsigned("<", next_step, steps), loop, done)
    builder.position_at_end(done)
    for (row, block), result in results.items():
        store(builder, result, at(sums, line, row * BLOCKS + block), 4)
