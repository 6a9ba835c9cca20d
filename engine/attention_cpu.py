"""Attention over the paged cache on a CPU: tiles of neighbouring rows share the keys they read.

`write_task` and `attend_task` each do one piece of work for whoever deals pieces out to threads;
the kernel here is the plainest such. Compiled by numba on first use and cached on the disk: no
compiler is needed.
"""

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from engine.batch import ModelInput
from engine.cpu_ir import LANES, LINE
from engine.cpu_math import KERNEL, Array, view
from engine.cpu_tasks import counters, finish, take, team, wait
from engine.kv_cache import KVCache
from engine.vectors import ROWS, address, ask, fetch, keep, mix, put, score, soften
from model.config import GPTConfig

_AHEAD = 4  # heads of a block: keys are asked for as long before their turn
_PARTS_A_THREAD = 4  # of lone rows: enough for threads to share them out evenly

_jitable = numba.extending.register_jitable


class Tasks:
    """A step's attention in pieces: up to 8 neighbouring rows of a sequence, and some of the heads.

    `table` (T, 6) int64 is first row, number of rows, position of the first, row of the block
    tables, first head, and the head behind the last. Tiles of several rows take a head a task, and
    the tiles of one sequence follow each other and find its keys still at hand. A lone row takes
    many heads at once: those of a block lie behind each other, so memory is read in long runs.
    """

    def __init__(self, batch: ModelInput, *, num_heads: int, num_threads: int) -> None:
        positions, sequences = batch.positions.numpy(), batch.row_sequences.numpy()
        num_rows = len(positions)
        ends = np.ones(num_rows, np.bool_)  # whether the row is the last of a run
        ends[:-1] = (sequences[1:] != sequences[:-1]) | (positions[1:] != positions[:-1] + 1)
        last = np.flatnonzero(ends)
        if len(last) == num_rows:
            first, counts = last, np.ones(num_rows, np.int64)
        else:
            starts = np.concatenate(([0], last[:-1] + 1))
            tiles_each = (last - starts) // ROWS + 1
            before = np.cumsum(tiles_each) - tiles_each
            first = np.repeat(starts - ROWS * before, tiles_each)
            first += ROWS * np.arange(len(first))
            counts = np.minimum(np.repeat(last + 1, tiles_each) - first, ROWS)
        order = np.argsort(-positions[first], kind="stable")  # the longest first
        first, counts = first[order], counts[order]
        tiles = np.stack((first, counts, positions[first], sequences[first]), 1)
        lone, several = tiles[counts == 1], tiles[counts > 1]
        heads = np.arange(num_heads)
        found = [_with_heads(several, heads, heads + 1, by_head=True)]
        if len(lone):
            num_parts = min(num_heads, -(-_PARTS_A_THREAD * num_threads // len(lone)))
            bounds = np.arange(num_parts + 1) * num_heads // num_parts
            found.append(_with_heads(lone, bounds[:-1], bounds[1:], by_head=False))
        self.table = np.concatenate(found)
        self.length = int(positions.max()) + 1  # of the longest sequence, up to its last row


def _with_heads(tiles: Array, begin: Array, end: Array, *, by_head: bool) -> Array:
    """Each tile with each range of heads, in the order of the ranges or else of the tiles."""
    shape = (len(begin), len(tiles)) if by_head else (len(tiles), len(begin))
    part, tile = (index.ravel() for index in np.indices(shape)[:: 1 if by_head else -1])
    return np.column_stack((tiles[tile], begin[part], end[part]))


def thread_room(config: GPTConfig, *, num_threads: int, length: int) -> Array:
    """What threads write while they work on a task (threads, size) float32, on lines of their own.

    For each head of a task: scaled queries and mixtures of its rows, each (rows, D rounded up
    to 16), a factor for each row, and scores.
    """
    rows = max(ROWS, config.n_head)  # of all heads of a task
    stride = -(-config.head_size // LANES) * LANES
    size = rows * (2 * stride + _room_for_scores(length)) + config.n_head * LANES
    space = np.empty(num_threads * size + LINE, np.float32)
    skipped = -space.ctypes.data % LINE // space.itemsize
    return space[skipped : skipped + num_threads * size].reshape(num_threads, size)


class CPUPagedAttention:
    """An `Attend` equal to `PagedAttention` for caches in float32 and bfloat16; int8 is its alone.

    A row's result is the same arithmetic in the same order whatever tile it is in: the same bytes
    alone, batched or chunked, and for any size of blocks.
    """

    def __init__(self, config: GPTConfig, cache: KVCache, batch: ModelInput) -> None:
        self._config = config
        self.cache = cache
        self.tables = batch.block_tables.numpy()
        self.blocks = batch.slot_blocks.numpy()
        self.offsets = batch.slot_offsets.numpy()
        num_threads = torch.get_num_threads()
        tasks = Tasks(batch, num_heads=config.n_head, num_threads=num_threads)
        self.tasks = tasks.table
        self.room = thread_room(config, num_threads=num_threads, length=tasks.length)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend in layer `layer`: q, k, v (N, H, D) -> (N, H, D)."""
        out = torch.empty(q.shape, dtype=q.dtype)
        team(torch.get_num_threads()).run(
            _attend, counters(2), view(torch.stack((q, k, v), 1).view(len(q), -1)), layer,
            np.float32(self._config.attention_scale(layer)), view(self.cache.k), view(self.cache.v),
            self.blocks, self.offsets, self.tables, self.tasks, self.room,
            view(out.view(len(q), -1)),
        )  # fmt: skip
        return out


@_jitable
def _room_for_scores(length: Any) -> Any:
    """Of one row and head: whole vectors, and some more, because they are not stored on lines."""
    return (-(-length // LANES) + 2) * LANES


@_jitable
def write_task(
    row: Any, layer: Any, qkv: Array, cache_k: Array, cache_v: Array, blocks: Array, offsets: Array
) -> None:
    """Store keys and values of one row, of qkv (N, 3 C), in its place of the cache.

    All rows of a step come before any `attend_task`: rows may share blocks filled right now.
    """
    num_heads, block_size = cache_k.shape[2], cache_k.shape[3]
    width = qkv.shape[1] // 3
    size = width // num_heads
    place = (np.intp(layer) * cache_k.shape[1] + blocks[row]) * num_heads * block_size
    place += offsets[row]
    for head in range(num_heads):
        number = place + head * block_size
        keep(qkv, row, width + head * size, size, cache_k, number)
        keep(qkv, row, 2 * width + head * size, size, cache_v, number)


@_jitable
def expect_write(row: Any, layer: Any, cache_k: Array, cache_v: Array, blocks: Array,
    offsets: Array,
) -> None:  # fmt: skip
    """Ask for the places that `write_task` will write: long before, nobody waits for them."""
    num_heads, block_size = cache_k.shape[2], cache_k.shape[3]
    place = (np.intp(layer) * cache_k.shape[1] + blocks[row]) * num_heads * block_size
    place += offsets[row]
    for head in range(num_heads):
        fetch(cache_k, place + head * block_size, 1)
        fetch(cache_v, place + head * block_size, 1)


@_jitable
def attend_task(
    task: Any, thread: Any, layer: Any, scale: Any, qkv: Array, cache_k: Array, cache_v: Array,
    tables: Array, tasks: Array, room: Array, out: Array,
) -> None:  # fmt: skip
    """Attend with the rows and heads of one of `tasks`, of qkv (N, 3 C), into out (N, C).

    `thread` says which of the `room`'s rows is the caller's alone. qkv and out are each float32 or
    bfloat16's bits.
    """
    first_row, num_rows, table = tasks[task, 0], tasks[task, 1], tasks[task, 3]
    first_length = tasks[task, 2] + 1  # keys that the first row sees
    length = first_length + num_rows - 1
    first_head = tasks[task, 4]
    num_heads = tasks[task, 5] - first_head
    size = qkv.shape[1] // 3 // cache_k.shape[2]
    block_size = cache_k.shape[3]
    num_blocks = (length + block_size - 1) // block_size
    width = 1 if num_rows == 1 else ROWS
    stride = -(-size // LANES) * LANES
    queries, mixtures = 0, num_heads * width * stride
    factors = 2 * mixtures
    scores = factors + num_heads * LANES
    scores_each = _room_for_scores(length) * width

    for head in range(num_heads):
        for row in range(num_rows):
            at = address(room, thread, queries + (head * width + row) * stride)
            ask(qkv, first_row + row, (first_head + head) * size, size, scale, at)
    for index in range(num_blocks):
        begin = _first_key(layer, tables[table, index], first_head, cache_k)
        after = begin
        if index + 1 < num_blocks:
            after = _first_key(layer, tables[table, index + 1], first_head, cache_k)
        count = min(block_size, length - index * block_size)
        for head in range(num_heads):
            at = scores + head * scores_each + index * block_size * width
            score(
                num_rows, cache_k, begin + head * block_size, count,
                _ahead(begin, after, head, num_heads, block_size),
                address(room, thread, queries + head * width * stride), stride * 4, size,
                address(room, thread, at),
            )  # fmt: skip
    for head in range(num_heads):
        at = address(room, thread, scores + head * scores_each)
        soften(num_rows, at, first_length, address(room, thread, factors + head * LANES))
    for place in range(mixtures, factors):
        room[thread, place] = np.float32(0)
    for index in range(num_blocks):
        begin = _first_key(layer, tables[table, index], first_head, cache_v)
        after = begin
        if index + 1 < num_blocks:
            after = _first_key(layer, tables[table, index + 1], first_head, cache_v)
        count = min(block_size, length - index * block_size)
        for head in range(num_heads):
            at = scores + head * scores_each + index * block_size * width
            mix(
                num_rows, cache_v, begin + head * block_size, count,
                _ahead(begin, after, head, num_heads, block_size), address(room, thread, at),
                first_length - index * block_size,
                address(room, thread, mixtures + head * width * stride), stride * 4,
            )  # fmt: skip
    for head in range(num_heads):
        for row in range(num_rows):
            at = address(room, thread, mixtures + (head * width + row) * stride)
            factor = room[thread, factors + head * LANES + row]
            put(out, first_row + row, (first_head + head) * size, at, factor, size)


@_jitable
def _ahead(begin: Any, after: Any, head: Any, num_heads: Any, block_size: Any) -> Any:
    """The row of the cache to ask for while a head of a block is worked on: some heads later."""
    head += _AHEAD
    if head < num_heads:
        return begin + head * block_size
    return after + min(head - num_heads, num_heads - 1) * block_size


@_jitable
def _first_key(layer: Any, block: Any, head: Any, cache: Array) -> Any:
    """The number of a block's first row for one head, in the whole cache."""
    block = np.intp(layer) * cache.shape[1] + np.intp(block)
    return (block * cache.shape[2] + head) * cache.shape[3]


@numba.njit(**KERNEL)
def _attend(
    thread: Any, num_threads: Any, counts: Array, qkv: Array, layer: Any, scale: Any,
    cache_k: Array, cache_v: Array, blocks: Array, offsets: Array, tables: Array, tasks: Array,
    room: Array, out: Array,
) -> None:  # fmt: skip
    num_rows, num_tasks = len(qkv), len(tasks)
    while True:
        row = take(counts, 0)
        if row >= num_rows:
            break
        write_task(row, layer, qkv, cache_k, cache_v, blocks, offsets)
        finish(counts, 0)
    wait(counts, 0, num_rows)
    while True:
        task = take(counts, 1)
        if task >= num_tasks:
            break
        attend_task(
            task, thread, layer, scale, qkv, cache_k, cache_v, tables, tasks, room, out
        )  # fmt: skip
        finish(counts, 1)
    wait(counts, 1, num_tasks)
