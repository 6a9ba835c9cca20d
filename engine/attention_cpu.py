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


@_jitable
def list_tiles(positions: Any, sequences: Any, tiles: Any) -> Any:
    """List a step's rows as attention takes them: up to 8 neighbours of one sequence at a time.

    Of each row a position and its row of the block tables. tiles (T, 4) int64 become first row,
    number of rows, position of the first and row of the block tables; those of several rows come
    first, and among them and among the others the longest. Returns T.
    """
    num_rows, num_tiles, first = len(positions), 0, 0
    while first < num_rows:
        end = first + 1
        while (
            end < num_rows
            and end - first < ROWS
            and sequences[end] == sequences[first]
            and positions[end] == positions[end - 1] + 1
        ):
            end += 1
        # Sorted by insertion: rows of decoding have the order of the step before.
        place, is_lone = num_tiles, end - first == 1
        while place > 0:
            is_before_lone = tiles[place - 1, 1] == 1
            if is_lone == is_before_lone and tiles[place - 1, 2] >= positions[first]:
                break
            if is_lone and not is_before_lone:
                break
            for column in range(4):
                tiles[place, column] = tiles[place - 1, column]
            place -= 1
        tiles[place, 0], tiles[place, 1] = first, end - first
        tiles[place, 2], tiles[place, 3] = positions[first], sequences[first]
        num_tiles += 1
        first = end
    return num_tiles


