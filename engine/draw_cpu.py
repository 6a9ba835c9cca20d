"""A draw from a row of logits in a CPU's kernels: the tokens of `engine.draw`, and no sort.

Five facts spare most of the work, and none of them changes a token:

- Noise is finite. A token further below the best than its range can make up for never wins.
- A loud token, one whose noise has the highest top byte (one in 256), beats every token that is
  neither loud nor a good deal more probable. So of most noise only the top byte is computed.
- A filter that keeps a beginning of an order needs no order. Draw without it; if too many tokens,
  or too much mass, come before the winner, the filter ends before it, and the draw is repeated
  among the tokens before it. The winner among more tokens, if kept, is the winner among the kept.
- Whether too much mass comes before the winner, an estimate with known bounds nearly always tells.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
import torch

from engine.cpu_math import EXACT
from engine.draw import WEIGHTLESS
from engine.noise_cpu import bits_of, gumbel_of, make_noise, top_byte
from engine.random_stream import LOUD, MAX_NOISE, MIN_NOISE, gumbel
from engine.row_cpu import (
    BLOCK,
    INFINITY,
    LEAST,
    LOST,
    WRONG,
    end_of,
    estimate,
    mass_of,
    rank_at,
    rank_of,
    weigh,
)

_LOUD = np.uint64(LOUD)
# No noise with a top byte is above this, and no loud noise with the byte of its bits that follows.
_HIGHEST = gumbel(torch.arange(256) << 15 | 0x7FFF).numpy().astype(np.float64)
_HIGHEST_LOUD = gumbel(LOUD << 15 | torch.arange(256) << 7 | 0x7F).numpy().astype(np.float64)
_QUIET = np.float64(_HIGHEST[LOUD - 1])

_compiled = numba.njit(**EXACT)
_inlined = numba.njit(inline="always")


class _Kept(NamedTuple):
    """Which tokens are drawn from: no rank below a floor, before one token, and nearer than one."""

    floor: Any
    rank: Any  # before the token `before`, which has this rank
    before: Any
    mean: Any  # of x, for typical_p
    distance: Any  # from it: nearer than the token `nearer`, which has this distance
    nearer: Any


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
                    mass = mass_of(logit, row.best, row.scale)
                    x = (np.float64(logit) - np.float64(row.best)) / row.temperature
                    distance = abs(x - kept.mean)
                    total += mass
                    moment += np.rint(np.float64(mass) * max(x, 2 * WEIGHTLESS) / 16)
                    is_nearer = distance < kept.distance
                    if is_nearer or (distance == kept.distance and token < kept.nearer):
                        nearer += mass
    return total, nearer, moment


@_inlined
def _x_of(row: Any, token: Any) -> Any:
    return (np.float64(row.logits[row.first + token]) - np.float64(row.best)) / row.temperature


@_compiled
def _is_kept(row: Any, kept: Any, token: Any, x: Any) -> Any:
    rank = rank_of(row.logits[row.first + token])
    is_early = rank > kept.rank or (rank == kept.rank and token < kept.before)
    distance = abs(x - kept.mean)
    is_near = distance < kept.distance or (distance == kept.distance and token < kept.nearer)
    return rank >= kept.floor and is_early and is_near


@_compiled
def _winner_of(row: Any, kept: Any, noise: Any, reach: Any, first: Any) -> Any:
    """Find the kept token with the highest score, the lowest id among equals.

    The loud first, none of whose scores is above its reach: they tell which others may win.
    """
    score, winner = -INFINITY, first
    for i in range(np.uintp(len(reach))):
        token = np.uintp(noise.loud[i])
        x = _x_of(row, token)
        if reach[i] >= score and _is_kept(row, kept, token, x):
            own = x + gumbel_of(noise.bits[i])
            if own > score or (own == score and token < winner):
                score, winner = own, token
    least = max(kept.floor, kept.rank)
    bar = max(least, rank_at(row, score - _QUIET))
    for block in range(np.uintp(len(row.peaks))):
        if row.peaks[block] < bar:
            continue
        start = block * BLOCK
        for at in range(start, min(start + BLOCK, row.size)):
            token = np.uintp(at)
            if rank_of(row.logits[row.first + token]) < bar:
                continue
            top = top_byte(noise.tops, token)
            x = _x_of(row, token)
            if top == _LOUD or x + _HIGHEST[top] < score or not _is_kept(row, kept, token, x):
                continue
            own = x + gumbel_of(bits_of(noise.key, token, top))
            if own > score or (own == score and token < winner):
                score, winner = own, token
                bar = max(least, rank_at(row, score - _QUIET))
    return winner


@_compiled
def _goal_of(row: Any, rank: Any, before: Any, top_p: Any) -> Any:
    """Compute the mass that top_p allows before a token, of those before one of that rank."""
    light = rank_at(row, WEIGHTLESS)  # from here on there is no mass to be summed up
    _, total = weigh(row, max(rank, light), before if rank >= light else row.size)
    return max(top_p * np.float64(total), 0.5)


@_inlined
def draw_token(
    row: Any, first: Any, key: Any, top_k: Any, top_p: Any, log_min_p: Any, typical_p: Any
) -> Any:  # fmt: skip
    """Draw a token of a row whose best logit is finite; `first` is the lowest id that has it."""
    floor = rank_at(row, np.float64(log_min_p))
    rank, before = LEAST, row.size
    has_top_k = top_k < row.size
    if has_top_k:
        rank, before = end_of(row, LEAST, top_k, INFINITY)
    goal = INFINITY  # not known yet
    if top_p < 1 and (has_top_k or typical_p < 1):
        goal = _goal_of(row, rank, before, top_p)
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

    noise = make_noise(key, row.size)
    reach = np.empty(len(noise.loud))
    for i in range(np.uintp(len(reach))):
        following = np.uintp(noise.bits[i] >> np.uint64(7)) & np.uintp(255)
        reach[i] = _x_of(row, np.uintp(noise.loud[i])) + _HIGHEST_LOUD[following]

    distance, nearer = INFINITY, row.size
    winner = first
    while True:
        kept = _Kept(floor, rank, before, mean, distance, nearer)
        winner = _winner_of(row, kept, noise, reach, first)
        logit = row.logits[row.first + winner]
        if typical_p < 1:
            distance, nearer = abs(_x_of(row, winner) - mean), winner
            kept = _Kept(floor, rank, before, mean, distance, nearer)
            _, total, _ = _weigh_kept(row, kept)
        elif top_p < 1:
            rank, before = rank_of(logit), winner
            if goal == INFINITY:
                total, early = estimate(row, logit, winner)
                excess, doubt = early - top_p * total, WRONG * (early + top_p * total) + LOST
                if excess < -doubt:
                    break
                if excess > doubt:
                    continue
                goal = _goal_of(row, LEAST, row.size, top_p)
            _, total = weigh(row, rank, before)
        else:
            break
        if np.float64(total) < goal:
            break
    return winner
