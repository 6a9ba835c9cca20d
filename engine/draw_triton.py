"""The draw of `engine.draw` on a GPU: noise, maximum and filters of a row, without a sort.

In torch it is some hundred operations on whole rows, each a kernel that writes 100 MB for 256 rows.

A filter that keeps a beginning of an order needs no order. A row is drawn from without filters, in
parts, by as many programs as there are parts. Then one program a row looks whether the winner is
kept: whether too much mass comes before it. If it is not, the program draws among the tokens that
come before it, with the same noise, and looks again. The winner among more tokens, if kept, is the
winner among the kept; the first token always is kept, so this ends. The highest logit of each chunk
of ids tells which chunks a look must read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine import draw as definition
from engine.draw import CHUNK, Filters, chunk_peaks
from engine.random_stream import MAX_NOISE, NoiseKeys

_IDS = 1024  # of one row that a program looks at, or draws from at a time
_WEIGHED_IDS = 4096  # that are counted or weighed at a time, of one row
_CHUNK = tl.constexpr(CHUNK)
# Below this x, even the loudest noise loses to the faintest at x = 0.
_NO_CHANCE = tl.constexpr(-19.5)
_MAX_NOISE = tl.constexpr(MAX_NOISE)
_WEIGHTLESS = tl.constexpr(definition.WEIGHTLESS)
_LOG2_E = tl.constexpr(definition.LOG2_E)
_MASSLESS = tl.constexpr(float(definition.MASSLESS))
_EXPONENT_OF_UNITS = tl.constexpr(definition.UNIT_BITS + 127)
_C1, _C2, _C3, _C4, _C5, _C6 = (tl.constexpr(value) for value in definition.POWERS_OF_TWO)


def draw(
    logits: Tensor, temperature: Tensor, keys: NoiseKeys, filters: Filters | None = None
) -> Tensor:
    """Draw a token id (R,) for each row of logits (R, V) float32 and temperatures (R,) float64.

    The same as `engine.draw.draw`, which does it where a row has typical_p. A row without a finite
    highest logit gets some id.
    """
    if filters is not None and filters.has_typical_p:
        return definition.draw(logits, temperature, keys, filters)
    num_rows, vocab_size = logits.shape
    num_parts = triton.cdiv(vocab_size, _IDS)
    heights = None if filters is None else chunk_peaks(logits)
    best = logits.amax(-1) if heights is None else heights.amax(-1)
    peaks = torch.empty(num_rows, num_parts, dtype=torch.float64, device=logits.device)
    ids = torch.empty(num_rows, num_parts, dtype=torch.int64, device=logits.device)
    row = (
        logits, best, temperature.contiguous(), keys.seed.contiguous(),
        keys.choice.contiguous(), keys.position.contiguous(),
    )  # fmt: skip
    # Without fused multiplication and addition: a mass is rounded at every step, and the noise
    # must be the same in both kernels.
    _draw_kernel[(num_rows, num_parts)](
        *row, peaks, ids, vocab_size, logits.stride(0),
        IDS=_IDS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    winners = ids.gather(1, peaks.argmax(-1, keepdim=True))[:, 0]
    if filters is not None and heights is not None:
        num_chunks = heights.shape[1]
        listed = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=logits.device)
        _filter_kernel[(num_rows,)](
            *row, heights, listed, filters.top_k.contiguous(), filters.top_p.contiguous(),
            filters.min_p.contiguous(), winners, vocab_size, num_chunks, logits.stride(0),
            CHUNKS=max(32, triton.next_power_of_2(num_chunks)), IDS=_IDS, TILE=_WEIGHED_IDS,
            num_warps=16, enable_fp_fusion=False,
        )  # fmt: skip
    return winners


@triton.jit
def _words(w0, w1, w2, w3, NUM: tl.constexpr):
    """Put the words (NUM,) of counters side by side: (NUM, 4)."""
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (NUM, 4))


@triton.jit
def _noise(seed, choice, position, group, GROUPS: tl.constexpr):
    """Compute the noise of all ids of some groups (GROUPS,) of 16, in order; float64.

    The 23 bits of an id lie as `NoiseKeys` says. A group has one counter for its top bytes and two
    for its low bits; computed id by id, they would cost more than the rest of a draw.
    """
    choice = choice.to(tl.uint32)
    position = position.to(tl.uint32)
    none = tl.zeros((GROUPS,), tl.uint32)
    group = group.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, group, none + position, none + choice, none)
    words = _words(w0, w1, w2, w3, GROUPS)
    shift = (8 * tl.arange(0, 4)).to(tl.uint32)
    top = tl.reshape((words[:, :, None] >> shift[None, None, :]) & 0xFF, (GROUPS * 16,))
    half = tl.reshape(tl.join(2 * group, 2 * group + 1), (2 * GROUPS,))
    none = tl.zeros((2 * GROUPS,), tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, half, none + position, none + choice, none + 1)
    words = _words(w0, w1, w2, w3, 2 * GROUPS)
    shift = (16 * tl.arange(0, 2) + 1).to(tl.uint32)
    low = tl.reshape((words[:, :, None] >> shift[None, None, :]) & 0x7FFF, (GROUPS * 16,))
    k = ((top << 15) | low).to(tl.float64)
    noise = -tl.log(-tl.log((k + 0.5) * 1.1920928955078125e-07))  # 2^-23
    return noise.to(tl.float32).to(tl.float64)


# Specialised to the addresses of the keys, it would be another program for one row than for two.
@triton.jit(
    do_not_specialize_on_alignment=["temperatures", "seeds", "choices", "positions", "best"]
)
def _draw_kernel(
    logits, best, temperatures, seeds, choices, positions, peaks, ids, num_ids, logits_stride,
    IDS: tl.constexpr,
):  # fmt: skip
    """Find the highest x + noise among some ids of one row, and the lowest id that has it."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at = row * tl.num_programs(1) + part
    token = part * IDS + tl.arange(0, IDS)
    is_token = token < num_ids
    logit = tl.load(logits + row * logits_stride + token, mask=is_token, other=float("-inf"))
    x = (logit.to(tl.float64) - tl.load(best + row).to(tl.float64)) / tl.load(temperatures + row)
    highest = tl.max(x, 0)
    token_of_highest = part * IDS
    if highest > _NO_CHANCE:
        seed, choice = tl.load(seeds + row), tl.load(choices + row)
        group = part * (IDS // 16) + tl.arange(0, IDS // 16)
        x += _noise(seed, choice, tl.load(positions + row), group, IDS // 16)
        highest = tl.max(x, 0)
        token_of_highest = tl.min(tl.where(x == highest, token, num_ids - 1), 0)
    tl.store(peaks + at, highest)
    tl.store(ids + at, token_of_highest.to(tl.int64))


@triton.jit(
    do_not_specialize_on_alignment=[
        "temperatures", "seeds", "choices", "positions", "best", "top_ks", "top_ps", "min_ps",
        "winners",
    ]
)  # fmt: skip
def _filter_kernel(
    logits, best, temperatures, seeds, choices, positions, heights, listed, top_ks, top_ps, min_ps,
    winners, num_ids, num_chunks, logits_stride,
    CHUNKS: tl.constexpr, IDS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Replace the winner of one row, drawn without filters, by the one among the kept tokens.

    An end in the order is a logit and an id: what has a higher logit comes before it, and what has
    this one and a lower id. `heights` are the highest logits of chunks; `listed` is scratch.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    heights += row * num_chunks
    listed += row * num_chunks
    highest = tl.load(best + row)
    top_k = tl.maximum(tl.load(top_ks + row), 1)  # rows that pad a batch have 0
    top_p = tl.load(top_ps + row)
    min_p = tl.load(min_ps + row)
    is_filtered = (top_k < num_ids) | (top_p < 1) | (min_p > 0)
    # A NaN anywhere in the row is its highest, too.
    if is_filtered & (highest > float("-inf")) & (highest < float("inf")):
        temperature = tl.load(temperatures + row)
        scale = (tl.full((), _LOG2_E, tl.float64) / temperature).to(tl.float32)
        light = _logit_at(tl.full((), _WEIGHTLESS, tl.float64), highest, temperature)
        floor = tl.full((), float("-inf"), tl.float32)
        if min_p > 0:
            floor = _logit_at(tl.log(min_p), highest, temperature)
        # What has no chance beside the first token, which is kept, need not be looked at.
        no_chance = _logit_at(tl.full((), _NO_CHANCE, tl.float64), highest, temperature)
        floor = tl.maximum(floor, no_chance)
        end_logit = tl.full((), float("-inf"), tl.float32)
        end_id = num_ids
        if top_k < num_ids:
            end_logit, end_id = _end_of(
                logits, heights, listed, highest, light, top_k, num_ids, num_chunks, CHUNKS, TILE
            )
        winner = tl.load(winners + row).to(tl.int32)
        logit = tl.load(logits + winner)
        is_candidate = _is_before(logit, winner, end_logit, end_id) & (logit >= floor)
        goal = tl.full((), -1.0, tl.float64)  # not known yet
        is_kept = tl.full((), 0, tl.int1)
        while is_kept == 0:
            if is_candidate == 0:
                bar = tl.maximum(floor, end_logit)
                num_listed = _list(heights, listed, bar, num_chunks, CHUNKS)
                winner = _draw_before(
                    logits, listed, num_listed, num_ids, highest, temperature,
                    tl.load(seeds + row), tl.load(choices + row), tl.load(positions + row),
                    floor, end_logit, end_id, IDS,
                )  # fmt: skip
                logit = tl.load(logits + winner)
            # As negations, so that whatever is no number ends this.
            is_kept = (top_p < 1) == 0
            if top_p < 1:
                num_listed = _list(heights, listed, logit, num_chunks, CHUNKS)
                mass = _weigh_before(
                    logits, listed, num_listed, num_ids, highest, scale, logit, winner, TILE
                )
                # With none before it a token is kept, whatever the goal.
                if (mass >= 0.5) & (goal < 0):
                    # Of the first `top_k`, as long as their end is the end.
                    bar = tl.maximum(light, end_logit)
                    num_listed = _list(heights, listed, bar, num_chunks, CHUNKS)
                    total = _weigh_before(
                        logits, listed, num_listed, num_ids, highest, scale, end_logit, end_id, TILE
                    )
                    goal = top_p * total
                is_kept = ((mass >= 0.5) & (mass >= goal)) == 0
            end_logit = logit
            end_id = winner
            is_candidate = tl.full((), 0, tl.int1)
        tl.store(winners + row, winner.to(tl.int64))


@triton.jit
def _logit_at(x, highest, temperature):
    """Compute `engine.draw.logit_at` of a row."""
    return (highest.to(tl.float64) + temperature * x).to(tl.float32)


@triton.jit
def _is_before(logit, token, end_logit, end_id):
    """Tell which tokens come before an end. Both zeros are one logit, as comparisons have it."""
    return (logit > end_logit) | ((logit == end_logit) & (token < end_id))


@triton.jit
def _list(heights, listed, bar, num_chunks, CHUNKS: tl.constexpr):
    """Write down, in order, the chunks with a logit that reaches a bar; returns how many."""
    chunk = tl.arange(0, CHUNKS)
    is_chunk = chunk < num_chunks
    height = tl.load(heights + chunk, mask=is_chunk, other=float("-inf"))
    is_listed = is_chunk & (height >= bar)
    place = tl.cumsum(is_listed.to(tl.int32), 0) - 1
    # What one thread stores others read: the last list no more, and this one not yet.
    tl.debug_barrier()
    tl.store(listed + place, chunk, mask=is_listed)
    tl.debug_barrier()
    return tl.sum(is_listed.to(tl.int32), 0)


@triton.jit
def _load_listed(logits, listed, first, num_listed, num_ids, SIZE: tl.constexpr):
    """Read some ids of the listed chunks, and their logits: -inf where there is none."""
    place = first + tl.arange(0, SIZE)
    is_listed = place < num_listed * _CHUNK
    chunk = tl.load(listed + place // _CHUNK, mask=is_listed, other=0)
    token = chunk * _CHUNK + place % _CHUNK
    is_token = is_listed & (token < num_ids)
    return token, tl.load(logits + token, mask=is_token, other=float("-inf"))


@triton.jit
def _draw_before(
    logits, listed, num_listed, num_ids, highest, temperature, seed, choice, position,
    floor, end_logit, end_id, IDS: tl.constexpr,
):  # fmt: skip
    """Find the lowest id with the highest x + noise of those before an end and above a floor."""
    score = tl.full((), float("-inf"), tl.float64)
    winner = tl.full((), 0, tl.int32)
    for first in range(0, num_listed * _CHUNK, IDS):
        token, logit = _load_listed(logits, listed, first, num_listed, num_ids, IDS)
        is_candidate = _is_before(logit, token, end_logit, end_id) & (logit >= floor)
        x = (logit.to(tl.float64) - highest.to(tl.float64)) / temperature
        x = tl.where(is_candidate, x, float("-inf"))
        if tl.max(x, 0) + _MAX_NOISE > score:
            place = first + 16 * tl.arange(0, IDS // 16)
            chunk = tl.load(listed + place // _CHUNK, mask=place < num_listed * _CHUNK, other=0)
            group = (chunk * _CHUNK + place % _CHUNK) // 16
            x += _noise(seed, choice, position, group, IDS // 16)
            peak = tl.max(x, 0)
            if peak > score:
                score = peak
                winner = tl.min(tl.where(x == peak, token, num_ids), 0)
    return winner


@triton.jit
def _mass(logit, highest, scale):
    """Compute `engine.draw.mass` operation by operation.

    What is added and taken away again leaves a number rounded to a whole one, ties to even.
    """
    power = tl.maximum((logit - highest) * scale, _MASSLESS)
    whole = (power + 12582912.0) - 12582912.0  # 1.5 * 2^23
    rest = power - whole
    y = rest * _C6 + _C5
    y = y * rest + _C4
    y = y * rest + _C3
    y = y * rest + _C2
    y = y * rest + _C1
    y = y * rest + 1.0
    bits = (whole.to(tl.int32) + _EXPONENT_OF_UNITS) << 23
    units = y * bits.to(tl.float32, bitcast=True)
    # From 2^23 on all are whole.
    return tl.where(units < 8388608.0, (units + 8388608.0) - 8388608.0, units)


@triton.jit
def _weigh_before(
    logits, listed, num_listed, num_ids, highest, scale, end_logit, end_id, TILE: tl.constexpr
):
    """Sum up the mass of the listed tokens before an end; whole numbers, so in any order."""
    total = tl.zeros((TILE,), tl.float64)
    for first in range(0, num_listed * _CHUNK, TILE):
        token, logit = _load_listed(logits, listed, first, num_listed, num_ids, TILE)
        is_before = _is_before(logit, token, end_logit, end_id)
        total += tl.where(is_before, _mass(logit, highest, scale), 0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _rank_of(logit):
    """Map a logit to a whole number in the same order, int64; -0.0 comes just below 0.0."""
    bits = logit.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _logit_of(rank):
    """Invert `_rank_of`."""
    bits = rank.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _count_above(logits, listed, num_listed, num_ids, bar, TILE: tl.constexpr):
    """Count the listed tokens above a logit."""
    count = tl.zeros((TILE,), tl.int32)
    for first in range(0, num_listed * _CHUNK, TILE):
        _, logit = _load_listed(logits, listed, first, num_listed, num_ids, TILE)
        count += (logit > bar).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _end_of(
    logits, heights, listed, highest, light, top_k, num_ids, num_chunks,
    CHUNKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Find an end with the first `top_k` tokens before it, and of others weightless ones at most.

    By halving the range of ranks in which its logit must lie, above `low` and not above `high`,
    until so many tokens are above one of them or nothing is left to be halved.
    """
    low = _rank_of(light)
    high = _rank_of(highest)
    if top_k <= num_chunks:
        # So many chunks' highest logits are so many tokens.
        chunk = tl.arange(0, CHUNKS)
        height = tl.load(heights + chunk, mask=chunk < num_chunks, other=float("-inf"))
        too_high = high + 1
        num_reached = tl.full((), 0, tl.int32)
        while (too_high - low > 1) & (num_reached != top_k):
            middle = (low + too_high) >> 1
            num_reached = tl.sum((height >= _logit_of(middle)).to(tl.int32), 0)
            if num_reached >= top_k:
                low = middle
            else:
                too_high = middle
    # From those that reach it to those above it: by two, as zero has two ranks; -inf is the last.
    low = tl.maximum(low - 2, -0x7F800001)
    num_listed = _list(heights, listed, _logit_of(low), num_chunks, CHUNKS)
    num_above = _count_above(logits, listed, num_listed, num_ids, _logit_of(low), TILE)
    end_logit = tl.full((), float("-inf"), tl.float32)
    end_id = num_ids
    if num_above >= top_k:  # else it is among the weightless, and all may come before it
        num_before = tl.full((), 0, tl.int32)  # above `high`, too few
        while (high - low > 1) & (num_above != top_k):
            middle = (low + high) >> 1
            num = _count_above(logits, listed, num_listed, num_ids, _logit_of(middle), TILE)
            if num >= top_k:
                low = middle
                num_above = num
            else:
                high = middle
                num_before = num
        if num_above == top_k:
            end_logit = _logit_of(low)
            end_id = tl.full((), 0, tl.int32)
        else:  # of equals those of the lowest ids
            end_logit = _logit_of(high)
            end_id = tl.full((), 0, tl.int32)
            for first in range(0, num_listed * _CHUNK, TILE):
                token, logit = _load_listed(logits, listed, first, num_listed, num_ids, TILE)
                is_equal = (logit == end_logit).to(tl.int32)
                place = num_before + tl.cumsum(is_equal, 0)
                is_before = (is_equal == 1) & (place <= top_k)
                end_id = tl.maximum(end_id, tl.max(tl.where(is_before, token + 1, 0), 0))
                num_before += tl.sum(is_equal, 0)
    return end_logit, end_id
