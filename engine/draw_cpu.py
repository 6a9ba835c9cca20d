"""A draw from one row of logits in a CPU's kernels: the tokens of `engine.draw`, and no sort.

Four facts spare most of the work, and none of them is an approximation:

- The highest logit of every 64 neighbouring ids, which the search for the best finds anyway, tells
  which ids a threshold leaves out.
- Noise is finite. A token further below the best than its range can make up for never wins.
- A loud token, one whose noise has the highest top byte (one in 256), beats every token that is
  neither loud nor a good deal more probable. So of most noise only the top byte is computed, which
  is a sixteenth of a block of the generator.
- A filter that keeps a beginning of an order needs no order. Draw without it; if too many tokens,
  or too much mass, come before the winner, the filter ends before it, and the draw is repeated
  among the tokens before it. The winner among more tokens, if kept, is the winner among the kept.

Masses are whole numbers and add up to the same in any order; everything else is elementwise, a
maximum or a comparison.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
import torch

from engine.cpu_math import EXACT
from engine.draw import MASSLESS, POWERS_OF_TWO, UNIT_BITS, WEIGHTLESS
from engine.noise_cpu import find_top_bytes, noise_of
from engine.random_stream import LOUD, MAX_NOISE, MIN_NOISE, gumbel

BLOCK = np.uintp(64)  # neighbouring ids
GROUPS = np.uintp(4)  # of 16 ids a block, whose top bytes come of one counter
LEAST = np.int32(-(2**31))  # no rank is lower
_INFINITE = np.int32(0x7F800000)  # the bits, and the rank, of infinity
_MINUS_INFINITE = np.int32(-0x7F800001)  # the rank
_MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits but the sign
_LOUD = np.uint32(LOUD)
# No noise with a top byte is above this.
_LOUDEST = gumbel(torch.arange(256) << 15 | 0x7FFF).numpy().astype(np.float64)
_QUIET = np.float64(_LOUDEST[LOUD - 1])
INFINITY = np.float64(np.inf)
# Added to a float, they leave it rounded to a whole number, ties to even, in its low bits.
_SHIFT, _LONG_SHIFT = np.float32(1.5 * 2**23), np.float64(1.5 * 2**52)
_SHIFT_BITS, _LONG_SHIFT_BITS = _SHIFT.view(np.int32), _LONG_SHIFT.view(np.int64)
_C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(value) for value in POWERS_OF_TWO)

_compiled = numba.njit(**EXACT)
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


class _Kept(NamedTuple):
    """Which tokens are drawn from: no rank below a floor, before one token, and nearer than one."""

    floor: Any
    rank: Any  # before the token `before`, which has this rank
    before: Any
    mean: Any  # of x, for typical_p
    distance: Any  # from it: nearer than the token `nearer`, which has this distance
    nearer: Any


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
def find_peaks(logits: Any, first: Any, size: Any, peaks: Any) -> Any:
    """Find the highest rank of each block and of all; `LEAST` if that is not a finite logit's."""
    best = LEAST
    largest = np.int32(0)
    for block in range(np.uintp(len(peaks))):
        start = block * BLOCK
        peak = LEAST
        for at in range(first + start, first + min(start + BLOCK, size)):
            rank = rank_of(logits[at])
            peak = rank if rank > peak else peak
            bits = magnitude(logits[at])
            largest = bits if bits > largest else largest
        peaks[block] = peak
        best = peak if peak > best else best
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
def _mass(logit: Any, best: Any, scale: Any) -> Any:
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
                mass = _mass(row.logits[at], row.best, row.scale)
                is_counted = rank_of(row.logits[at]) >= bar
                count += np.int64(1) if is_counted else np.int64(0)
                total += mass if is_counted else np.int64(0)
    return count, total


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
        num_before, total = weigh(row, np.int32(middle), np.uintp(0))
        if middle == high:
            break
        if num_before >= top_k or np.float64(total) >= goal:
            low = middle
        else:
            high = middle
    rank = np.int32(high)
    mass = _mass(logit_of(rank), row.best, row.scale)
    for token in range(row.size):
        if rank_of(row.logits[row.first + token]) == rank:
            if num_before >= top_k or np.float64(total) >= goal:
                return rank, token
            num_before += 1
            total += mass
    return rank, row.size


@_compiled
def _weigh_kept(row: Any, kept: Any) -> Any:
    """Weigh what is kept, whatever its distance; the nearer ones; and sum up mass times x / 16."""
    total, nearer, moment = np.int64(0), np.int64(0), np.float64(0)
    for block in range(np.uintp(len(row.peaks))):
        if row.peaks[block] >= kept.floor:
            start = block * BLOCK
            for token in range(start, min(start + BLOCK, row.size)):
                logit = row.logits[row.first + token]
                rank = rank_of(logit)
                is_early = rank > kept.rank or (rank == kept.rank and token < kept.before)
                if rank >= kept.floor and is_early:
                    mass = _mass(logit, row.best, row.scale)
                    x = (np.float64(logit) - np.float64(row.best)) / row.temperature
                    distance = abs(x - kept.mean)
                    total += mass
                    moment += np.rint(np.float64(mass) * max(x, 2 * WEIGHTLESS) / 16)
                    is_nearer = distance < kept.distance
                    if is_nearer or (distance == kept.distance and token < kept.nearer):
                        nearer += mass
    return total, nearer, moment


