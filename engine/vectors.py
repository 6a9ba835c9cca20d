"""Attention's inner loops on vectors of 16 numbers, in LLVM's own language; knows no blocks.

Compilers vectorise loops as they see fit, and a sum's last bits follow from how. Here the order of
every sum is written down: a score adds up over the head's channels, a mixture over the keys, one
after the other, whatever rows a tile has. The vectors are LLVM's, not a processor's: it splits them
where registers are shorter, so the same code runs on AVX-512, AVX2 and NEON.

Addresses are integers, as `address` gives them. Who calls sees that arrays live as long.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.np import numpy_support

ROWS = 8  # of a tile at most
LANES = 16
PANEL = 4  # groups of 16 keys that `score` takes at a time

_size = ir.IntType(64)
_byte = ir.IntType(8)
_word = ir.IntType(32)
_float = ir.FloatType()
_words = ir.VectorType(_word, LANES)
_floats = ir.VectorType(_float, LANES)
_WHOLE = 1.5 * 2**23  # added to a float32, it rounds to whole numbers, in the lowest bits
_LINE = 64  # bytes that a processor fetches together


@numba.extending.intrinsic
def address(context: Any, array: Any, row: Any, column: Any) -> Any:
    """Where array[row, column] lies, of an array whose rows are contiguous."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _place(context, builder, signature.args[0], *arguments)[0]

    return types.intp(array, types.intp, types.intp), generate


class _Cache:
    """A cache array (layers, blocks, H, block_size, ...) in IR: rows of D numbers of some type.

    float32, bfloat16 as bits, or 8-bit codes; behind those lies the scale of the row, a float32.
    """

    def __init__(self, context: Any, builder: Any, kind: Any, array: Any) -> None:
        made = context.make_array(kind)(context, builder, array)
        self.data = builder.ptrtoint(made.data, _size)
        self.row_bytes = builder.extract_value(made.strides, 3)
        self.item_bytes = numpy_support.as_dtype(kind.dtype).itemsize
        self.has_scales = self.item_bytes == 1
        self.value_bytes = self.row_bytes
        if self.has_scales:
            self.value_bytes = builder.sub(self.row_bytes, _number(4))
        self._builder = builder

    def scale(self, row: Any) -> Any:
        """The scale of the row at an address."""
        return _load(self._builder, self._builder.add(row, self.value_bytes), _float, 1)

    def row(self, keys: Any, at: Any) -> Any:
        """The address of the row that the list `keys` of row numbers names at place `at`."""
        builder = self._builder
        number = _load(builder, builder.add(keys, builder.mul(at, _number(8))), _size, 8)
        return builder.add(self.data, builder.mul(number, self.row_bytes))

    def load(self, place: Any) -> Any:
        """16 numbers from an address on, as float32; codes want their scale yet."""
        builder = self._builder
        if self.has_scales:
            codes = _load(builder, place, ir.VectorType(_byte, LANES), 1)
            return builder.sitofp(builder.sext(codes, _words), _floats)
        return _widen(builder, _load(builder, place, _vector(self.item_bytes), self.item_bytes))

    def split(self, words: Any) -> list[Any]:
        """The numbers that lie in vectors of 4 bytes of 16 rows: a float32 vector for each."""
        builder = self._builder
        if self.item_bytes == 4:
            return [builder.bitcast(words, _floats)]
        if self.item_bytes == 2:
            upper = ir.Constant(_words, [0xFFFF0000] * LANES)
            second = builder.bitcast(builder.and_(words, upper), _floats)
            return [_upper_half(builder, words), second]
        found = []
        for byte in range(4):
            shifted = builder.shl(words, ir.Constant(_words, [24 - 8 * byte] * LANES))
            code = builder.ashr(shifted, ir.Constant(_words, [24] * LANES))
            found.append(builder.sitofp(code, _floats))
        return found


