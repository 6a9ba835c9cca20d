"""The sampler's kernels on a CPU: the same tokens as `engine.draw`, and no sort of a vocabulary.

A row is one task and stays in a core's cache. How a token is drawn is in `engine.draw_cpu`; here is
what becomes of whole batches. Compiled by numba on first use and cached on the disk.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from engine.cpu_math import EXACT, Array
from engine.cpu_tasks import Team, counters, finish, take, team, wait
from engine.draw import LOG2_E, UNIT_BITS, WEIGHTLESS
from engine.draw_cpu import draw_token
from engine.noise_cpu import Key
from engine.row_cpu import (
    BLOCK,
    INFINITY,
    LEAST,
    Row,
    end_of,
    find_peaks,
    first_of,
    is_finite_row,
    logit_of,
    magnitude,
    rank_at,
    rank_of,
    weigh,
)

MOST_ALTERNATIVES = 64  # that `score` finds: it keeps them in order one by one

# Columns of a table of options.
_NUM_COLUMNS = 8
_TEMPERATURE, _SEED, _CHOICE, _POSITION, _TOP_K, _TOP_P, _LOG_MIN_P, _TYPICAL_P = range(8)
_GREEDY = np.empty((0, _NUM_COLUMNS), np.int64)

_compiled = numba.njit(**EXACT)
_kernel = numba.njit(cache=True, **EXACT)


@_compiled
def first_best(logits: Any, first: Any, size: Any) -> Any:
    """The lowest id among the best of a row, which begins at `first`, and whether it is finite."""
    best, largest = LEAST, np.int32(0)
    for at in range(first, first + size):
        rank = rank_of(logits[at])
        best = rank if rank > best else best
        bits = magnitude(logits[at])
        largest = bits if bits > largest else largest
    token = np.uintp(0)
    is_finite = is_finite_row(best, largest)
    if is_finite:
        while rank_of(logits[first + token]) != best:
            token += np.uintp(1)
    return np.int64(token), is_finite


@_compiled
def _choose_row(
    logits: Any, at: Any, stride: Any, size: Any, options: Any, shares: Any, token_ids: Any,
    is_finite: Any,
) -> None:  # fmt: skip
    first = at * stride
    peaks = np.empty((size + BLOCK - np.uintp(1)) // BLOCK, np.int32)
    best = find_peaks(logits, first, size, peaks)
    is_finite[at] = best != LEAST
    token_ids[at] = 0
    if best == LEAST:
        return
    token = first_of(logits, first, peaks, best)
    if len(options) > 0 and shares[at, _TEMPERATURE] > 0:
        temperature = shares[at, _TEMPERATURE]
        scale = np.float32(LOG2_E / temperature)
        row = Row(logits, first, size, peaks, logit_of(best), temperature, scale)
        seed, choice, position = options[at, _SEED], options[at, _CHOICE], options[at, _POSITION]
        token = draw_token(
            row, token, Key(np.uint64(seed), np.uint64(choice), np.uint64(position)),
            options[at, _TOP_K], shares[at, _TOP_P], shares[at, _LOG_MIN_P],
            shares[at, _TYPICAL_P],
        )  # fmt: skip
    token_ids[at] = np.int64(token)


@_kernel
def _choose(
    thread: Any, num_threads: Any, counts: Array, logits: Array, stride: Any, size: Any,
    options: Array, token_ids: Array, is_finite: Array,
) -> None:  # fmt: skip
    """Choose a token a row; without options, or at temperature 0, the first of the best."""
    num_rows = len(token_ids)
    shares = options.view(np.float64)  # what is not whole in them
    while True:
        row = take(counts, 0)
        if row >= num_rows:
            break
        _choose_row(
            logits, np.uintp(row), np.uintp(stride), np.uintp(size), options, shares, token_ids,
            is_finite,
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
    peaks = np.empty((size + BLOCK - np.uintp(1)) // BLOCK, np.int32)
    best = find_peaks(logits, first, size, peaks)
    if best == LEAST:
        logprobs[at] = np.nan
        for i in range(num_top):
            top_ids[at, i] = i
            top_logprobs[at, i] = np.nan
        return
    row = Row(logits, first, size, peaks, logit_of(best), np.float64(1), np.float32(LOG2_E))
    _, mass = weigh(row, rank_at(row, WEIGHTLESS), size)
    highest = -math.log(np.float64(mass) * 2.0**-UNIT_BITS)
    # Differences first: beside an enormous logit the logarithm would vanish.
    below = np.float64(logits[first + np.uintp(token_ids[at])]) - np.float64(row.best)
    logprobs[at] = np.float32(below + highest)
    if num_top == 0:
        return
    rank, before = end_of(row, LEAST, np.int64(num_top), INFINITY)
    count = np.uintp(0)
    for block in range(np.uintp(len(peaks))):
        if peaks[block] >= rank:
            start = block * BLOCK
            for token in range(start, min(start + BLOCK, size)):
                own = rank_of(logits[first + token])
                if own > rank or (own == rank and token < before):
                    place = count
                    while place > 0:
                        above = np.uintp(top_ids[at, place - np.uintp(1)])
                        if rank_of(logits[first + above]) >= own:
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


class Options:
    """How rows are drawn, as `SamplingRow` packs them: one array, for which a step has time."""

    __slots__ = ("table",)

    def __init__(self, *columns: Array) -> None:
        """Take arrays (R,) of float64 or int64: what `OPTIONS` names, in that order.

        A temperature of 0 takes the first of the best; a top_k of the vocabulary or more is off.
        """
        self.table = np.stack([column.view(np.int64) for column in columns], axis=1)

    @classmethod
    def packed(
        cls, rows: list[bytes], positions: list[int], temperatures: list[float] | None = None
    ) -> "Options":
        """Put packed rows together, and their positions; and other temperatures if need be."""
        options = cls.__new__(cls)
        table = np.frombuffer(bytearray().join(rows), np.int64).reshape(len(rows), _NUM_COLUMNS)
        table[:, _POSITION] = positions
        if temperatures is not None:
            table[:, _TEMPERATURE] = np.array(temperatures, np.float64).view(np.int64)
        options.table = table
        return options


def choose(logits: Tensor, options: Options | None = None) -> tuple[Tensor, Tensor]:
    """Choose a token id (R,) for each row of logits (R, V) float32; tell which rows are finite.

    With options, the same tokens as `engine.draw.draw`, but where a temperature is 0 the first of
    the best, as everywhere without. A row is finite if its highest logit is; the others get token
    id 0.
    """
    num_rows = logits.shape[0]
    token_ids = np.empty(num_rows, np.int64)
    is_finite = np.empty(num_rows, np.bool_)
    table = _GREEDY if options is None else options.table
    _team(num_rows).run(_choose, counters(1), *_memory(logits), table, token_ids, is_finite)
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