@_compiled
def _winner_of(
    row: Any, kept: Any, seed: Any, choice: Any, position: Any, groups: Any, words: Any, first: Any
) -> Any:
    """Find the kept token with the highest score, the lowest id among equals."""
    score, winner = -INFINITY, first
    bar = kept.floor  # below, only the loud may win
    for i in range(np.uintp(0), np.uintp(len(groups)), GROUPS):
        start = np.uintp(groups[i] // np.uint32(GROUPS)) * BLOCK
        found = np.uint32(0)
        for plane in range(np.uintp(4)):
            for j in range(i, i + GROUPS):
                # Not 0 if some byte is 255.
                word = words[plane, j]
                rest = np.uint32(np.uint32(~word) - np.uint32(0x01010101))
                found |= np.uint32(np.uint32(rest & word) & np.uint32(0x80808080))
        if found == 0 and row.peaks[start // BLOCK] < bar:
            continue
        for token in range(start, min(start + BLOCK, row.size)):
            place = token - start
            word = words[(place & np.uintp(15)) >> np.uintp(2), i + (place >> np.uintp(4))]
            top = np.uint32(word >> np.uint32((place & np.uintp(3)) << np.uintp(3))) & _LOUD
            logit = row.logits[row.first + token]
            rank = rank_of(logit)
            if top != _LOUD and rank < bar:
                continue
            is_early = rank > kept.rank or (rank == kept.rank and token < kept.before)
            if rank < kept.floor or not is_early:
                continue
            x = (np.float64(logit) - np.float64(row.best)) / row.temperature
            if x + _LOUDEST[np.uintp(top)] < score:
                continue
            distance = abs(x - kept.mean)
            is_nearer = distance < kept.distance
            if not (is_nearer or (distance == kept.distance and token < kept.nearer)):
                continue
            own = x + noise_of(seed, choice, position, token, top)
            if own > score or (own == score and token < winner):
                score, winner = own, token
                bar = max(kept.floor, rank_at(row, score - _QUIET))
    return winner


@_inlined
def draw_token(
    row: Any, first: Any, seed: Any, choice: Any, position: Any, top_k: Any, top_p: Any,
    log_min_p: Any, typical_p: Any,
) -> Any:  # fmt: skip
    """Draw a token of a row whose best logit is finite; `first` is the lowest id that has it."""
    floor = rank_at(row, np.float64(log_min_p))
    rank, before = LEAST, row.size
    if top_k < row.size:
        rank, before = end_of(row, LEAST, top_k, INFINITY)
    goal = INFINITY
    if top_p < 1:
        light = rank_at(row, WEIGHTLESS)  # from here on there is no mass to be summed up
        _, total = weigh(row, max(rank, light), before if rank >= light else row.size)
        goal = max(top_p * np.float64(total), 0.5)
    mean = np.float64(0)
    if typical_p < 1:
        # The first token may go, so only what has no mass is out of the question.
        floor = max(floor, rank_at(row, WEIGHTLESS))
        rank, before = end_of(row, floor, top_k, goal)
        kept = _Kept(floor, rank, before, mean, INFINITY, row.size)
        total, _, moment = _weigh_kept(row, kept)
        mean = moment * 16 / np.float64(total)
        goal = max(typical_p * np.float64(total), 0.5)
    else:
        floor = max(floor, rank_at(row, MIN_NOISE - MAX_NOISE))

    groups = np.empty(np.uintp(len(row.peaks)) * GROUPS, np.uint32)
    num_groups = np.uintp(0)
    least = max(floor, rank)
    for block in range(np.uintp(len(row.peaks))):
        if row.peaks[block] >= least:
            for i in range(GROUPS):
                groups[num_groups + i] = np.uint32(block * GROUPS + i)
            num_groups += GROUPS
    groups = groups[:num_groups]
    words = np.empty((4, len(groups)), np.uint32)
    find_top_bytes(seed, choice, position, groups, words)

    distance, nearer = INFINITY, row.size
    winner = first
    while True:
        kept = _Kept(floor, rank, before, mean, distance, nearer)
        winner = _winner_of(row, kept, seed, choice, position, groups, words, first)
        logit = row.logits[row.first + winner]
        if typical_p < 1:
            x = (np.float64(logit) - np.float64(row.best)) / row.temperature
            distance, nearer = abs(x - mean), winner
            kept = _Kept(floor, rank, before, mean, distance, nearer)
            _, total, _ = _weigh_kept(row, kept)
        elif top_p < 1:
            rank, before = rank_of(logit), winner
            _, total = weigh(row, rank, before)
        else:
            break
        if np.float64(total) < goal:
            break
    return winner