@numba.extending.intrinsic
def ask(
    context: Any, qkv: Any, row: Any, rows: Any, column: Any, size: Any, scale: Any, queries: Any
) -> Any:
    """Bring D numbers of up to 8 rows, from qkv[row, column] on, into queries (D, 8), scaled.

    `queries` has room for D rounded up to 16. Behind the last row it is repeated.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        qkv, row, rows, column, size, scale, queries = arguments
        last = builder.sub(rows, _number(1))
        starts = []
        for number in range(ROWS):
            this = builder.select(
                builder.icmp_signed("<", last, _number(number)), last, _number(number)
            )
            this = builder.add(row, this)
            start, item_bytes = _place(context, builder, signature.args[0], qkv, this, column)
            starts.append(start)
        factor = _splat(builder, scale)

        def turn(d: Any, mask: Any) -> None:
            offset = builder.mul(d, _number(item_bytes))
            square = [ir.Constant(_words, None)] * LANES
            for number, start in enumerate(starts):
                place = builder.add(start, offset)
                values = _widen(builder, _load_some(builder, place, item_bytes, mask))
                square[number] = builder.bitcast(builder.fmul(values, factor), _words)
            out = builder.add(queries, builder.mul(d, _number(4 * ROWS)))
            half = ir.Constant(ir.VectorType(_word, ROWS), list(range(ROWS)))
            for index, words in enumerate(_transpose(builder, square)):
                words = builder.shuffle_vector(words, words, half)
                place = builder.add(out, _number(4 * ROWS * index))
                pointer = builder.inttoptr(place, words.type.as_pointer())
                builder.store(words, pointer, align=4 * ROWS)

        _vectors(builder, size, turn)
        return context.get_dummy_value()

    place = types.intp
    return types.void(qkv, place, place, place, place, types.float32, place), generate


@numba.extending.intrinsic
def prefetch(context: Any, cache: Any, keys: Any, first: Any) -> Any:
    """Ask for 16 rows of the cache, those listed from keys[first] on, without waiting for them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows = _Cache(context, builder, signature.args[0], arguments[0])
        options = [ir.Constant(_word, value) for value in (0, 3, 1)]
        for lane in range(LANES):
            row = rows.row(arguments[1], builder.add(arguments[2], _number(lane)))

            def fetch_line(offset: Any, _: Sequence[Any], row: Any = row) -> list[Any]:
                place = builder.inttoptr(builder.add(row, offset), _byte.as_pointer())
                _call(builder, "llvm.prefetch.p0", ir.VoidType(), place, *options)
                return []

            _loop(builder, _number(0), rows.row_bytes, _LINE, [], fetch_line)
        return context.get_dummy_value()

    return types.void(cache, types.intp, types.intp), generate


