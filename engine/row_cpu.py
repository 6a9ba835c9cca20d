"""A row of logits in a CPU's kernels: ranks, masses, beginnings of its order; knows no noise.

The highest rank of every 64 neighbouring ids, which the search for the best finds anyway, tells
which ids a threshold leaves out. Masses are whole numbers and add up to the same in any order;
everything else is elementwise, a maximum or a comparison, but for estimates with known bounds.
"""

from typing import Any, NamedTuple

import numba
import numpy as np

from engine.cpu_math import EXACT
from engine.draw import MASSLESS, POWERS_OF_TWO, UNIT_BITS

BLOCK = np.uintp(64)  # neighbouring ids
LEAST = np.int32(-(2**31))  # no rank is lower
_INFINITE = np.int32(0x7F800000)  # the bits, and the rank, of infinity
_MINUS_INFINITE = np.int32(-0x7F800001)  # the rank
_MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits but the sign
INFINITY = np.float64(np.inf)
# Added to a float, they leave it rounded to a whole number, ties to even, in its low bits.
_SHIFT, _LONG_SHIFT = np.float32(1.5 * 2**23), np.float64(1.5 * 2**52)
_SHIFT_BITS, _LONG_SHIFT_BITS = _SHIFT.view(np.int32), _LONG_SHIFT.view(np.int64)
_C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(value) for value in POWERS_OF_TWO)

_TERM = np.uintp(1024)  # tokens whose estimated masses are added up in float32
# The most that an estimate is wrong by, as a part of itself: 0.0008 by its polynomial and 0.0001 by
# the order of its sum, whichever; and beside that, of the first token's mass: by what is rounded to
# whole units or was less than any.
WRONG, LOST = 0.001, 1e-5

_compiled = numba.njit(**EXACT)
# Sums in any order: nothing else in such a function may depend on it.
_reordered = numba.njit(**EXACT, fastmath={"reassoc"})
_contracted = numba.njit(**EXACT, fastmath={"contract"})
_inlined = numba.njit(inline="always")


class Row(NamedTuple):
    """What a token is drawn from, and what is known of it."""

    logits: Any  # float32, rows one behind the other
    first: Any  # where this one begins
    size: Any  # the vocabulary
    peaks: Any  # (blocks,): the highest rank of each
    best: Any  # the highest logit, float32
    temperature: Any  # float64
    scale: Any  # log2(e) / temperature, float32


# Indices are unsigned: one that might be negative keeps a loop from being vectorised. What is used
# in one place is inlined early: LLVM works on a function again for each one that calls it.


@_inlined
def rank_of(logit: Any) -> Any:
    """Map a logit to a whole number in the same order; both zeros have one rank."""
    bits = np.float32(logit + np.float32(0)).view(np.int32)
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & _MAGNITUDE))


@_inlined
def logit_of(rank: Any) -> Any:
    """Invert `rank_of`."""
    bits = np.int32(rank ^ np.int32(np.int32(rank >> np.int32(31)) & _MAGNITUDE))
    return np.int32(bits).view(np.float32)


@_inlined
def rank_at(row: Any, x: Any) -> Any:
    """Find the rank of the logit that lies at x: its rounding cannot exclude a token."""
    return rank_of(np.float32(np.float64(row.best) + row.temperature * x))


@_inlined
def magnitude(logit: Any) -> Any:
    """The bits of a logit without its sign: a NaN has more than infinity."""
    return np.int32(np.float32(logit).view(np.int32) & _MAGNITUDE)


@_inlined
def is_finite_row(best: Any, largest: Any) -> Any:
    """Whether a row's highest rank is a finite logit's, and none of its magnitudes a NaN's."""
    return largest <= _INFINITE and best < _INFINITE and best > _MINUS_INFINITE


@_inlined
def _highest(logits: Any, begin: Any, end: Any) -> Any:
    """Find the highest rank and the largest magnitude from one place to another."""
    peak, largest = LEAST, np.int32(0)
    for at in range(begin, end):
        rank = rank_of(logits[at])
        peak = rank if rank > peak else peak
        bits = magnitude(logits[at])
        largest = bits if bits > largest else largest
    return peak, largest


@_inlined
def find_peaks(logits: Any, first: Any, size: Any, peaks: Any) -> Any:
    """Find the highest rank of each block and of all; `LEAST` if that is not a finite logit's."""
    best, largest = LEAST, np.int32(0)
    num_whole = size // BLOCK  # a loop over as many tokens as a block has needs no other beside it
    for block in range(np.uintp(len(peaks))):
        start = first + block * BLOCK
        if block < num_whole:
            peak, bits = _highest(logits, start, start + BLOCK)
        else:
            peak, bits = _highest(logits, start, first + size)
        peaks[block] = peak
        best = peak if peak > best else best
        largest = bits if bits > largest else largest
    return best if is_finite_row(best, largest) else LEAST


@_inlined
def first_of(logits: Any, first: Any, peaks: Any, rank: Any) -> Any:
    """Find the lowest id that has a rank which is some block's peak."""
    block = np.uintp(0)
    while peaks[block] != rank:
        block += np.uintp(1)
    token = block * BLOCK
    while rank_of(logits[first + token]) != rank:
        token += np.uintp(1)
    return token


