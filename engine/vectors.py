"""Attention's inner loops on vectors of 16 numbers; knows rows of a cache, but no blocks.

Compilers vectorise loops as they see fit, and a sum's last bits follow from how. Here the order of
every sum is written down, whatever rows a tile has: a score adds up every 16th channel of the head
one after the other and then the 16 sums in pairs, a mixture the keys one after the other. There is
code for tiles of one row and of 8, so what belongs to the rows of a tile lies 1 or 8 side by side.

Addresses are integers, as `address` gives them. Who calls sees that arrays live as long.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numba
from llvmlite import ir
from numba.core import types
from numba.np import numpy_support

from engine.cpu_ir import (
    BYTE,
    FLOAT,
    FLOATS,
    LANES,
    LINE,
    SIZE,
    WHOLE,
    WORD,
    WORDS,
    ZEROS,
    are_below,
    ask_for,
    broadcast,
    budget,
    call,
    exp,
    first,
    floats_of,
    fold,
    larger,
    load,
    load_some,
    loop,
    minus,
    multiply_add,
    narrow,
    number,
    over,
    place_of,
    plus,
    splat,
    store,
    store_some,
    sums,
    times,
    vector_of,
    vectors,
    vectors_with,
    widen,
)

ROWS = 8  # of a tile at most

_LOWEST = ir.Constant(FLOATS, [float("-inf")] * LANES)


@numba.extending.intrinsic
def address(context: Any, array: Any, row: Any, column: Any) -> Any:
    """Where array[row, column] lies, of an array whose rows are contiguous."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return place_of(context, builder, signature.args[0], *arguments)[0]

    return types.intp(array, types.intp, types.intp), generate


class _Cache:
    """A cache array (blocks, layers, 2, H, block_size, ...) in IR: rows of D numbers of some type.

    float32, bfloat16 as bits, or 8-bit codes; behind those lies the scale of the row, a float32.
    """

    def __init__(self, context: Any, builder: Any, kind: Any, array: Any) -> None:
        made = context.make_array(kind)(context, builder, array)
        self.data = builder.ptrtoint(made.data, SIZE)
        self.row_bytes = builder.extract_value(made.strides, 4)
        self.item_bytes = numpy_support.as_dtype(kind.dtype).itemsize
        self.has_scales = self.item_bytes == 1
        self._builder = builder

    def row(self, index: Any) -> Any:
        """The address of a row, by its number in the whole array."""
        return self._builder.add(self.data, self._builder.mul(index, self.row_bytes))

    def scale_place(self, row: Any) -> Any:
        """Where the scale of the row at an address lies."""
        return self._builder.add(row, self._builder.sub(self.row_bytes, number(4)))

    def place(self, row: Any, channel: Any) -> Any:
        """Where a channel of the row at an address lies."""
        return self._builder.add(row, self._builder.mul(channel, number(self.item_bytes)))

    def load(self, row: Any, channel: Any) -> Any:
        """16 numbers of the row at an address, as float32; codes want their scale yet."""
        builder, place = self._builder, self.place(row, channel)
        if self.has_scales:
            codes = load(builder, place, ir.VectorType(BYTE, LANES), 1)
            return builder.sitofp(builder.sext(codes, WORDS), FLOATS)
        return widen(builder, load(builder, place, vector_of(self.item_bytes), 1))


@numba.extending.intrinsic
def ask(context: Any, qkv: Any, row: Any, column: Any, size: Any, scale: Any, query: Any) -> Any:
    """Bring D numbers from qkv[row, column] on into query, scaled, with zeros up to the next 16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        qkv, row, column, size, scale, query = arguments
        start, item_bytes = place_of(context, builder, signature.args[0], qkv, row, column)
        factor = splat(builder, scale)

        def bring(d: Any, mask: Any) -> None:
            place = builder.add(start, builder.mul(d, number(item_bytes)))
            values = widen(builder, load_some(builder, place, item_bytes, mask))
            out = builder.add(query, builder.mul(d, number(4)))
            store(builder, times(builder, values, factor), out)

        vectors(builder, size, bring)
        return context.get_dummy_value()

    place = types.intp
    return types.void(qkv, place, place, place, types.float32, place), generate


@numba.extending.intrinsic
def fetch(context: Any, cache: Any, row: Any, count: Any) -> Any:
    """Ask for `count` rows of the cache from a row on, to write them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows = _Cache(context, builder, signature.args[0], arguments[0])
        start, num_bytes = rows.row(arguments[1]), builder.mul(arguments[2], rows.row_bytes)

        def line(offset: Any, _: Sequence[Any]) -> list[Any]:
            ask_for(builder, builder.add(start, offset), cache=2, writes=True)
            return []

        loop(builder, number(0), num_bytes, LINE, [], line)
        return context.get_dummy_value()

    return types.void(cache, types.intp, types.intp), generate