@numba.extending.intrinsic
def fetch(context: Any, cache: Any, number: Any, count: Any, writes: Any) -> Any:
    """Ask for `count` rows of the cache from row `number` on, to read them or else to write."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows = _Cache(context, builder, signature.args[0], arguments[0])
        start = builder.add(rows.data, builder.mul(arguments[1], rows.row_bytes))
        num_bytes = builder.mul(arguments[2], rows.row_bytes)

        def ask_with(intent: int) -> None:
            options = [ir.Constant(_word, value) for value in (intent, 2, 1)]

            def fetch_line(offset: Any, _: Sequence[Any]) -> list[Any]:
                place = builder.inttoptr(builder.add(start, offset), _byte.as_pointer())
                _call(builder, "llvm.prefetch.p0", ir.VoidType(), place, *options)
                return []

            _loop(builder, _number(0), num_bytes, _LINE, [], fetch_line)

        with builder.if_else(arguments[3]) as (to_write, to_read):
            with to_write:
                ask_with(1)
            with to_read:
                ask_with(0)
        return context.get_dummy_value()

    return types.void(cache, types.intp, types.intp, types.boolean), generate


@numba.extending.intrinsic
def gather_columns(context: Any, cache: Any, keys: Any, first: Any, columns: Any) -> Any:
    """Turn 16 rows of the cache, those listed from keys[first] on, into D columns of float32.

    `columns` has room for D, rounded up to 64, times 16: channel d of the 16 keys side by side.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows = _Cache(context, builder, signature.args[0], arguments[0])
        starts = [
            rows.row(arguments[1], builder.add(arguments[2], _number(lane)))
            for lane in range(LANES)
        ]
        scales = ir.Constant(_floats, ir.Undefined)
        if rows.has_scales:
            for lane, start in enumerate(starts):
                place = ir.Constant(_word, lane)
                scales = builder.insert_element(scales, rows.scale(start), place)

        def turn(offset: Any, _: Sequence[Any]) -> list[Any]:
            # A last row of the cache is read past its end; who allocates it leaves room.
            square = [
                _load(builder, builder.add(start, offset), _words, rows.item_bytes)
                for start in starts
            ]
            factor = _number(4 * LANES // rows.item_bytes)
            out = builder.add(arguments[3], builder.mul(offset, factor))
            for place, words in enumerate(_transpose(builder, square)):
                for index, column in enumerate(rows.split(words)):
                    if rows.has_scales:
                        column = builder.fmul(column, scales)
                    at = 4 // rows.item_bytes * place + index
                    _store(builder, column, builder.add(out, _number(4 * LANES * at)))
            return []

        _loop(builder, _number(0), rows.value_bytes, 4 * LANES, [], turn)
        return context.get_dummy_value()

    return types.void(cache, types.intp, types.intp, types.intp), generate


@numba.extending.intrinsic
def score(
    context: Any, rows: Any, queries: Any, columns: Any, stride: Any, size: Any, groups: Any,
    scores: Any,
) -> Any:  # fmt: skip
    """Multiply the queries of up to 8 rows with up to 4 groups of 16 keys.

    queries (D, 8); columns (groups, stride / 64, 16), stride in bytes; scores (groups, 8, 16) are
    overwritten, and may be up to the fourth group.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, queries, columns, stride, size, groups, scores = arguments
        budget = _budget(context)

        def multiply(num_rows: int) -> None:
            some = min(num_rows, budget)
            several = min(PANEL, budget // some)
            for first in range(0, num_rows, some):

                def panel(group: Any, _: Sequence[Any], first: int = first) -> list[Any]:
                    at = builder.add(columns, builder.mul(group, stride))
                    bases = [
                        builder.add(at, builder.mul(stride, _number(index)))
                        for index in range(several)
                    ]

                    def channel(d: Any, totals: Sequence[Any]) -> list[Any]:
                        down = builder.mul(d, _number(4 * LANES))
                        keys = [_load(builder, builder.add(b, down), _floats, 64) for b in bases]
                        query = builder.add(queries, builder.mul(d, _number(4 * ROWS)))
                        found = []
                        for row in range(some):
                            q = _broadcast(builder, builder.add(query, _number(4 * (first + row))))
                            for index, k in enumerate(keys):
                                total = totals[row * several + index]
                                found.append(_multiply_add(builder, q, k, total))
                        return found

                    zeros = [ir.Constant(_floats, None)] * (some * several)
                    totals = _loop(builder, _number(0), size, 1, zeros, channel)
                    out = builder.add(scores, builder.mul(group, _number(4 * LANES * ROWS)))
                    for row in range(some):
                        for index in range(several):
                            place = 4 * LANES * (ROWS * index + first + row)
                            total = totals[row * several + index]
                            _store(builder, total, builder.add(out, _number(place)))
                    return []

                _loop(builder, _number(0), groups, several, [], panel)

        _switch(builder, rows, multiply)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), generate


@numba.extending.intrinsic
def soften(context: Any, scores: Any, length: Any) -> Any:
    """Replace a row's scores by exp(score - highest), and return their sum.

    scores is the row's first; those of 16 keys lie together, 8 x 16 before the next ones. What is
    behind `length` keys does not count and is overwritten up to the next 16.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, length = arguments
        lanes = ir.Constant(_words, list(range(LANES)))
        lowest = ir.Constant(_floats, [float("-inf")] * LANES)
        zeros = ir.Constant(_floats, None)

        def place(first: Any) -> Any:
            return builder.add(scores, builder.mul(first, _number(4 * ROWS)))

        def counts(first: Any) -> Any:
            left = builder.trunc(builder.sub(length, first), _word)
            return builder.icmp_signed("<", lanes, _splat(builder, left))

        def climb(first: Any, carried: Sequence[Any]) -> list[Any]:
            found = _load(builder, place(first), _floats, 64)
            found = builder.select(counts(first), found, lowest)
            return [_larger(builder, found, carried[0])]

        highest = _loop(builder, _number(0), length, LANES, [lowest], climb)[0]
        peak = _splat(builder, _fold(builder, highest, _larger))

        def weigh(first: Any, carried: Sequence[Any]) -> list[Any]:
            found = _load(builder, place(first), _floats, 64)
            weights = _exp(builder, builder.fsub(found, peak))
            weights = builder.select(counts(first), weights, zeros)
            _store(builder, weights, place(first))
            return [builder.fadd(carried[0], weights)]

        total = _loop(builder, _number(0), length, LANES, [zeros], weigh)[0]
        return _fold(builder, total, lambda builder, a, b: builder.fadd(a, b))

    return types.float32(types.intp, types.intp), generate


@numba.extending.intrinsic
def mix(
    context: Any, rows: Any, cache: Any, keys: Any, weights: Any, common: Any, mixtures: Any,
    stride: Any,
) -> Any:  # fmt: skip
    """Add up the cache's rows that `keys` lists, by the weights of up to 8 rows of a tile.

    The first row of the tile sees `common` keys, each other row one more than the one before it.
    weights as `soften` leaves them; mixtures (8, stride / 4), stride in bytes and of 64 each.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, cache, keys, weights, common, mixtures, stride = arguments
        values = _Cache(context, builder, signature.args[1], cache)
        budget = _budget(context)

        def add(num_rows: int) -> None:
            some = min(num_rows, budget)
            several = min(PANEL, budget // some)
            many = builder.mul(
                builder.udiv(stride, _number(4 * LANES * several)), _number(4 * LANES * several)
            )
            for first in range(0, num_rows, some):
                add_rows(first, some, several, _number(0), many)
                if several > 1:
                    add_rows(first, some, 1, many, stride)

        def add_rows(first: int, some: int, several: int, begin: Any, end: Any) -> None:
            """Rows first to first + some, over so many vectors of channels at a time."""
            bytes_each = values.item_bytes * LANES

            def channels(offset: Any, _: Sequence[Any]) -> list[Any]:
                across = builder.mul(builder.udiv(offset, _number(4)), _number(values.item_bytes))

                def take(key: Any, weight: Any, totals: Sequence[Any], skips: int) -> list[Any]:
                    row = values.row(keys, key)
                    begin = builder.add(row, across)
                    found = [
                        values.load(builder.add(begin, _number(bytes_each * index)))
                        for index in range(several)
                    ]
                    if values.has_scales:
                        scale = _splat(builder, values.scale(row))
                        found = [builder.fmul(v, scale) for v in found]
                    after = list(totals)
                    for r in range(some):
                        if first + r < skips:
                            continue
                        w = _broadcast(
                            builder, builder.add(weight, _number(4 * LANES * (first + r)))
                        )
                        for index, v in enumerate(found):
                            at = r * several + index
                            after[at] = _multiply_add(builder, w, v, totals[at])
                    return after

                def weight_of(key: Any) -> Any:
                    group, lane = (
                        builder.udiv(key, _number(LANES)),
                        builder.urem(key, _number(LANES)),
                    )
                    return builder.add(
                        builder.add(weights, builder.mul(group, _number(4 * LANES * ROWS))),
                        builder.mul(lane, _number(4)),
                    )

                def one(key: Any, totals: Sequence[Any]) -> list[Any]:
                    return take(key, weight_of(key), totals, 0)

                zeros = [ir.Constant(_floats, None)] * (some * several)
                totals = _loop(builder, _number(0), common, 1, zeros, one)
                for ahead in range(1, first + some):  # keys that only later rows see
                    key = builder.add(common, _number(ahead - 1))
                    totals = take(key, weight_of(key), totals, ahead)
                for r in range(some):
                    out = builder.add(mixtures, builder.mul(stride, _number(first + r)))
                    for index in range(several):
                        place = builder.add(builder.add(out, offset), _number(4 * LANES * index))
                        _store(builder, totals[r * several + index], place)
                return []

            _loop(builder, begin, end, 4 * LANES * several, [], channels)

        _switch(builder, rows, add)
        return context.get_dummy_value()

    return types.void(types.intp, cache, *[types.intp] * 5), generate


@numba.extending.intrinsic
def put(context: Any, out: Any, row: Any, column: Any, mixture: Any, factor: Any, size: Any) -> Any:
    """Write a mixture (D,) times a factor to out[row, column] and on, in float32 or bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, row, column, mixture, factor, size = arguments
        begin, item_bytes = _place(context, builder, signature.args[0], out, row, column)
        factors = _splat(builder, factor)

        def write(d: Any, mask: Any) -> None:
            values = _load(builder, builder.add(mixture, builder.mul(d, _number(4))), _floats, 64)
            values = _narrow(builder, builder.fmul(values, factors), item_bytes)
            place = builder.add(begin, builder.mul(d, _number(item_bytes)))
            _store_some(builder, values, place, mask)

        _vectors(builder, size, write)
        return context.get_dummy_value()

    signature = (out, types.intp, types.intp, types.intp, types.float32, types.intp)
    return types.void(*signature), generate


@numba.extending.intrinsic
def keep(
    context: Any, qkv: Any, row: Any, column: Any, size: Any, cache: Any, number: Any
) -> Any:  # fmt: skip
    """Store qkv[row, column] and on, D numbers in float32 or bfloat16, as a row of the cache.

    8-bit codes are of the row's own scale, which lets its largest number be 127. What is not
    finite makes the scale NaN, so the row breaks whatever reads it.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        qkv, row, column, size, cache, number = arguments
        rows = _Cache(context, builder, signature.args[4], cache)
        out = builder.add(rows.data, builder.mul(number, rows.row_bytes))
        begin, item_bytes = _place(context, builder, signature.args[0], qkv, row, column)

        def read(d: Any, mask: Any) -> Any:
            place = builder.add(begin, builder.mul(d, _number(item_bytes)))
            return _widen(builder, _load_some(builder, place, item_bytes, mask))

        factors = None
        if rows.has_scales:
            zeros = ir.Constant(_floats, None)

            def look(d: Any, carried: Sequence[Any], mask: Any) -> list[Any]:
                values = read(d, mask)
                magnitudes = _call(builder, "llvm.fabs.v16f32", _floats, values)
                nothing = builder.fmul(values, zeros)  # NaN where not finite
                return [
                    _larger(builder, magnitudes, carried[0]),
                    builder.fadd(carried[1], nothing),
                ]

            largest, broken = _vectors_with(builder, size, [zeros, zeros], look)
            largest = _fold(builder, largest, _larger)
            broken = _fold(builder, broken, lambda builder, a, b: builder.fadd(a, b))
            most = ir.Constant(_float, 127.0)
            scale = builder.fadd(builder.fdiv(largest, most), broken)
            place = builder.add(out, rows.value_bytes)
            builder.store(scale, builder.inttoptr(place, _float.as_pointer()), align=1)
            factors = _splat(builder, builder.fdiv(most, largest))

        def write(d: Any, mask: Any) -> None:
            values = read(d, mask)
            if factors is None:
                values = _narrow(builder, values, rows.item_bytes)
            else:
                shifted = _multiply_add(builder, values, factors, _floats_of(_WHOLE))
                codes = builder.bitcast(shifted, _words)
                values = builder.trunc(codes, ir.VectorType(_byte, LANES))
            place = builder.add(out, builder.mul(d, _number(rows.item_bytes)))
            _store_some(builder, values, place, mask)

        _vectors(builder, size, write)
        return context.get_dummy_value()

    signature = (qkv, types.intp, types.intp, types.intp, cache, types.intp)
    return types.void(*signature), generate


def _budget(context: Any) -> int:
    """How many vectors of 16 totals the processor's registers hold beside what they add up."""
    _, _, features = context.codegen().magic_tuple()
    return 16 if "+avx512f" in features else 4


def _number(value: int) -> Any:
    return ir.Constant(_size, value)


def _load(builder: Any, place: Any, kind: Any, align: int) -> Any:
    return builder.load(builder.inttoptr(place, kind.as_pointer()), align=align)


def _store(builder: Any, value: Any, place: Any) -> None:
    builder.store(value, builder.inttoptr(place, value.type.as_pointer()), align=4 * LANES)


def _splat(builder: Any, value: Any) -> Any:
    """16 times the same."""
    kind = ir.VectorType(value.type, LANES)
    nothing = ir.Constant(kind, ir.Undefined)
    lane = builder.insert_element(nothing, value, ir.Constant(_word, 0))
    return builder.shuffle_vector(lane, nothing, ir.Constant(_words, [0] * LANES))


def _broadcast(builder: Any, place: Any) -> Any:
    return _splat(builder, _load(builder, place, _float, 4))


def _place(
    context: Any, builder: Any, kind: Any, array: Any, row: Any, column: Any
) -> tuple[Any, int]:
    """Where array[row, column] lies, its numbers side by side, and how long each is."""
    made = context.make_array(kind)(context, builder, array)
    item_bytes = numpy_support.as_dtype(kind.dtype).itemsize
    begin = builder.add(
        builder.mul(row, builder.extract_value(made.strides, 0)),
        builder.mul(column, _number(item_bytes)),
    )
    return builder.add(builder.ptrtoint(made.data, _size), begin), item_bytes


def _vector(item_bytes: int) -> Any:
    """The type of 16 float32 or, in 2 bytes each, 16 bfloat16."""
    return _floats if item_bytes == 4 else ir.VectorType(ir.IntType(16), LANES)


def _vectors(builder: Any, size: Any, body: Callable[[Any, Any], None]) -> None:
    """Go over `size` numbers by 16; `body` gets a mask for the last ones, None before."""

    def with_nothing(d: Any, _: Sequence[Any], mask: Any) -> list[Any]:
        body(d, mask)
        return []

    _vectors_with(builder, size, [], with_nothing)


def _vectors_with(
    builder: Any,
    size: Any,
    carried: Sequence[Any],
    body: Callable[[Any, Sequence[Any], Any], list[Any]],
) -> list[Any]:
    """Go over `size` numbers by 16, as `_loop` does, with a mask for the last ones."""
    full = builder.and_(size, _number(-LANES))
    carried = _loop(builder, _number(0), full, LANES, carried, lambda d, c: body(d, c, None))

    def rest(d: Any, carried: Sequence[Any]) -> list[Any]:
        left = _splat(builder, builder.trunc(builder.sub(size, d), _word))
        lanes = ir.Constant(_words, list(range(LANES)))
        return body(d, carried, builder.icmp_signed("<", lanes, left))

    return _loop(builder, full, size, LANES, carried, rest)


def _load_some(builder: Any, place: Any, item_bytes: int, mask: Any) -> Any:
    """16 numbers, and zeros where there is a mask and it is not set."""
    kind = _vector(item_bytes)
    if mask is None:
        return _load(builder, place, kind, item_bytes)
    pointer = builder.inttoptr(place, kind.as_pointer())
    align = ir.Constant(_word, item_bytes)
    name = f"llvm.masked.load.{_suffix(kind)}.p0"
    return _call(builder, name, kind, pointer, align, mask, ir.Constant(kind, None))


def _store_some(builder: Any, values: Any, place: Any, mask: Any) -> None:
    """Store 16 numbers, or those whose mask is set."""
    kind = values.type
    item_bytes = {"v16f32": 4, "v16i16": 2, "v16i8": 1}[_suffix(kind)]
    pointer = builder.inttoptr(place, kind.as_pointer())
    if mask is None:
        builder.store(values, pointer, align=item_bytes)
        return
    align = ir.Constant(_word, item_bytes)
    name = f"llvm.masked.store.{_suffix(kind)}.p0"
    _call(builder, name, ir.VoidType(), values, pointer, align, mask)


def _suffix(kind: Any) -> str:
    """How LLVM's functions name a type of vectors."""
    letter = "f32" if kind.element == _float else f"i{kind.element.width}"
    return f"v{LANES}{letter}"


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)


