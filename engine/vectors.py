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
_line = 64  # bytes that a processor fetches together


@numba.extending.intrinsic
def address(context: Any, array: Any, row: Any, column: Any) -> Any:
    """Where array[row, column] lies, of an array whose rows are contiguous."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        made = context.make_array(signature.args[0])(context, builder, arguments[0])
        row_stride = builder.extract_value(made.strides, 0)
        column_stride = builder.extract_value(made.strides, 1)
        offset = builder.add(
            builder.mul(arguments[1], row_stride), builder.mul(arguments[2], column_stride)
        )
        return builder.add(builder.ptrtoint(made.data, _size), offset)

    return types.intp(array, types.intp, types.intp), generate


class _Cache:
    """A cache array (layers, blocks, H, block_size, D) in IR: rows of D numbers of some type."""

    def __init__(self, context: Any, builder: Any, kind: Any, array: Any) -> None:
        made = context.make_array(kind)(context, builder, array)
        self.data = builder.ptrtoint(made.data, _size)
        self.row_bytes = builder.extract_value(made.strides, 3)
        self.item_bytes = numpy_support.as_dtype(kind.dtype).itemsize
        self._builder = builder

    def row(self, keys: Any, at: Any) -> Any:
        """The address of the row that the list `keys` of row numbers names at place `at`."""
        builder = self._builder
        number = _load(builder, builder.add(keys, builder.mul(at, _number(8))), _size, 8)
        return builder.add(self.data, builder.mul(number, self.row_bytes))

    def load(self, place: Any) -> Any:
        """16 numbers from an address on, as float32."""
        builder = self._builder
        if self.item_bytes == 4:
            return _load(builder, place, _floats, 4)
        if self.item_bytes == 2:
            bits = _load(builder, place, ir.VectorType(ir.IntType(16), LANES), 2)
            return _upper_half(builder, builder.zext(bits, _words))
        codes = _load(builder, place, ir.VectorType(_byte, LANES), 1)
        return builder.sitofp(builder.sext(codes, _words), _floats)

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
def prefetch(context: Any, cache: Any, keys: Any, first: Any) -> Any:
    """Ask for 16 rows of the cache, those listed from keys[first] on, without waiting for them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows = _Cache(context, builder, signature.args[0], arguments[0])
        pointer = _byte.as_pointer()
        fetch = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [pointer, _word, _word, _word]),
            "llvm.prefetch.p0",
        )
        options = [ir.Constant(_word, value) for value in (0, 3, 1)]
        for lane in range(LANES):
            row = rows.row(arguments[1], builder.add(arguments[2], _number(lane)))

            def fetch_line(offset: Any, _: Sequence[Any], row: Any = row) -> list[Any]:
                place = builder.inttoptr(builder.add(row, offset), pointer)
                builder.call(fetch, [place, *options])
                return []

            _loop(builder, _number(0), rows.row_bytes, _line, [], fetch_line)
        return context.get_dummy_value()

    return types.void(cache, types.intp, types.intp), generate


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
                    at = 4 // rows.item_bytes * place + index
                    _store(builder, column, builder.add(out, _number(4 * LANES * at)))
            return []

        _loop(builder, _number(0), rows.row_bytes, 4 * LANES, [], turn)
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
                    row = builder.add(values.row(keys, key), across)
                    found = [
                        values.load(builder.add(row, _number(bytes_each * index)))
                        for index in range(several)
                    ]
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
        made = context.make_array(signature.args[0])(context, builder, out)
        item_bytes = numpy_support.as_dtype(signature.args[0].dtype).itemsize
        begin = builder.add(
            builder.mul(row, builder.extract_value(made.strides, 0)),
            builder.mul(column, _number(item_bytes)),
        )
        begin = builder.add(builder.ptrtoint(made.data, _size), begin)
        factors = _splat(builder, factor)
        kind = _floats if item_bytes == 4 else ir.VectorType(ir.IntType(16), LANES)
        mask_type = ir.VectorType(ir.IntType(1), LANES)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [kind, kind.as_pointer(), _word, mask_type]),
            f"llvm.masked.store.v16{'f32' if item_bytes == 4 else 'i16'}.p0",
        )
        lanes = ir.Constant(_words, list(range(LANES)))

        def write(d: Any, _: Sequence[Any]) -> list[Any]:
            values = _load(builder, builder.add(mixture, builder.mul(d, _number(4))), _floats, 64)
            values = builder.fmul(values, factors)
            if item_bytes == 2:
                values = _narrow(builder, values)
            left = _splat(builder, builder.trunc(builder.sub(size, d), _word))
            place = builder.add(begin, builder.mul(d, _number(item_bytes)))
            pointer = builder.inttoptr(place, kind.as_pointer())
            inside = builder.icmp_signed("<", lanes, left)
            builder.call(function, [values, pointer, ir.Constant(_word, item_bytes), inside])
            return []

        _loop(builder, _number(0), size, LANES, [], write)
        return context.get_dummy_value()

    signature = (out, types.intp, types.intp, types.intp, types.float32, types.intp)
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