@_compiled
def mass_of(logit: Any, best: Any, scale: Any) -> Any:
    """Compute `engine.draw.mass` of one token, operation by operation."""
    power = np.float32(np.float32(logit - best) * scale)
    power = MASSLESS if power < MASSLESS else power
    shifted = np.float32(power + _SHIFT)
    rest = np.float32(power - np.float32(shifted - _SHIFT))
    y = np.float32(np.float32(_C6 * rest) + _C5)
    y = np.float32(np.float32(y * rest) + _C4)
    y = np.float32(np.float32(y * rest) + _C3)
    y = np.float32(np.float32(y * rest) + _C2)
    y = np.float32(np.float32(y * rest) + _C1)
    y = np.float32(np.float32(y * rest) + np.float32(1))
    whole = np.int32(np.float32(shifted).view(np.int32) - _SHIFT_BITS)
    bits = np.int32(np.int32(whole + np.int32(UNIT_BITS + 127)) << np.int32(23))
    units = np.float64(np.float32(y * np.int32(bits).view(np.float32)))
    return np.int64(np.float64(units + _LONG_SHIFT).view(np.int64) - _LONG_SHIFT_BITS)


@_compiled
def weigh(row: Any, rank: Any, before: Any) -> Any:
    """Count and weigh the tokens of higher rank, and those of this one and an id below `before`."""
    count, total = np.int64(0), np.int64(0)
    num_blocks = np.uintp(len(row.peaks))
    block = np.uintp(0)
    while block < num_blocks:
        if row.peaks[block] < rank:
            block += np.uintp(1)
            continue
        # Neighbouring blocks together: a long loop makes better use of vectors.
        start = block * BLOCK
        while block < num_blocks and row.peaks[block] >= rank:
            block += np.uintp(1)
        stop = min(block * BLOCK, row.size)
        middle = min(max(start, before), stop)
        for part in range(2):
            begin = start if part == 0 else middle
            end = middle if part == 0 else stop
            bar = np.int32(rank + np.int32(part))
            for at in range(row.first + begin, row.first + end):
                mass = mass_of(row.logits[at], row.best, row.scale)
                is_counted = rank_of(row.logits[at]) >= bar
                count += np.int64(1) if is_counted else np.int64(0)
                total += mass if is_counted else np.int64(0)
    return count, total


@_contracted
def _estimate_mass(logit: Any, best: Any, scale: Any) -> Any:
    """Estimate the mass of a token as a part of the first's: `mass_of` with half its terms."""
    power = np.float32(np.float32(logit - best) * scale)
    power = MASSLESS if power < MASSLESS else power
    shifted = np.float32(power + _SHIFT)
    rest = np.float32(power - np.float32(shifted - _SHIFT))
    y = np.float32(np.float32(_C3 * rest) + _C2)
    y = np.float32(np.float32(y * rest) + _C1)
    y = np.float32(np.float32(y * rest) + np.float32(1))
    bits = np.int32(np.float32(shifted).view(np.int32) << np.int32(23))
    return np.int32(np.float32(y).view(np.int32) + bits).view(np.float32)


@_reordered
def estimate(row: Any, logit: Any, before: Any) -> Any:
    """Estimate the mass of all tokens, and of those before one, as parts of the first token's."""
    total, early = np.float64(0), np.float64(0)
    for part in range(2):
        begin = np.uintp(0) if part == 0 else before
        end = before if part == 0 else row.size
        # Lower ids come before the token if they are its equals.
        bar = logit if part == 0 else np.nextafter(logit, np.float32(np.inf))
        for start in range(begin, end, _TERM):
            some, early_some = np.float32(0), np.float32(0)
            for at in range(row.first + start, row.first + min(start + _TERM, end)):
                mass = _estimate_mass(row.logits[at], row.best, row.scale)
                some += mass
                early_some += mass if row.logits[at] >= bar else np.float32(0)
            total += np.float64(some)
            early += np.float64(early_some)
    return total, early


@_compiled
def _count(row: Any, rank: Any) -> Any:
    """Count the tokens of higher rank."""
    count = np.int64(0)
    for block in range(np.uintp(len(row.peaks))):
        if row.peaks[block] > rank:
            start = row.first + block * BLOCK
            some = np.int32(0)
            for at in range(start, min(start + BLOCK, row.first + row.size)):
                some += np.int32(1) if rank_of(row.logits[at]) > rank else np.int32(0)
            count += some
    return count


@_compiled
def end_of(row: Any, floor: Any, top_k: Any, goal: Any) -> Any:
    """Find where a beginning ends: the first token with `top_k` tokens or a mass before it.

    Returns a rank and an id: the beginning has all of higher rank, and of this those with a lower
    id. What is below the floor may be within.
    """
    low = np.int64(floor) - 1  # it ends before this, or below the floor
    high = np.int64(rank_of(row.best))  # but some of this are within
    if top_k <= len(row.peaks):
        # So many of the blocks' peaks are so many tokens.
        end = high + 1
        while end - low > 1:
            middle = (low + end) >> 1
            rank = np.int32(middle)
            count = np.int64(0)
            for block in range(np.uintp(len(row.peaks))):
                count += np.int64(1) if row.peaks[block] >= rank else np.int64(0)
            if count >= top_k:
                low = middle
            else:
                end = middle
        low -= 1
    total = np.int64(0)
    num_before = np.int64(0)
    while True:
        middle = (low + high) >> 1 if high - low > 1 else high
        if goal == INFINITY:
            num_before = _count(row, np.int32(middle))
        else:
            num_before, total = weigh(row, np.int32(middle), np.uintp(0))
        if middle == high:
            break
        if num_before >= top_k or np.float64(total) >= goal:
            low = middle
        else:
            high = middle
    rank = np.int32(high)
    mass = mass_of(logit_of(rank), row.best, row.scale)
    for block in range(np.uintp(len(row.peaks))):
        if row.peaks[block] >= rank:
            start = block * BLOCK
            for token in range(start, min(start + BLOCK, row.size)):
                if rank_of(row.logits[row.first + token]) == rank:
                    if num_before >= top_k or np.float64(total) >= goal:
                        return rank, token
                    num_before += 1
                    total += mass
    return rank, row.size