def _floats_of(value: float) -> Any:
    return ir.Constant(_floats, [float(np.float32(value))] * LANES)


def _words_of(value: int) -> Any:
    return ir.Constant(_words, [value] * LANES)


def _upper_half(builder: Any, words: Any) -> Any:
    """float32 with the lower halves of words as their upper ones: what bfloat16 is."""
    return builder.bitcast(builder.shl(words, _words_of(16)), _floats)


def _widen(builder: Any, values: Any) -> Any:
    """float32 as it is, or what bfloat16's bits stand for."""
    if values.type == _floats:
        return values
    return _upper_half(builder, builder.zext(values, _words))


def _narrow(builder: Any, values: Any, item_bytes: int) -> Any:
    """float32 as it is or, in 2 bytes, rounded to bfloat16's bits as `cpu_math.narrow` does it."""
    if item_bytes == 4:
        return values
    bits = builder.bitcast(values, _words)
    upper = builder.lshr(bits, _words_of(16))
    odd = builder.and_(upper, _words_of(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _words_of(0x7FFF))), _words_of(16))
    broken = builder.fcmp_unordered("uno", values, values)
    found = builder.select(broken, builder.or_(upper, _words_of(64)), rounded)
    return builder.trunc(found, _vector(item_bytes))


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Take a * b + c, rounded once where the processor can."""
    return _call(builder, "llvm.fmuladd.v16f32", _floats, a, b, c)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    """The larger of each pair; b where a is not a number."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _fold(builder: Any, vector: Any, combine: Callable[[Any, Any, Any], Any]) -> Any:
    """Combine the 16 numbers of a vector, halves with halves."""
    for width in (8, 4, 2, 1):
        mask = ir.Constant(_words, [(lane + width) % LANES for lane in range(LANES)])
        vector = combine(builder, vector, builder.shuffle_vector(vector, vector, mask))
    return builder.extract_element(vector, ir.Constant(_word, 0))