def _upper_half(builder: Any, words: Any) -> Any:
    """float32 with the lower halves of words as their upper ones: what bfloat16 is."""
    return builder.bitcast(builder.shl(words, ir.Constant(_words, [16] * LANES)), _floats)


def _narrow(builder: Any, values: Any) -> Any:
    """float32 rounded to bfloat16's bits, as `cpu_math.narrow` does it."""

    def constant(value: int) -> Any:
        return ir.Constant(_words, [value] * LANES)

    bits = builder.bitcast(values, _words)
    upper = builder.lshr(bits, constant(16))
    odd = builder.and_(upper, constant(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, constant(0x7FFF))), constant(16))
    broken = builder.fcmp_unordered("uno", values, values)
    found = builder.select(broken, builder.or_(upper, constant(64)), rounded)
    return builder.trunc(found, ir.VectorType(ir.IntType(16), LANES))


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Take a * b + c, rounded once where the processor can."""
    signature = ir.FunctionType(_floats, [_floats] * 3)
    function = cgutils.get_or_insert_function(builder.module, signature, "llvm.fmuladd.v16f32")
    return builder.call(function, [a, b, c])


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

    As `cpu_math.exp` does, but that the nearest whole number is found by an addition after which
    the last bits of a float32 are whole numbers.
    """

    def constant(value: float) -> Any:
        return ir.Constant(_floats, [float(np.float32(value))] * LANES)

    bottom = constant(-87)
    x = builder.select(builder.fcmp_ordered("<", x, bottom), bottom, x)
    whole = constant(1.5 * 2**23)
    shifted = _multiply_add(builder, x, constant(1.44269504), whole)
    n = builder.fsub(shifted, whole)
    r = _multiply_add(builder, n, constant(-0.693359375), x)
    r = _multiply_add(builder, n, constant(2.12194440e-4), r)
    y = constant(1 / 5040)
    for term in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1, 1):
        y = _multiply_add(builder, y, r, constant(term))
    bits = builder.add(builder.bitcast(shifted, _words), ir.Constant(_words, [127] * LANES))
    power = builder.shl(bits, ir.Constant(_words, [23] * LANES))
    return builder.fmul(y, builder.bitcast(power, _floats))


def _transpose(builder: Any, rows: Sequence[Any]) -> list[Any]:
    """16 vectors of 16 words, rows made columns: in pairs, then fours, then quarters of vectors."""

    def shuffle(a: Any, b: Any, lanes: list[int]) -> Any:
        return builder.shuffle_vector(a, b, ir.Constant(_words, lanes))

    quarters = range(0, LANES, 4)
    singles = [[q + i + s for q in quarters for i in (0, 1) for s in (0, LANES)] for _ in range(1)]
    low = singles[0]
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
