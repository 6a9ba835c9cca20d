"""Vectors of 16 numbers in LLVM's own language: the words that inner loops are written in.

The vectors are LLVM's, not a processor's: it splits them where registers are shorter, so the same
code runs on AVX-512, AVX2 and NEON, and gives the same bits. Functions here write instructions
where a `builder` stands; they know no attention.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.np import numpy_support

from engine.cpu_features import processor

LANES = 16
LINE = 64  # bytes that a processor fetches together

SIZE = ir.IntType(64)
BYTE = ir.IntType(8)
WORD = ir.IntType(32)
FLOAT = ir.FloatType()
WORDS = ir.VectorType(WORD, LANES)
FLOATS = ir.VectorType(FLOAT, LANES)
ZEROS = ir.Constant(FLOATS, None)
# Where a kernel's sums may be reordered, numba says so of whatever has no flags at all. This one
# allows no more than another sign of a zero.
_AS_WRITTEN = ("nsz",)

WHOLE = 1.5 * 2**23  # added to a float32, it rounds to whole numbers, in the lowest bits


def budget() -> int:
    """How many vectors of totals the processor's registers hold beside what they add up."""
    return 16 if "avx512f" in processor()[1] else 4


def number(value: int) -> Any:
    """An address, index or count."""
    return ir.Constant(SIZE, value)


def load(builder: Any, place: Any, kind: Any, align: int) -> Any:
    """What lies at an address."""
    return builder.load(builder.inttoptr(place, kind.as_pointer()), align=align)


def store(builder: Any, value: Any, place: Any, align: int = LINE) -> None:
    """Put a value to an address."""
    builder.store(value, builder.inttoptr(place, value.type.as_pointer()), align=align)


def splat(builder: Any, value: Any) -> Any:
    """16 times the same."""
    kind = ir.VectorType(value.type, LANES)
    nothing = ir.Constant(kind, ir.Undefined)
    lane = builder.insert_element(nothing, value, ir.Constant(WORD, 0))
    return shuffle(builder, lane, nothing, [0] * LANES)


def broadcast(builder: Any, place: Any) -> Any:
    """16 times the float32 at an address."""
    return splat(builder, load(builder, place, FLOAT, 4))


def shuffle(builder: Any, a: Any, b: Any, lanes: Sequence[int]) -> Any:
    """Lanes of two vectors by their numbers, those of the second from 16 on."""
    return builder.shuffle_vector(a, b, ir.Constant(WORDS, list(lanes)))


def ask_for(builder: Any, place: Any, *, cache: int, writes: bool = False) -> None:
    """Have a line of memory fetched as far as a cache, the first or the second, and do not wait."""
    options = [ir.Constant(WORD, value) for value in (int(writes), 4 - cache, 1)]
    pointer = builder.inttoptr(place, BYTE.as_pointer())
    call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *options)


def place_of(
    context: Any, builder: Any, kind: Any, array: Any, row: Any, column: Any
) -> tuple[Any, int]:
    """Where array[row, column] lies, its numbers side by side, and how long each is."""
    made = context.make_array(kind)(context, builder, array)
    item_bytes = numpy_support.as_dtype(kind.dtype).itemsize
    begin = builder.add(
        builder.mul(row, builder.extract_value(made.strides, 0)),
        builder.mul(column, number(item_bytes)),
    )
    return builder.add(builder.ptrtoint(made.data, SIZE), begin), item_bytes


def vector_of(item_bytes: int) -> Any:
    """The type of 16 float32 or, in 2 bytes each, 16 bfloat16."""
    return FLOATS if item_bytes == 4 else ir.VectorType(ir.IntType(16), LANES)


def vectors(builder: Any, size: Any, body: Callable[[Any, Any], None]) -> None:
    """Go over `size` numbers by 16; `body` gets a mask for the last ones, None before."""

    def with_nothing(d: Any, _: Sequence[Any], mask: Any) -> list[Any]:
        body(d, mask)
        return []

    vectors_with(builder, size, [], with_nothing)


