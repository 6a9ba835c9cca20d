"""The draw of `engine.draw` for a CPU: the same tokens, but only those are looked at that may win.

Three facts spare most of the work, and none of them is an approximation:

- Noise is finite. A token further below the best than its range can make up for never wins.
- A loud token, one whose noise has the highest top byte (one in 256), beats every token that is
  neither loud nor at least as probable. So all noise but the top bytes is computed only for the
  loud ones and for those no less probable than the most probable loud one.
- A filter that keeps a beginning of the order needs no order. Draw without it; if too many tokens,
  or too much mass, come before the winner, the filter ends before it, and the draw is repeated
  among the tokens before it. The winner among more tokens, if kept, is the winner among the kept.

Everything reads the host; numpy does what torch is slow at on a CPU, which is bools.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.draw import (
    CHUNK,
    WEIGHTLESS,
    Filters,
    chunk_peaks,
    kept_tokens,
    logit_at,
    mass,
    mass_goal,
    sum_of,
)
from engine.random_stream import GROUP, LOUD, MAX_NOISE, MIN_NOISE, NoiseKeys

_BLOCK = 2048  # chunks
_GUESS = 128  # chunks; see `_apply_top_p`
_NO_ID = torch.iinfo(torch.int64).max
_LANES = torch.arange(CHUNK)


@dataclass(frozen=True, slots=True)
class _Rows:
    """What a draw is made from; `best` is NaN, and no comparison holds, if there is no best."""

    logits: Tensor  # (R, C * CHUNK)
    peaks: Tensor  # (R, C): the highest logit of every chunk
    best: Tensor  # (R,)
    temperature: Tensor  # (R,)


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Chunks gathered from some rows, in the order of rows and ids."""

    row: Tensor  # (n,)
    chunk: Tensor  # (n,): the ids from chunk * CHUNK on
    logits: Tensor  # (n, CHUNK)

    def select(self, index: Tensor) -> "_Chunks":
        return _Chunks(self.row[index], self.chunk[index], self.logits.index_select(0, index))

    def blocks(self) -> Iterator["_Chunks"]:
        """Split into what stays in a processor's cache, temporaries included."""
        for start in range(0, len(self.row), _BLOCK):
            part = slice(start, start + _BLOCK)
            yield _Chunks(self.row[part], self.chunk[part], self.logits[part])


def draw_gathered(
    logits: Tensor, temperature: Tensor, keys: NoiseKeys, filters: Filters | None = None
) -> Tensor:
    """Draw as `draw` does; logits (R, C * CHUNK), padded with -inf to whole chunks."""
    if filters is not None and filters.has_typical_p:
        logits, filters = _with_typical_p_applied(logits, temperature, filters)
    peaks = chunk_peaks(logits)
    best = peaks.amax(-1)
    best = best.masked_fill(~best.isfinite(), math.nan)
    rows = _Rows(logits, peaks, best, temperature)
    floor = logit_at(MIN_NOISE - MAX_NOISE, best, temperature)
    if filters is None:
        return _winners(_gather(rows, floor), rows, floor, keys)

    kth = _kth_logit(logits, filters)
    floor = floor.maximum(kth).maximum(logit_at(filters.min_p.log(), best, temperature))
    goal = torch.full_like(temperature, math.inf)
    if filters.has_top_p:
        floor, goal = _apply_top_p(rows, filters, kth, floor)
    near = _gather(rows, floor)
    winners = _winners(near, rows, floor, keys)
    while True:
        least = logits.gather(1, winners[:, None])[:, 0]
        near = near.select(_nonzero(peaks[near.row, near.chunk] >= least[near.row]))
        count, mass_before = _totals(near, rows, _before, winners, least)
        refused = (count >= filters.top_k) | (mass_before >= goal)
        if not refused.any():
            return winners
        near = near.select(_nonzero(refused[near.row]))
        before = _before(near, winners, least).bool()
        near = replace(near, logits=near.logits.masked_fill_(~before, -math.inf))
        winners = _winners(near, rows, floor, keys).where(refused, winners)


