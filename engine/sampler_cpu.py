"""The sampler's kernels on a CPU: the same tokens as `engine.draw`, and no sort of a vocabulary.

A row is one task and stays in a core's cache. Four facts spare most of the work, and none of them
is an approximation:

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
maximum or a comparison. Compiled by numba on first use and cached on the disk.
"""

import math
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from engine.cpu_math import Array
from engine.cpu_tasks import Team, counters, finish, take, team, wait
from engine.draw import LOG2_E, MASSLESS, POWERS_OF_TWO, UNIT_BITS, WEIGHTLESS
from engine.random_stream import LOUD, MAX_NOISE, MIN_NOISE, MULTIPLIERS, WEYL, gumbel

MOST_ALTERNATIVES = 64  # that `score` finds: it keeps them in order one by one

_BLOCK = np.uintp(64)  # neighbouring ids
_GROUPS = np.uintp(4)  # of 16 ids a block, whose top bytes come of one counter
_CHUNK = np.uintp(256)  # groups whose words stay in the nearest cache
_LEAST = np.int32(-(2**31))  # no rank is lower
_INFINITE = np.int32(0x7F800000)  # the bits, and the rank, of infinity
_MINUS_INFINITE = np.int32(-0x7F800001)  # the rank
_MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits but the sign
_LOUD = np.uint32(LOUD)
# No noise with a top byte is above this.
_LOUDEST = gumbel(torch.arange(256) << 15 | 0x7FFF).numpy().astype(np.float64)
_QUIET = np.float64(_LOUDEST[LOUD - 1])
_INFINITY = np.float64(np.inf)
_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_M0, _M1 = (np.uint64(value) for value in MULTIPLIERS)
_W0, _W1 = (np.uint64(value) for value in WEYL)
# Added to a float, they leave it rounded to a whole number, ties to even, in its low bits.
_SHIFT, _LONG_SHIFT = np.float32(1.5 * 2**23), np.float64(1.5 * 2**52)
_SHIFT_BITS, _LONG_SHIFT_BITS = _SHIFT.view(np.int32), _LONG_SHIFT.view(np.int64)
_C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(value) for value in POWERS_OF_TWO)

_compiled = numba.njit(nogil=True, boundscheck=False, error_model="numpy")
_kernel = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
_inlined = numba.njit(inline="always")


class _Row(NamedTuple):
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
def _rank(logit: Any) -> Any:
    """Map a logit to a whole number in the same order; both zeros have one rank."""
    bits = np.float32(logit + np.float32(0)).view(np.int32)
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & _MAGNITUDE))


@_inlined
def _logit(rank: Any) -> Any:
    """Invert `_rank`."""
    bits = np.int32(rank ^ np.int32(np.int32(rank >> np.int32(31)) & _MAGNITUDE))
    return np.int32(bits).view(np.float32)


@_inlined
def _rank_at(row: Any, x: Any) -> Any:
    """Find the rank of the logit that lies at x: its rounding cannot exclude a token."""
    return _rank(np.float32(np.float64(row.best) + row.temperature * x))


@_inlined
def _magnitude(logit: Any) -> Any:
    """The bits of a logit without its sign: a NaN has more than infinity."""
    return np.int32(np.float32(logit).view(np.int32) & _MAGNITUDE)


@_inlined
def _is_finite(best: Any, largest: Any) -> Any:
    """Whether a row's highest rank is a finite logit's, and none of its magnitudes a NaN's."""
    return largest <= _INFINITE and best < _INFINITE and best > _MINUS_INFINITE


@_inlined
def _find_peaks(logits: Any, first: Any, size: Any, peaks: Any) -> Any:
    """Find the highest rank of each block and of all; `_LEAST` if that is not a finite logit's."""
    best = _LEAST
    largest = np.int32(0)
    for block in range(np.uintp(len(peaks))):
        start = block * _BLOCK
        peak = _LEAST
        for at in range(first + start, first + min(start + _BLOCK, size)):
            rank = _rank(logits[at])
            peak = rank if rank > peak else peak
            bits = _magnitude(logits[at])
            largest = bits if bits > largest else largest
        peaks[block] = peak
        best = peak if peak > best else best
    return best if _is_finite(best, largest) else _LEAST