@numba.extending.intrinsic
def score(
    context: Any, rows: Any, cache: Any, row: Any, count: Any, ahead: Any, queries: Any,
    stride: Any, size: Any, scores: Any,
) -> Any:  # fmt: skip
    """Multiply the queries of a tile with `count` rows of the cache, from a row on.

    A lone row meanwhile asks for as many rows from `ahead` on. queries (rows, stride / 4), stride
    in bytes and of 64 each; scores (count, 1 or 8) are overwritten, and some behind them.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, cache, row, count, ahead, queries, stride, size, scores = arguments
        keys = _Cache(context, builder, signature.args[1], cache)
        begin, way = keys.row(row), builder.sub(keys.row(ahead), keys.row(row))
        line_channels = LINE // keys.item_bytes
        full = builder.and_(size, number(-line_channels))

        def multiply(num_rows: int) -> None:
            """16 products at a time, of one row with 16 keys or of 8 with 2; then their sums."""
            num_keys = LANES // num_rows
            some = budget()
            asked = [builder.add(queries, builder.mul(stride, number(r))) for r in range(num_rows)]

            def several(key: Any, _: Sequence[Any]) -> list[Any]:
                at = builder.add(begin, builder.mul(key, keys.row_bytes))
                starts = [
                    builder.add(at, builder.mul(keys.row_bytes, number(index)))
                    for index in range(num_keys)
                ]

                def channels(
                    pairs: Any, count: int, is_last: bool, d: Any, totals: Sequence[Any]
                ) -> list[Any]:
                    """Go on with some pairs of key and query, by so many channels from d on.

                    The last ones may be fewer, and what lies behind them does not count.
                    """
                    loaded: dict[Any, list[Any]] = {}
                    for start, query in pairs:
                        if start not in loaded:
                            if num_rows == 1:
                                ask_for(builder, keys.place(builder.add(start, way), d), cache=1)
                            loaded[start] = [
                                keys.load(start, builder.add(d, number(part)))
                                for part in range(0, count, LANES)
                            ]
                            if is_last:
                                mask = are_below(builder, range(LANES), builder.sub(size, d))
                                loaded[start] = [builder.select(mask, loaded[start][0], ZEROS)]
                        if query not in loaded:
                            place = builder.add(query, builder.mul(d, number(4)))
                            loaded[query] = [
                                load(builder, builder.add(place, number(4 * part)), FLOATS, 64)
                                for part in range(0, count, LANES)
                            ]
                    for part in range(count // LANES):
                        totals = [
                            multiply_add(builder, loaded[query][part], loaded[start][part], total)
                            for (start, query), total in zip(pairs, totals, strict=True)
                        ]
                    return list(totals)

                pairs = [(start, query) for start in starts for query in asked]
                totals: list[Any] = []
                for top in range(0, LANES, some):
                    chosen = pairs[top : top + some]
                    whole = functools.partial(channels, chosen, line_channels, False)
                    rest = functools.partial(channels, chosen, LANES, True)
                    zeros = [ZEROS] * some
                    found = loop(builder, number(0), full, line_channels, zeros, whole)
                    totals += loop(builder, full, size, LANES, found, rest)
                found = sums(builder, totals)
                if keys.has_scales:
                    scales = ir.Constant(FLOATS, ir.Undefined)
                    for lane in range(LANES):
                        place = keys.scale_place(starts[lane // num_rows])
                        scale = load(builder, place, FLOAT, 1)
                        scales = builder.insert_element(scales, scale, ir.Constant(WORD, lane))
                    found = times(builder, found, scales)
                out = builder.add(scores, builder.mul(key, number(4 * num_rows)))
                store(builder, found, out, 4)
                return []

            loop(builder, number(0), count, num_keys, [], several)

        _one_or_more(builder, rows, multiply)
        return context.get_dummy_value()

    return types.void(types.intp, cache, *[types.intp] * 7), generate


@numba.extending.intrinsic
def soften(context: Any, rows: Any, scores: Any, length: Any, factors: Any) -> Any:
    """Replace scores by exp(score - highest of the row), and factors by 1 / the sum of the row's.

    scores (keys, 1 or 8); the first row sees `length` keys, each other row one more than the one
    before it. What is behind does not count and is overwritten, up to the next 16 keys.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, scores, length, factors = arguments

        def do(num_rows: int) -> None:
            num_keys = LANES // num_rows  # in a vector
            longest = builder.add(length, number(num_rows - 1))
            lanes = range(LANES)

            def found(key: Any, index: int) -> tuple[Any, Any, Any]:
                """Of 16 keys from one on, a vector: its place, its scores and which count."""
                place = builder.add(scores, builder.mul(key, number(4 * num_rows)))
                place = builder.add(place, number(4 * LANES * index))
                behind = [index * num_keys + lane // num_rows - lane % num_rows for lane in lanes]
                counts = are_below(builder, behind, builder.sub(length, key))
                return place, load(builder, place, FLOATS, 64), counts

            def climb(key: Any, carried: Sequence[Any]) -> list[Any]:
                for index in range(num_rows):
                    _, values, counts = found(key, index)
                    carried = [larger(builder, builder.select(counts, values, _LOWEST), carried[0])]
                return list(carried)

            highest = loop(builder, number(0), longest, LANES, [_LOWEST], climb)[0]
            peaks = fold(builder, highest, larger, num_rows)

            def weigh(key: Any, totals: Sequence[Any]) -> list[Any]:
                after = []
                for index, total in enumerate(totals):
                    place, values, counts = found(key, index)
                    weights = exp(builder, minus(builder, values, peaks))
                    weights = builder.select(counts, weights, ZEROS)
                    store(builder, weights, place)
                    after.append(plus(builder, total, weights))
                return after

            # Every 16th key one after the other, then in pairs.
            totals = loop(builder, number(0), longest, LANES, [ZEROS] * num_rows, weigh)
            while len(totals) > 1:
                half = len(totals) // 2
                totals = [plus(builder, totals[i], totals[i + half]) for i in range(half)]
            total = fold(builder, totals[0], plus, num_rows)
            store(builder, over(builder, floats_of(1), total), factors)

        _one_or_more(builder, rows, do)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@numba.extending.intrinsic
def mix(
    context: Any, rows: Any, cache: Any, row: Any, count: Any, ahead: Any, weights: Any,
    common: Any, mixtures: Any, stride: Any,
) -> Any:  # fmt: skip
    """Add `count` rows of the cache, from a row on, to the mixtures of a tile's rows.

    A lone row meanwhile asks for as many rows from `ahead` on.
    The first row sees `common` of them, or all, each other row one more than the one before it.
    weights (count, 1 or 8) as `soften` leaves them; mixtures (rows, stride / 4), stride in bytes
    and of 64 each.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, cache, row, count, ahead, weights, common, mixtures, stride = arguments
        values = _Cache(context, builder, signature.args[1], cache)
        begin, way = values.row(row), builder.sub(values.row(ahead), values.row(row))
        line_channels = LINE // values.item_bytes

        def add(num_rows: int) -> None:
            some = min(num_rows, budget())
            several = min(4, budget() // some)
            step = number(4 * LANES * several)
            many = builder.mul(builder.udiv(stride, step), step)
            for top in range(0, num_rows, some):
                add_rows(num_rows, top, some, several, number(0), many)
                if several > 1:
                    add_rows(num_rows, top, some, 1, many, stride)

        def add_rows(
            num_rows: int, top: int, some: int, several: int, begin_at: Any, end_at: Any
        ) -> None:
            """Rows top to top + some, over so many vectors of channels at a time."""

            def channels(offset: Any, _: Sequence[Any]) -> list[Any]:
                channel = builder.udiv(offset, number(4))
                places = []
                for r in range(some):
                    out = builder.add(mixtures, builder.mul(stride, number(top + r)))
                    for index in range(several):
                        across = builder.add(offset, number(4 * LANES * index))
                        places.append(builder.add(out, across))

                def take(key: Any, totals: Sequence[Any], is_last: bool) -> list[Any]:
                    at = builder.add(begin, builder.mul(key, values.row_bytes))
                    found = []
                    for index in range(several):
                        this = builder.add(channel, number(LANES * index))
                        if num_rows == 1 and LANES * index % line_channels == 0:
                            ask_for(builder, values.place(builder.add(at, way), this), cache=1)
                        found.append(values.load(at, this))
                    if values.has_scales:
                        scale = broadcast(builder, values.scale_place(at))
                        found = [times(builder, v, scale) for v in found]
                    after = []
                    for r in range(some):
                        weight = builder.mul(key, number(4 * num_rows))
                        weight = builder.add(weight, number(4 * (top + r)))
                        w = broadcast(builder, builder.add(weights, weight))
                        for index, v in enumerate(found):
                            total = totals[r * several + index]
                            more = multiply_add(builder, w, v, total)
                            if is_last:
                                end = builder.add(common, number(top + r))
                                sees = builder.icmp_signed("<", key, end)
                                more = builder.select(sees, more, total)
                            after.append(more)
                    return after

                totals = [load(builder, place, FLOATS, 64) for place in places]
                seen = builder.icmp_signed("<", count, common)
                seen = builder.select(seen, count, common)
                totals = loop(builder, number(0), seen, 1, totals,
                              lambda key, totals: take(key, totals, False))  # fmt: skip
                if num_rows > 1:  # keys that only later rows see, broken ones perhaps
                    begin_last = builder.select(
                        builder.icmp_signed("<", seen, number(0)), number(0), seen
                    )
                    totals = loop(builder, begin_last, count, 1, totals,
                                  lambda key, totals: take(key, totals, True))  # fmt: skip
                for place, total in zip(places, totals, strict=True):
                    store(builder, total, place)
                return []

            loop(builder, begin_at, end_at, 4 * LANES * several, [], channels)

        _one_or_more(builder, rows, add)
        return context.get_dummy_value()

    return types.void(types.intp, cache, *[types.intp] * 7), generate


@numba.extending.intrinsic
def put(context: Any, out: Any, row: Any, column: Any, mixture: Any, factor: Any, size: Any) -> Any:
    """Write a mixture (D,) times a factor to out[row, column] and on, in float32 or bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, row, column, mixture, factor, size = arguments
        begin, item_bytes = place_of(context, builder, signature.args[0], out, row, column)
        factors = splat(builder, factor)

        def write(d: Any, mask: Any) -> None:
            values = load(builder, builder.add(mixture, builder.mul(d, number(4))), FLOATS, 64)
            values = narrow(builder, times(builder, values, factors), item_bytes)
            place = builder.add(begin, builder.mul(d, number(item_bytes)))
            store_some(builder, values, place, mask)

        vectors(builder, size, write)
        return context.get_dummy_value()

    signature = (out, types.intp, types.intp, types.intp, types.float32, types.intp)
    return types.void(*signature), generate


@numba.extending.intrinsic
def keep(
    context: Any, qkv: Any, row: Any, column: Any, size: Any, cache: Any, place: Any
) -> Any:  # fmt: skip
    """Store qkv[row, column] and on, D numbers in float32 or bfloat16, as a row of the cache.

    8-bit codes are of the row's own scale, which lets its largest number be 127. What is not
    finite makes the scale NaN, so the row breaks whatever reads it.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        qkv, row, column, size, cache, kept = arguments
        rows = _Cache(context, builder, signature.args[4], cache)
        out = rows.row(kept)
        begin, item_bytes = place_of(context, builder, signature.args[0], qkv, row, column)

        def read(d: Any, mask: Any) -> Any:
            place = builder.add(begin, builder.mul(d, number(item_bytes)))
            return widen(builder, load_some(builder, place, item_bytes, mask))

        factors = None
        if rows.has_scales:

            def look(d: Any, carried: Sequence[Any], mask: Any) -> list[Any]:
                values = read(d, mask)
                magnitudes = call(builder, "llvm.fabs.v16f32", FLOATS, values)
                nothing = times(builder, values, ZEROS)  # NaN where not finite
                return [
                    larger(builder, magnitudes, carried[0]),
                    plus(builder, carried[1], nothing),
                ]

            highest, broken = vectors_with(builder, size, [ZEROS, ZEROS], look)
            largest = first(builder, fold(builder, highest, larger))
            nothing = first(builder, fold(builder, broken, plus))
            most = ir.Constant(FLOAT, 127.0)
            scale = plus(builder, over(builder, largest, most), nothing)
            store(builder, scale, rows.scale_place(out), 1)
            factors = splat(builder, over(builder, most, largest))

        def write(d: Any, mask: Any) -> None:
            values = read(d, mask)
            if factors is None:
                values = narrow(builder, values, rows.item_bytes)
            else:
                shifted = multiply_add(builder, values, factors, floats_of(WHOLE))
                codes = builder.bitcast(shifted, WORDS)
                values = builder.trunc(codes, ir.VectorType(BYTE, LANES))
            place = builder.add(out, builder.mul(d, number(rows.item_bytes)))
            store_some(builder, values, place, mask)

        vectors(builder, size, write)
        return context.get_dummy_value()

    signature = (qkv, types.intp, types.intp, types.intp, cache, types.intp)
    return types.void(*signature), generate


def _one_or_more(builder: Any, rows: Any, generate: Callable[[int], None]) -> None:
    """Code for tiles of one row, and for those of up to 8, whose excess is unused."""
    with builder.if_else(builder.icmp_signed("==", rows, number(1))) as (alone, together):
        with alone:
            generate(1)
        with together:
            generate(ROWS)