def _winners(near: _Chunks, rows: _Rows, floor: Tensor, keys: NoiseKeys) -> Tensor:
    """Find each row's winner (R,) among the gathered tokens not below its floor; 0 if none is."""
    groups = near.chunk[:, None] * (CHUNK // GROUP) + torch.arange(CHUNK // GROUP)
    top = keys.select(near.row).top_bytes(groups)
    loud = _nonzero(top.clone().eq_(LOUD).view(torch.bool))
    logits, row = near.logits.view(-1), near.row[loud // CHUNK]
    bar = floor.scatter_reduce(0, row, logits[loud], "amax")
    probable = torch.from_numpy(near.logits.numpy() >= bar[near.row][:, None].numpy())
    at = torch.cat((loud[logits[loud] >= floor[row]], _nonzero(probable)))

    row, ids = near.row[at // CHUNK], near.chunk[at // CHUNK] * CHUNK + at % CHUNK
    x = (logits[at].double() - rows.best[row]) / rows.temperature[row]
    score = x + keys.select(row).noise(ids, top.view(-1)[at])
    highest = torch.full_like(rows.temperature, -math.inf).scatter_reduce_(0, row, score, "amax")
    ids = ids.where(score == highest[row], _NO_ID)
    winners = torch.full_like(keys.seed, _NO_ID).scatter_reduce_(0, row, ids, "amin")
    return winners.masked_fill_(winners == _NO_ID, 0)


def _before(near: _Chunks, winners: Tensor, least: Tensor) -> Tensor:
    """Find the gathered tokens that precede their row's winner, of logit `least`.

    The result is (n, CHUNK) float32, 0 or 1.
    """
    more = least.nextafter(torch.tensor(math.inf))
    own = (winners // CHUNK)[near.row]
    # Of the winner's equals, those with a lower id precede it: all in the chunks ahead of its
    # own, none in those behind, and some in its own.
    bar = torch.where(near.chunk < own, least[near.row], more[near.row])
    before = near.logits.clone().ge_(bar[:, None])
    mine = _nonzero(near.chunk == own)
    row = near.row[mine]
    equal = near.logits[mine] == least[row][:, None]
    before[mine] += equal & ((winners[row] % CHUNK)[:, None] > _LANES)
    return before


def _apply_top_p(
    rows: _Rows, filters: Filters, kth: Tensor, floor: Tensor
) -> tuple[Tensor, Tensor]:
    """Find the mass (R,) top_p asks for, and a floor (R,), no lower, below which it keeps nothing.

    `kth` (R,) is the logit of the last token within top_k, or -inf.
    """
    near = _gather(rows, kth.maximum(logit_at(WEIGHTLESS, rows.best, rows.temperature)))
    count, total = _totals(near, rows, _at_least, kth)
    # Of the tokens equal to the last within top_k, a few may be without.
    excess = (count - filters.top_k).clamp(min=0)
    excess = excess * mass(kth[:, None], rows.best, rows.temperature)[:, 0]
    goal = mass_goal(filters.top_p, total - excess)

    # Mostly some dozens or hundreds of tokens hold the goal. At a guess, those from a certain peak
    # on: where they do, nothing below it is kept; where they do not, nothing is lost.
    guess = rows.peaks.topk(min(_GUESS, rows.peaks.shape[1])).values[:, -1]
    _, held = _totals(_gather(rows, guess), rows, _at_least, guess)
    return floor.maximum(guess.where(held >= goal, floor)), goal


def _kth_logit(logits: Tensor, filters: Filters) -> Tensor:
    """Find the logit (R,) of the last token within top_k, or -inf where that filter is off."""
    if not filters.largest_top_k:
        return logits.new_full((len(logits),), -math.inf)
    highest = logits.topk(filters.largest_top_k).values
    last = (filters.top_k - 1).clamp(max=filters.largest_top_k - 1)
    kth = highest.gather(1, last[:, None])[:, 0]
    return kth.masked_fill(filters.top_k > filters.largest_top_k, -math.inf)


def _with_typical_p_applied(
    logits: Tensor, temperature: Tensor, filters: Filters
) -> tuple[Tensor, Filters]:
    """Apply all filters, by sorting, to the rows that use typical_p, and turn them off there.

    That order is no order by logit, and the filter too rare to earn a search of its own.
    """
    rows = _nonzero(filters.typical_p < 1)
    some = replace(
        filters,
        top_k=filters.top_k[rows],
        top_p=filters.top_p[rows],
        min_p=filters.min_p[rows],
        typical_p=filters.typical_p[rows],
    )
    kept = kept_tokens(logits[rows], temperature[rows], some)
    logits = logits.index_copy(0, rows, logits[rows].masked_fill_(~kept, -math.inf))
    return logits, replace(
        filters,
        top_k=filters.top_k.index_fill(0, rows, _NO_ID),
        top_p=filters.top_p.index_fill(0, rows, 1),
        min_p=filters.min_p.index_fill(0, rows, 0),
        has_typical_p=False,
    )


def _gather(rows: _Rows, floor: Tensor) -> _Chunks:
    """Gather the chunks with a token that is not below its row's floor (R,)."""
    at, num_chunks = _nonzero(rows.peaks >= floor[:, None]), rows.peaks.shape[1]
    chunks = rows.logits.view(-1, CHUNK)
    if len(at) < len(chunks):
        chunks = chunks.index_select(0, at)
    return _Chunks(at // num_chunks, at % num_chunks, chunks)


def _at_least(near: _Chunks, bar: Tensor) -> Tensor:
    """Compare the gathered logits with a bar (R,): (n, CHUNK) float32, 0 or 1.

    In place, for that makes no bools and takes a quarter of the time.
    """
    return near.logits.clone().ge_(bar[near.row][:, None])


def _totals(
    near: _Chunks, rows: _Rows, kept: Callable[..., Tensor], *bars: Tensor
) -> tuple[Tensor, Tensor]:
    """Add up number and mass of the gathered tokens in `kept(near, *bars)`: (R,) float64, exact."""
    count, total = torch.zeros_like(rows.temperature), torch.zeros_like(rows.temperature)
    for part in near.blocks():
        mask = kept(part, *bars)
        count.index_add_(0, part.row, sum_of(mask))
        masses = mass(part.logits, rows.best[part.row], rows.temperature[part.row])
        total.index_add_(0, part.row, sum_of(masses.mul_(mask)))
    return count, total


def _nonzero(mask: Tensor) -> Tensor:
    """Find where a mask holds, as flat indices; numpy takes a fifth of the time of torch."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))