@_inlined
def _first_of(logits: Any, first: Any, peaks: Any, rank: Any) -> Any:
    """Find the lowest id that has a rank which is some block's peak."""
    block = np.uintp(0)
    while peaks[block] != rank:
        block += np.uintp(1)
    token = block * _BLOCK
    while _rank(logits[first + token]) != rank:
        token += np.uintp(1)
    return token


@_compiled
def first_best(logits: Any, first: Any, size: Any) -> Any:
    """The lowest id among the best of a row, which begins at `first`, and whether it is finite."""
    best, largest = _LEAST, np.int32(0)
    for at in range(first, first + size):
        rank = _rank(logits[at])
        best = rank if rank > best else best
        bits = _magnitude(logits[at])
        largest = bits if bits > largest else largest
    token = np.uintp(0)
    is_finite = _is_finite(best, largest)
    if is_finite:
        while _rank(logits[first + token]) != best:
            token += np.uintp(1)
    return np.int64(token), is_finite


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
def _weigh(row: Any, rank: Any, before: Any) -> Any:
    """Count and weigh the tokens of higher rank, and those of this one and an id below `before`."""
    count, total = np.int64(0), np.int64(0)
    num_blocks = np.uintp(len(row.peaks))
    block = np.uintp(0)
    while block < num_blocks:
        if row.peaks[block] < rank:
            block += np.uintp(1)
            continue
        # Neighbouring blocks together: a long loop makes better use of vectors.
        start = block * _BLOCK
        while block < num_blocks and row.peaks[block] >= rank:
            block += np.uintp(1)
        stop = min(block * _BLOCK, row.size)
        middle = min(max(start, before), stop)
        for part in range(2):
            begin = start if part == 0 else middle
            end = middle if part == 0 else stop
            bar = np.int32(rank + np.int32(part))
            for at in range(row.first + begin, row.first + end):
                mass = _mass(row.logits[at], row.best, row.scale)
                is_counted = _rank(row.logits[at]) >= bar
                count += np.int64(1) if is_counted else np.int64(0)
                total += mass if is_counted else np.int64(0)
    return count, total


@_compiled
def _end(row: Any, floor: Any, top_k: Any, goal: Any) -> Any:
    """Find where a beginning ends: the first token with `top_k` tokens or a mass before it.

    Returns a rank and an id: the beginning has all of higher rank, and of this those with a lower
    id. What is below the floor may be within.
    """
    low = np.int64(floor) - 1  # it ends before this, or below the floor
    high = np.int64(_rank(row.best))  # but some of this are within
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
        num_before, total = _weigh(row, np.int32(middle), np.uintp(0))
        if middle == high:
            break
        if num_before >= top_k or np.float64(total) >= goal:
            low = middle
        else:
            high = middle
    rank = np.int32(high)
    mass = _mass(_logit(rank), row.best, row.scale)
    for token in range(row.size):
        if _rank(row.logits[row.first + token]) == rank:
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
            start = block * _BLOCK
            for token in range(start, min(start + _BLOCK, row.size)):
                logit = row.logits[row.first + token]
                rank = _rank(logit)
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


@_inlined
def _noise_of(seed: Any, choice: Any, position: Any, token: Any, top: Any) -> Any:
    """Compute the noise of a token from its top byte, float64 of a float32."""
    k0, k1 = seed & _MASK, seed >> _HALF
    c0, c1, c2, c3 = np.uint64(token >> np.uintp(3)), position, choice, np.uint64(1)
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = (p0 >> _HALF) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    word = (token & np.uintp(7)) >> np.uintp(1)
    low = (c0 if word == 0 else c1) if word < 2 else (c2 if word == 2 else c3)
    low = (low >> np.uint64((token & np.uintp(1)) << np.uintp(4))) & np.uint64(0xFFFF)
    k = (np.uint64(top) << np.uint64(15)) | (low >> np.uint64(1))
    u = (np.float64(np.int64(k)) + 0.5) * 2.0**-23
    return np.float64(np.float32(-math.log(-math.log(u))))