def vectors_with(
    builder: Any,
    size: Any,
    carried: Sequence[Any],
    body: Callable[[Any, Sequence[Any], Any], list[Any]],
) -> list[Any]:
    """Go over `size` numbers by 16, as `loop` does, with a mask for the last ones."""
    full = builder.and_(size, number(-LANES))
    carried = loop(builder, number(0), full, LANES, carried, lambda d, c: body(d, c, None))

    def rest(d: Any, carried: Sequence[Any]) -> list[Any]:
        return body(d, carried, are_below(builder, range(LANES), builder.sub(size, d)))

    return loop(builder, full, size, LANES, carried, rest)


def are_below(builder: Any, lanes: Sequence[int], end: Any) -> Any:
    """A mask of the lanes whose numbers are smaller than some count."""
    limit = splat(builder, builder.trunc(end, WORD))
    return builder.icmp_signed("<", ir.Constant(WORDS, list(lanes)), limit)


def load_some(builder: Any, place: Any, item_bytes: int, mask: Any) -> Any:
    """16 numbers, and zeros where there is a mask and it is not set."""
    kind = vector_of(item_bytes)
    if mask is None:
        return load(builder, place, kind, item_bytes)
    pointer = builder.inttoptr(place, kind.as_pointer())
    align = ir.Constant(WORD, item_bytes)
    name = f"llvm.masked.load.{_suffix(kind)}.p0"
    return call(builder, name, kind, pointer, align, mask, ir.Constant(kind, None))


def store_some(builder: Any, values: Any, place: Any, mask: Any) -> None:
    """Store 16 numbers, or those whose mask is set."""
    kind = values.type
    item_bytes = {"v16f32": 4, "v16i16": 2, "v16i8": 1}[_suffix(kind)]
    pointer = builder.inttoptr(place, kind.as_pointer())
    if mask is None:
        builder.store(values, pointer, align=item_bytes)
        return
    align = ir.Constant(WORD, item_bytes)
    name = f"llvm.masked.store.{_suffix(kind)}.p0"
    call(builder, name, ir.VoidType(), values, pointer, align, mask)


def _suffix(kind: Any) -> str:
    """How LLVM's functions name a type of vectors."""
    letter = "f32" if kind.element == FLOAT else f"i{kind.element.width}"
    return f"v{LANES}{letter}"


def call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Call one of LLVM's own functions."""
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)


def floats_of(value: float) -> Any:
    """16 times a constant."""
    return ir.Constant(FLOATS, [float(np.float32(value))] * LANES)


def words_of(value: int) -> Any:
    """16 times a whole number of 4 bytes."""
    return ir.Constant(WORDS, [value] * LANES)


def widen(builder: Any, values: Any) -> Any:
    """float32 as it is, or what bfloat16's bits stand for: its upper half."""
    if values.type == FLOATS:
        return values
    return builder.bitcast(builder.shl(builder.zext(values, WORDS), words_of(16)), FLOATS)