@_jitable
def share_out(num_several: Any, num_tiles: Any, num_heads: Any, num_threads: Any) -> Any:
    """Say how a step's attention is cut: parts of each lone row, and tasks in all.

    Tiles of several rows take a head a task, and those of one sequence follow each other and find
    its keys still at hand. A lone row takes many heads at once: those of a block lie behind each
    other, so memory is read in long runs.
    """
    num_lone = num_tiles - num_several
    num_parts = 1
    if num_lone > 0:
        num_parts = min(num_heads, (_PARTS_A_THREAD * num_threads + num_lone - 1) // num_lone)
    return num_parts, num_several * num_heads + num_lone * num_parts


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
        positions, sequences = batch.positions.numpy(), batch.row_sequences.numpy()
        tiles = np.empty((len(positions), 4), np.int64)
        self.tiles = tiles[: _list_tiles(positions, sequences, tiles)]
        self.num_several = int(np.count_nonzero(self.tiles[:, 1] > 1))
        num_threads = torch.get_num_threads()
        self.room = thread_room(config, num_threads=num_threads, length=int(positions.max()) + 1)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend in layer `layer`: q, k, v (N, H, D) -> (N, H, D)."""
        out = torch.empty(q.shape, dtype=q.dtype)
        team(torch.get_num_threads()).run(
            _attend, counters(2), view(torch.stack((q, k, v), 1).view(len(q), -1)), layer,
            np.float32(self._config.attention_scale(layer)), view(self.cache.kv), self.blocks,
            self.offsets, self.tables, self.tiles, self.num_several, self.room,
            view(out.view(len(q), -1)),
        )  # fmt: skip
        return out


@_jitable
def _room_for_scores(length: Any) -> Any:
    """Of one row and head: whole vectors, and some more, because they are not stored on lines."""
    return (-(-length // LANES) + 2) * LANES


@_jitable
def write_task(
    row: Any, layer: Any, qkv: Array, cache: Array, blocks: Array, offsets: Array
) -> None:
    """Store keys and values of one row, of qkv (N, 3 C), in its place of the cache.

    All rows of a step come before any `attend_task`: rows may share blocks filled right now.
    """
    num_heads, block_size = cache.shape[3], cache.shape[4]
    width = qkv.shape[1] // 3
    size = width // num_heads
    key = _first_row(cache, blocks[row], layer, 0, 0) + offsets[row]
    value = _first_row(cache, blocks[row], layer, 1, 0) + offsets[row]
    for head in range(num_heads):
        keep(qkv, row, width + head * size, size, cache, key + head * block_size)
        keep(qkv, row, 2 * width + head * size, size, cache, value + head * block_size)


@_jitable
def expect_write(row: Any, layer: Any, cache: Array, blocks: Array, offsets: Array) -> None:
    """Ask for the places that `write_task` will write: long before, nobody waits for them."""
    key = _first_row(cache, blocks[row], layer, 0, 0) + offsets[row]
    for head in range(2 * cache.shape[3]):  # the values' heads follow the keys'
        fetch(cache, key + head * cache.shape[4], 1)


@_jitable
def attend_task(
    task: Any, num_several: Any, num_parts: Any, thread: Any, layer: Any, scale: Any, qkv: Array,
    cache: Array, tables: Array, tiles: Array, room: Array, out: Array,
) -> None:  # fmt: skip
    """Attend with the rows of a tile and some heads, of qkv (N, 3 C), into out (N, C).

    Which, says `task`, as `share_out` cuts them. `thread` says which of the `room`'s rows is the
    caller's alone. qkv and out are each float32 or bfloat16's bits.
    """
    all_heads = cache.shape[3]
    if task < num_several * all_heads:
        first_head = task // num_several
        tile = task - first_head * num_several
        num_heads = 1
    else:
        rest = task - num_several * all_heads
        tile = rest // num_parts
        part = rest - tile * num_parts
        tile += num_several
        first_head = part * all_heads // num_parts
        num_heads = (part + 1) * all_heads // num_parts - first_head
    first_row, num_rows, table = tiles[tile, 0], tiles[tile, 1], tiles[tile, 3]
    first_length = tiles[tile, 2] + 1  # keys that the first row sees
    length = first_length + num_rows - 1
    size = qkv.shape[1] // 3 // all_heads
    block_size = cache.shape[4]
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
        begin = _first_row(cache, tables[table, index], layer, 0, first_head)
        after = begin
        if index + 1 < num_blocks:
            after = _first_row(cache, tables[table, index + 1], layer, 0, first_head)
        count = min(block_size, length - index * block_size)
        for head in range(num_heads):
            at = scores + head * scores_each + index * block_size * width
            score(
                num_rows, cache, begin + head * block_size, count,
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
        begin = _first_row(cache, tables[table, index], layer, 1, first_head)
        after = begin
        if index + 1 < num_blocks:
            after = _first_row(cache, tables[table, index + 1], layer, 1, first_head)
        count = min(block_size, length - index * block_size)
        for head in range(num_heads):
            at = scores + head * scores_each + index * block_size * width
            mix(
                num_rows, cache, begin + head * block_size, count,
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
def _first_row(cache: Array, block: Any, layer: Any, kind: Any, head: Any) -> Any:
    """The number of a head's first row in a block: of its keys if kind is 0, or of its values."""
    place = (np.intp(block) * cache.shape[1] + np.intp(layer)) * 2 + kind
    return (place * cache.shape[3] + head) * cache.shape[4]


@numba.njit(**KERNEL)
def _attend(
    thread: Any, num_threads: Any, counts: Array, qkv: Array, layer: Any, scale: Any,
    cache: Array, blocks: Array, offsets: Array, tables: Array, tiles: Array, num_several: Any,
    room: Array, out: Array,
) -> None:  # fmt: skip
    num_rows = len(qkv)
    num_parts, num_tasks = share_out(num_several, len(tiles), cache.shape[3], num_threads)
    while True:
        row = take(counts, 0)
        if row >= num_rows:
            break
        write_task(row, layer, qkv, cache, blocks, offsets)
        finish(counts, 0)
    wait(counts, 0, num_rows)
    while True:
        task = take(counts, 1)
        if task >= num_tasks:
            break
        attend_task(
            task, num_several, num_parts, thread, layer, scale, qkv, cache, tables,
            tiles, room, out,
        )  # fmt: skip
        finish(counts, 1)
    wait(counts, 1, num_tasks)


_list_tiles = numba.njit(**KERNEL)(list_tiles)
