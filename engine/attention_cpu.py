"""Attention over the paged cache on a CPU: kernels that walk the block table and copy nothing.

Compiled by numba on first use and cached on the disk: no compiler is needed.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import ModelInput
from engine.kv_cache import KVCache
from model.config import GPTConfig

Array = NDArray[Any]


class CPUPagedAttention:
    """An `Attend` equal to `PagedAttention`, for caches in float32 and bfloat16.

    Every row and head is computed by itself, keys in the order of their positions, so a row's
    result does not depend on which rows came with it: the same bytes alone, batched or chunked.
    """

    def __init__(self, config: GPTConfig, cache: KVCache, batch: ModelInput) -> None:
        self._scales = [config.attention_scale(layer) for layer in range(config.n_layer)]
        self._cache = cache
        self._positions = batch.positions.numpy()
        self._tables = batch.block_tables.numpy()
        self._row_sequences = batch.row_sequences.numpy()
        self._blocks = batch.slot_blocks.numpy()
        self._offsets = batch.slot_offsets.numpy()
        num_tasks = len(self._positions) * config.n_head
        longest = int(self._positions.max()) + 1
        self._scores = np.empty((num_tasks, longest), np.float32)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend in layer `layer`: q, k, v (N, H, D) -> (N, H, D)."""
        out = torch.empty(q.shape, dtype=q.dtype)
        is_bfloat16 = q.dtype == torch.bfloat16
        kernel = _attend_bfloat16 if is_bfloat16 else _attend_float32
        kernel(
            _view(q), _view(k), _view(v), _view(self._cache.k[layer]), _view(self._cache.v[layer]),
            self._positions, self._row_sequences, self._tables, self._blocks, self._offsets,
            np.float32(self._scales[layer]), self._scores, _view(out),
        )  # fmt: skip
        return out


def _view(tensor: Tensor) -> Array:
    """The tensor's memory for numba, which has no bfloat16: its bits instead."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    array: Array = tensor.numpy()
    return array


# Plain functions to Python: the kernels close over them, and where a compiled function is closed
# over, numba's cache on disk never finds the kernel again.
_inlined = numba.extending.register_jitable(inline="always")


@_inlined
def _widen(bits: Any) -> Any:
    """The float32 that has a bfloat16's bits in its upper half."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@_inlined
def _narrow(value: Any) -> Any:
    """Round a float32 to bfloat16's bits, to nearest and ties to even; NaN stays one."""
    bits = np.float32(value).view(np.uint32)
    if value != value:
        return np.uint16(np.uint32(bits >> np.uint32(16)) | np.uint32(64))
    odd = np.uint32(bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@_inlined
def _same(value: Any) -> Any:
    return value


@numba.njit(inline="always", fastmath={"contract", "nsz", "arcp"})
def _exp(x: Any) -> Any:
    """Exponentiate x <= 0 to base e, within 2 units in the last place; plain arithmetic vectorises.

    Splits off the nearest multiple of ln 2 (in two parts, Cody and Waite) and takes the Taylor
    series of the rest, which is at most ln 2 / 2.
    """
    x = np.float32(-87) if x < np.float32(-87) else x  # NaN stays: comparing with it is false
    n = math.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = (x - np.float32(n) * np.float32(0.693359375)) + np.float32(n) * np.float32(2.12194440e-4)
    y = np.float32(1 / 5040)
    y = y * r + np.float32(1 / 720)
    y = y * r + np.float32(1 / 120)
    y = y * r + np.float32(1 / 24)
    y = y * r + np.float32(1 / 6)
    y = y * r + np.float32(1 / 2)
    y = (y * r + np.float32(1)) * r + np.float32(1)
    return y * np.uint32(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23)).view(np.float32)


def _compile(load: Any, store: Any) -> Any:
    """Build the kernel for one kind of number; `load` and `store` go between it and float32."""

    # The sums may be reordered for vector registers, the same way for every row; infinities and
    # NaN must survive, or a broken row would pass for a good one.
    @numba.njit(
        parallel=True, nogil=True, cache=True, boundscheck=False,
        fastmath={"contract", "nsz", "arcp", "reassoc"},
    )  # fmt: skip
    def attend(
        q: Array, k: Array, v: Array, cache_k: Array, cache_v: Array,
        positions: Array, row_sequences: Array, tables: Array, blocks: Array, offsets: Array,
        scale: Any, scores: Array, out: Array,
    ) -> None:  # fmt: skip
        num_rows, num_heads, size = q.shape
        block_size = cache_k.shape[2]
        # Everything is written before anything is read: rows may share blocks filled right now.
        for row in range(num_rows):
            for head in range(num_heads):
                for d in range(size):
                    cache_k[blocks[row], head, offsets[row], d] = k[row, head, d]
                    cache_v[blocks[row], head, offsets[row], d] = v[row, head, d]
        # Rows of one head follow each other: those of one sequence find its keys still at hand.
        for task in numba.prange(num_rows * num_heads):
            head = task // num_rows
            row = task - head * num_rows
            length = positions[row] + 1
            table = tables[row_sequences[row]]
            weights = scores[task]
            query = np.empty(size, np.float32)
            for d in range(size):
                query[d] = load(q[row, head, d]) * scale
            highest = np.float32(-np.inf)
            for first in range(0, length, block_size):
                keys = cache_k[table[first // block_size], head]
                for place in range(min(block_size, length - first)):
                    score = np.float32(0)
                    for d in range(size):
                        score += query[d] * load(keys[place, d])
                    weights[first + place] = score
                    highest = score if score > highest else highest
            total = np.float32(0)
            for place in range(length):
                weight = _exp(weights[place] - highest)
                weights[place] = weight
                total += weight
            mixture = np.zeros(size, np.float32)
            for first in range(0, length, block_size):
                values = cache_v[table[first // block_size], head]
                for place in range(min(block_size, length - first)):
                    weight = weights[first + place]
                    for d in range(size):
                        mixture[d] += weight * load(values[place, d])
            for d in range(size):
                out[row, head, d] = store(mixture[d] / total)

    return attend


_attend_float32 = _compile(_same, _same)
_attend_bfloat16 = _compile(_widen, _narrow)