def narrow(builder: Any, values: Any, item_bytes: int) -> Any:
    """float32 as it is or, in 2 bytes, rounded to bfloat16's bits, ties to even."""
    if item_bytes == 4:
        return values
    bits = builder.bitcast(values, WORDS)
    upper = builder.lshr(bits, words_of(16))
    odd = builder.and_(upper, words_of(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, words_of(0x7FFF))), words_of(16))
    broken = builder.fcmp_unordered("uno", values, values)
    found = builder.select(broken, builder.or_(upper, words_of(64)), rounded)
    return builder.trunc(found, vector_of(item_bytes))


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Take a * b + c, rounded once where the processor can."""
    return call(builder, "llvm.fmuladd.v16f32", FLOATS, a, b, c)


def plus(builder: Any, a: Any, b: Any) -> Any:
    """The sum of each pair, of numbers or of vectors."""
    return builder.fadd(a, b, flags=_AS_WRITTEN)


def minus(builder: Any, a: Any, b: Any) -> Any:
    """The difference of each pair."""
    return builder.fsub(a, b, flags=_AS_WRITTEN)


def times(builder: Any, a: Any, b: Any) -> Any:
    """The product of each pair."""
    return builder.fmul(a, b, flags=_AS_WRITTEN)


def over(builder: Any, a: Any, b: Any) -> Any:
    """The quotient of each pair."""
    return builder.fdiv(a, b, flags=_AS_WRITTEN)


def larger(builder: Any, a: Any, b: Any) -> Any:
    """The larger of each pair; b where a is not a number."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def fold(builder: Any, vector: Any, combine: Callable[[Any, Any, Any], Any], left: int = 1) -> Any:
    """Combine lanes with those half a vector away, and so on, until `left` differ."""
    width = LANES // 2
    while width >= left:
        turned = [(lane + width) % LANES for lane in range(LANES)]
        vector = combine(builder, vector, shuffle(builder, vector, vector, turned))
        width //= 2
    return vector


def sums(builder: Any, totals: Sequence[Any]) -> Any:
    """Add up each of 16 vectors by itself, in the order of `fold`: their sums, a lane each."""
    found, width = list(totals), LANES // 2
    while width:
        # Of two vectors, one keeps the lanes whose number lacks this bit, one those that have it.
        kept = [lane if not lane & width else LANES + lane for lane in range(LANES)]
        other = [lane + width if not lane & width else LANES + lane - width
                 for lane in range(LANES)]  # fmt: skip
        found = [
            plus(builder, shuffle(builder, a, b, kept), shuffle(builder, a, b, other))
            for a, b in zip(found[:width], found[width:], strict=True)
        ]
        width //= 2
    return found[0]


def first(builder: Any, vector: Any) -> Any:
    """What is in a vector's first lane."""
    return builder.extract_element(vector, ir.Constant(WORD, 0))


def exp(builder: Any, x: Any) -> Any:
    """Exponentiate x <= 0 to base e, within 2 units in the last place; NaN stays.

    Splits off the nearest multiple of ln 2 (in two parts, Cody and Waite) and takes the Taylor
    series of the rest, which is at most ln 2 / 2.
    """
    bottom = floats_of(-87)
    x = builder.select(builder.fcmp_ordered("<", x, bottom), bottom, x)
    shifted = multiply_add(builder, x, floats_of(1.44269504), floats_of(WHOLE))
    n = minus(builder, shifted, floats_of(WHOLE))
    r = multiply_add(builder, n, floats_of(-0.693359375), x)
    r = multiply_add(builder, n, floats_of(2.12194440e-4), r)
    y = floats_of(1 / 5040)
    for term in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1, 1):
        y = multiply_add(builder, y, r, floats_of(term))
    bits = builder.add(builder.bitcast(shifted, WORDS), words_of(127))
    return times(builder, y, builder.bitcast(builder.shl(bits, words_of(23)), FLOATS))


def loop(
    builder: Any,
    begin: Any,
    end: Any,
    step: int,
    carried: Sequence[Any],
    body: Callable[[Any, Sequence[Any]], list[Any]],
) -> list[Any]:
    """A loop over the numbers from begin to end; `body` maps what is carried to the next turn."""
    before = builder.block
    head, inside = builder.append_basic_block(), builder.append_basic_block()
    after = builder.append_basic_block()
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(SIZE)
    index.add_incoming(begin, before)
    values = [builder.phi(value.type) for value in carried]
    for phi, value in zip(values, carried, strict=True):
        phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", index, end), inside, after)
    builder.position_at_end(inside)
    results = body(index, values)
    index.add_incoming(builder.add(index, number(step)), builder.block)
    for phi, result in zip(values, results, strict=True):
        phi.add_incoming(result, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return values