def _exp(builder: Any, x: Any) -> Any:
    """Exponentiate x <= 0 to base e, within 2 units in the last place; NaN stays.

    As `cpu_math.exp` does it, but for how the nearest whole number is found.
    """
    bottom = _floats_of(-87)
    x = builder.select(builder.fcmp_ordered("<", x, bottom), bottom, x)
    shifted = _multiply_add(builder, x, _floats_of(1.44269504), _floats_of(_WHOLE))
    n = builder.fsub(shifted, _floats_of(_WHOLE))
    r = _multiply_add(builder, n, _floats_of(-0.693359375), x)
    r = _multiply_add(builder, n, _floats_of(2.12194440e-4), r)
    y = _floats_of(1 / 5040)
    for term in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1, 1):
        y = _multiply_add(builder, y, r, _floats_of(term))
    bits = builder.add(builder.bitcast(shifted, _words), _words_of(127))
    return builder.fmul(y, builder.bitcast(builder.shl(bits, _words_of(23)), _floats))


def _transpose(builder: Any, rows: Sequence[Any]) -> list[Any]:
    """16 vectors of 16 words, rows made columns: in pairs, then fours, then quarters of vectors."""

    def shuffle(a: Any, b: Any, lanes: list[int]) -> Any:
        return builder.shuffle_vector(a, b, ir.Constant(_words, lanes))

    quarters = range(0, LANES, 4)
    low = [q + i + s for q in quarters for i in (0, 1) for s in (0, LANES)]
    high = [lane + 2 for lane in low]
    pairs = [shuffle(rows[i], rows[i + 1], m) for i in range(0, LANES, 2) for m in (low, high)]
    low = [q + s + i for q in quarters for s in (0, LANES) for i in (0, 1)]
    high = [lane + 2 for lane in low]
    # fours[i][c]: of rows 4 i to 4 i + 3, columns c, c + 4, c + 8 and c + 12 in its quarters
    fours = []
    for i in range(0, LANES, 4):
        a, b, c, d = pairs[i : i + 4]
        fours.append(
            [shuffle(a, c, low), shuffle(a, c, high), shuffle(b, d, low), shuffle(b, d, high)]
        )
    even = [*range(4), *range(8, 12), *range(16, 20), *range(24, 28)]
    odd = [lane + 4 for lane in even]
    columns: list[Any] = [None] * LANES
    for c in range(4):
        first = [shuffle(fours[0][c], fours[1][c], mask) for mask in (even, odd)]
        second = [shuffle(fours[2][c], fours[3][c], mask) for mask in (even, odd)]
        for parity in (0, 1):
            for half, mask in enumerate((even, odd)):
                columns[4 * (2 * half + parity) + c] = shuffle(first[parity], second[parity], mask)
    return columns


def _loop(
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
    index = builder.phi(_size)
    index.add_incoming(begin, before)
    values = [builder.phi(value.type) for value in carried]
    for phi, value in zip(values, carried, strict=True):
        phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", index, end), inside, after)
    builder.position_at_end(inside)
    results = body(index, values)
    index.add_incoming(builder.add(index, _number(step)), builder.block)
    for phi, result in zip(values, results, strict=True):
        phi.add_incoming(result, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return values


def _switch(builder: Any, rows: Any, generate: Callable[[int], None]) -> None:
    """Code for tiles of 1, 2, 4 and 8 rows; others take the next larger, whose excess is unused."""
    after = builder.append_basic_block()
    for num_rows in (1, 2, 4, ROWS):
        fits, next_one = builder.append_basic_block(), builder.append_basic_block()
        builder.cbranch(builder.icmp_signed("<=", rows, _number(num_rows)), fits, next_one)
        builder.position_at_end(fits)
        generate(num_rows)
        builder.branch(after)
        builder.position_at_end(next_one)
    builder.unreachable()
    builder.position_at_end(after)