@_inlined
def _find_top_bytes(seed: Any, choice: Any, position: Any, groups: Any, words: Any) -> None:
    """Compute the top bytes of groups (n,): words (4, n), four bytes each.

    Round by round over some groups at a time: ten rounds in one loop would be more to compile.
    """
    size = np.uintp(len(groups))
    for start in range(np.uintp(0), size, _CHUNK):
        stop = min(start + _CHUNK, size)
        for i in range(start, stop):
            words[0, i] = groups[i]
            words[1, i] = np.uint32(position)
            words[2, i] = np.uint32(choice)
            words[3, i] = np.uint32(0)
        k0, k1 = seed & _MASK, seed >> _HALF
        for _ in range(10):
            for i in range(start, stop):
                p0, p1 = np.uint64(words[0, i]) * _M0, np.uint64(words[2, i]) * _M1
                words[0, i] = np.uint32((p1 >> _HALF) ^ np.uint64(words[1, i]) ^ k0)
                words[1, i] = np.uint32(p1)
                words[2, i] = np.uint32((p0 >> _HALF) ^ np.uint64(words[3, i]) ^ k1)
                words[3, i] = np.uint32(p0)
            k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK


@_compiled
def _winner_of(
    row: Any, kept: Any, seed: Any, choice: Any, position: Any, groups: Any, words: Any, first: Any
) -> Any:
    """Find the kept token with the highest score, the lowest id among equals."""
    score, winner = -_INFINITY, first
    bar = kept.floor  # below, only the loud may win
    for i in range(np.uintp(0), np.uintp(len(groups)), _GROUPS):
        start = np.uintp(groups[i] // np.uint32(_GROUPS)) * _BLOCK
        found = np.uint32(0)
        for plane in range(np.uintp(4)):
            for j in range(i, i + _GROUPS):
                # Not 0 if some byte is 255.
                word = words[plane, j]
                rest = np.uint32(np.uint32(~word) - np.uint32(0x01010101))
                found |= np.uint32(np.uint32(rest & word) & np.uint32(0x80808080))
        if found == 0 and row.peaks[start // _BLOCK] < bar:
            continue
        for token in range(start, min(start + _BLOCK, row.size)):
            place = token - start
            word = words[(place & np.uintp(15)) >> np.uintp(2), i + (place >> np.uintp(4))]
            top = np.uint32(word >> np.uint32((place & np.uintp(3)) << np.uintp(3))) & _LOUD
            logit = row.logits[row.first + token]
            rank = _rank(logit)
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
            own = x + _noise_of(seed, choice, position, token, top)
            if own > score or (own == score and token < winner):
                score, winner = own, token
                bar = max(kept.floor, _rank_at(row, score - _QUIET))
    return winner


@_inlined
def _draw(
    row: Any, first: Any, seed: Any, choice: Any, position: Any, top_k: Any, top_p: Any,
    log_min_p: Any, typical_p: Any,
) -> Any:  # fmt: skip
    """Draw a token of a row whose best logit is finite; `first` is the lowest id that has it."""
    floor = _rank_at(row, np.float64(log_min_p))
    rank, before = _LEAST, row.size
    if top_k < row.size:
        rank, before = _end(row, _LEAST, top_k, _INFINITY)
    goal = _INFINITY
    if top_p < 1:
        light = _rank_at(row, WEIGHTLESS)  # from here on there is no mass to be summed up
        _, total = _weigh(row, max(rank, light), before if rank >= light else row.size)
        goal = max(top_p * np.float64(total), 0.5)
    mean = np.float64(0)
    if typical_p < 1:
        # The first token may go, so only what has no mass is out of the question.
        floor = max(floor, _rank_at(row, WEIGHTLESS))
        rank, before = _end(row, floor, top_k, goal)
        kept = _Kept(floor, rank, before, mean, _INFINITY, row.size)
        total, _, moment = _weigh_kept(row, kept)
        mean = moment * 16 / np.float64(total)
        goal = max(typical_p * np.float64(total), 0.5)
    else:
        floor = max(floor, _rank_at(row, MIN_NOISE - MAX_NOISE))

    groups = np.empty(np.uintp(len(row.peaks)) * _GROUPS, np.uint32)
    num_groups = np.uintp(0)
    least = max(floor, rank)
    for block in range(np.uintp(len(row.peaks))):
        if row.peaks[block] >= least:
            for i in range(_GROUPS):
                groups[num_groups + i] = np.uint32(block * _GROUPS + i)
            num_groups += _GROUPS
    groups = groups[:num_groups]
    words = np.empty((4, len(groups)), np.uint32)
    _find_top_bytes(seed, choice, position, groups, words)

    distance, nearer = _INFINITY, row.size
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
            rank, before = _rank(logit), winner
            _, total = _weigh(row, rank, before)
        else:
            break
        if np.float64(total) < goal:
            break
    return winner


@_compiled
def _choose_row(
    logits: Any, at: Any, stride: Any, size: Any, temperature: Any, seed: Any, choice: Any,
    position: Any, top_k: Any, top_p: Any, log_min_p: Any, typical_p: Any, token_ids: Any,
    is_finite: Any,
) -> None:  # fmt: skip
    first = at * stride
    peaks = np.empty((size + _BLOCK - np.uintp(1)) // _BLOCK, np.int32)
    best = _find_peaks(logits, first, size, peaks)
    is_finite[at] = best != _LEAST
    token_ids[at] = 0
    if best != _LEAST:
        token = _first_of(logits, first, peaks, best)
        if len(temperature) > 0 and temperature[at] > 0:
            scale = np.float32(LOG2_E / temperature[at])
            row = _Row(logits, first, size, peaks, _logit(best), temperature[at], scale)
            token = _draw(
                row, token, np.uint64(seed[at]), np.uint64(choice[at]), np.uint64(position[at]),
                top_k[at], top_p[at], log_min_p[at], typical_p[at],
            )  # fmt: skip
        token_ids[at] = np.int64(token)


@_kernel
def _choose(
    thread: Any, num_threads: Any, counts: Array, logits: Array, stride: Any, size: Any,
    temperature: Array, seed: Array, choice: Array, position: Array, top_k: Array, top_p: Array,
    log_min_p: Array, typical_p: Array, token_ids: Array, is_finite: Array,
) -> None:  # fmt: skip
    """Choose a token a row; without temperatures, or where one is 0, the first of the best."""
    num_rows = len(token_ids)
    while True:
        row = take(counts, 0)
        if row >= num_rows:
            break
        _choose_row(
            logits, np.uintp(row), np.uintp(stride), np.uintp(size), temperature, seed, choice,
            position, top_k, top_p, log_min_p, typical_p, token_ids, is_finite,
        )  # fmt: skip
        finish(counts, 0)
    wait(counts, 0, num_rows)


@_compiled
def _score_row(
    logits: Any, at: Any, stride: Any, size: Any, token_ids: Any, logprobs: Any, top_ids: Any,
    top_logprobs: Any,
) -> None:  # fmt: skip
    first = at * stride
    num_top = np.uintp(top_ids.shape[1])
    peaks = np.empty((size + _BLOCK - np.uintp(1)) // _BLOCK, np.int32)
    best = _find_peaks(logits, first, size, peaks)
    if best == _LEAST:
        logprobs[at] = np.nan
        for i in range(num_top):
            top_ids[at, i] = i
            top_logprobs[at, i] = np.nan
        return
    row = _Row(logits, first, size, peaks, _logit(best), np.float64(1), np.float32(LOG2_E))
    _, mass = _weigh(row, _rank_at(row, WEIGHTLESS), size)
    highest = -math.log(np.float64(mass) * 2.0**-UNIT_BITS)
    # Differences first: beside an enormous logit the logarithm would vanish.
    below = np.float64(logits[first + np.uintp(token_ids[at])]) - np.float64(row.best)
    logprobs[at] = np.float32(below + highest)
    if num_top == 0:
        return
    rank, before = _end(row, _LEAST, np.int64(num_top), _INFINITY)
    count = np.uintp(0)
    for block in range(np.uintp(len(peaks))):
        if peaks[block] >= rank:
            start = block * _BLOCK
            for token in range(start, min(start + _BLOCK, size)):
                own = _rank(logits[first + token])
                if own > rank or (own == rank and token < before):
                    place = count
                    while place > 0:
                        above = np.uintp(top_ids[at, place - np.uintp(1)])
                        if _rank(logits[first + above]) >= own:
                            break
                        top_ids[at, place] = above
                        place -= np.uintp(1)
                    top_ids[at, place] = token
                    count += np.uintp(1)
    for i in range(num_top):
        below = np.float64(logits[first + np.uintp(top_ids[at, i])]) - np.float64(row.best)
        top_logprobs[at, i] = np.float32(below + highest)


@_kernel
def _score(
    thread: Any, num_threads: Any, counts: Array, logits: Array, stride: Any, size: Any,
    token_ids: Array, logprobs: Array, top_ids: Array, top_logprobs: Array,
) -> None:  # fmt: skip
    """Compute the logprob of a token a row, and the highest of that row."""
    num_rows = len(token_ids)
    while True:
        row = take(counts, 0)
        if row >= num_rows:
            break
        _score_row(
            logits, np.uintp(row), np.uintp(stride), np.uintp(size), token_ids, logprobs, top_ids,
            top_logprobs,
        )  # fmt: skip
        finish(counts, 0)
    wait(counts, 0, num_rows)


class Options(NamedTuple):
    """How rows are drawn, each an array (R,), of one type or the kernel is compiled anew."""

    temperature: Array  # float64; 0 takes the first of the best
    seed: Array  # int64, as are choice, position and top_k
    choice: Array
    position: Array
    top_k: Array  # the vocabulary or more is off
    top_p: Array  # float64, as are the two below
    log_min_p: Array
    typical_p: Array


_NO_FLOATS, _NO_INTEGERS = np.empty(0), np.empty(0, np.int64)
_GREEDY = Options(
    _NO_FLOATS, _NO_INTEGERS, _NO_INTEGERS, _NO_INTEGERS, _NO_INTEGERS, _NO_FLOATS, _NO_FLOATS,
    _NO_FLOATS,
)  # fmt: skip


def choose(logits: Tensor, options: Options | None = None) -> tuple[Tensor, Tensor]:
    """Choose a token id (R,) for each row of logits (R, V) float32; tell which rows are finite.

    With options, the same tokens as `engine.draw.draw`, but where a temperature is 0 the first of
    the best, as everywhere without. A row is finite if its highest logit is; the others get token
    id 0. The options are arrays and not tensors, for which a step has no time.
    """
    token_ids = np.empty(len(logits), np.int64)
    is_finite = np.empty(len(logits), np.bool_)
    _team(len(logits)).run(
        _choose, counters(1), *_memory(logits), *(options or _GREEDY), token_ids, is_finite
    )
    return torch.from_numpy(token_ids), torch.from_numpy(is_finite)


def score(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute logprobs (R,) of tokens (R,), ids and logprobs (R, K) of the most probable ones.

    K is `num_top`, and at most the vocabulary and `MOST_ALTERNATIVES`; logits are (R, V) float32.
    """
    logprobs = np.empty(len(logits), np.float32)
    top_ids = np.empty((len(logits), num_top), np.int64)
    top_logprobs = np.empty((len(logits), num_top), np.float32)
    _team(len(logits)).run(
        _score, counters(1), *_memory(logits), token_ids.numpy(), logprobs, top_ids, top_logprobs
    )
    return (
        torch.from_numpy(logprobs), torch.from_numpy(top_ids), torch.from_numpy(top_logprobs)
    )  # fmt: skip


def _team(num_rows: int) -> Team:
    """A row alone is not worth the other threads' waking."""
    return team(torch.get_num_threads() if num_rows > 1 else 1)


def _memory(logits: Tensor) -> tuple[Array, int, int]:
    """The memory of logits (R, V), the distance of rows in it, and V."""
    num_rows, size = logits.shape
    if logits.is_contiguous():
        whole: Array = logits.numpy()
        return whole.reshape(-1), size, size
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    stride = logits.stride(0)
    # Rows of a wider table are not contiguous, and another type of array would be compiled anew.
    flat = logits.as_strided((max(num_rows - 1, 0) * stride + size * min(num_rows, 1),), (1,))
    memory: Array = flat.numpy()
    return memory, stride, size
