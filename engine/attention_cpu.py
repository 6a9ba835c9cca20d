"""Attention over the paged cache on a CPU: kernels that walk the block table and copy nothing.

Compiled by numba on first use and cached on the disk: no compiler is needed.
"""

import functools
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from torch import Tensor

from engine.batch import ModelInput
from engine.cpu_math import FAST_MATH, Array, exp, narrow, same, view, widen
from engine.kv_cache import KVCache
from model.config import GPTConfig


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
        _compile(q.dtype, q.shape[-1])(
            view(q.contiguous()), view(k.contiguous()), view(v.contiguous()),
            view(self._cache.k[layer]), view(self._cache.v[layer]),
            self._positions, self._row_sequences, self._tables, self._blocks, self._offsets,
            np.float32(self._scales[layer]), self._scores, view(out),
        )  # fmt: skip
        return out


@numba.extending.intrinsic(prefer_literal=True)
def _prefetch(context: Any, cache: Any, block: Any, head: Any, place: Any, num_bytes: Any) -> Any:
    """Ask for the `num_bytes` from cache[block, head, place] on, without waiting for them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        array = context.make_array(kind)(context, builder, arguments[0])
        indices = [*arguments[1:4], ir.Constant(arguments[1].type, 0)]
        start = cgutils.get_item_pointer(context, builder, kind, array, indices)
        byte, number = ir.IntType(8), ir.IntType(32)
        address = builder.bitcast(start, byte.as_pointer())
        prefetch = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [byte.as_pointer(), number, number, number]),
            "llvm.prefetch.p0",
        )
        for line in range(0, num_bytes.literal_value, 64):
            at = builder.gep(address, [ir.Constant(number, line)])
            builder.call(prefetch, [at, *(ir.Constant(number, n) for n in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(cache, block, head, place, num_bytes), generate


@functools.cache
def _compile(dtype: torch.dtype, size: int) -> Any:
    """Build the kernel for a type of numbers and a head size, which unrolls the inner loops."""
    load, store = (widen, narrow) if dtype == torch.bfloat16 else (same, same)
    key_bytes = size * dtype.itemsize

    @numba.njit(parallel=True, nogil=True, cache=True, boundscheck=False, fastmath=FAST_MATH)
    def attend(
        q: Array, k: Array, v: Array, cache_k: Array, cache_v: Array,
        positions: Array, row_sequences: Array, tables: Array, blocks: Array, offsets: Array,
        scale: Any, scores: Array, out: Array,
    ) -> None:  # fmt: skip
        num_rows, num_heads, _ = q.shape
        block_size = np.uintp(cache_k.shape[2])
        # Indices are unsigned: one that might be negative keeps a loop from being vectorised, and
        # a slice counts its references, which threads would wait for. Everything is written
        # before anything is read: rows may share blocks that are filled right now.
        for i in numba.prange(num_rows):
            row, block, offset = np.uintp(i), np.uintp(blocks[i]), np.uintp(offsets[i])
            for j in range(num_heads):
                head = np.uintp(j)
                for d in range(size):
                    cache_k[block, head, offset, d] = k[row, head, d]
                    cache_v[block, head, offset, d] = v[row, head, d]
        # Rows of one head follow each other: those of one sequence find its keys still at hand.
        for i in numba.prange(num_rows * num_heads):
            task = np.uintp(i)
            head = np.uintp(i // num_rows)
            row = np.uintp(i - (i // num_rows) * num_rows)
            length = np.uintp(positions[row] + 1)
            table_row = np.uintp(row_sequences[row])
            query = np.empty(size, np.float32)
            for d in range(size):
                query[d] = load(q[row, head, d]) * scale
            highest = np.float32(-np.inf)
            num_blocks: Any = (length + block_size - np.uintp(1)) // block_size
            for at in range(num_blocks):
                block, first = np.uintp(tables[table_row, at]), at * block_size
                next_block = np.uintp(
                    tables[table_row, min(at + np.uintp(1), num_blocks - np.uintp(1))]
                )
                for place in range(min(block_size, length - first)):
                    # The blocks of a sequence lie anywhere, where no processor looks ahead.
                    _prefetch(cache_k, next_block, head, place, key_bytes)
                    _prefetch(cache_v, block, head, place, key_bytes)
                    score = np.float32(0)
                    for d in range(size):
                        score += query[d] * load(cache_k[block, head, place, d])
                    scores[task, first + place] = score
                    highest = score if score > highest else highest
            total = np.float32(0)
            for at in range(length):
                weight = exp(scores[task, at] - highest)
                scores[task, at] = weight
                total += weight
            mixture = np.zeros(size, np.float32)
            for at in range(num_blocks):
                block, first = np.uintp(tables[table_row, at]), at * block_size
                for place in range(min(block_size, length - first)):
                    weight = scores[task, first + place]
                    for d in range(size):
                        mixture[d] += weight * load(cache_v[block, head, place, d])
            for d in range(size):
                out[row, head, d] = store(mixture[d] / total)

    return attend
