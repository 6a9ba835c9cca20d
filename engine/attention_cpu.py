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
from engine.cpu_math import KERNEL, Array, view
from engine.cpu_tasks import counters, finish, take, team, wait
from engine.kv_cache import KVCache
from engine.vectors import (
    LANES,
    PANEL,
    ROWS,
    address,
    ask,
    fetch,
    gather_columns,
    keep,
    mix,
    prefetch,
    put,
    score,
    soften,
)
from model.config import GPTConfig

_AHEAD = 3 * LANES  # keys asked for before their turn: memory takes longer than a group of 16
_LINE = 64  # bytes that a processor fetches together, and what vectors of 16 float32 are aligned to

_jitable = numba.extending.register_jitable


@_jitable
def list_tiles(positions: Any, sequences: Any, tiles: Any) -> Any:
    """List a step's rows as attention takes them: up to 8 neighbours of one sequence at a time.

    Of each row a position and its row of the block tables. tiles (T, 4) int64 become first row,
    number of rows, position of the first and row of the block tables; the longest come first.
    Returns T. A task is a tile and a head, task = head * T + tile, so that those of one sequence
    follow each other and find its keys still at hand.
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
        place = num_tiles
        while place > 0 and tiles[place - 1, 2] < positions[first]:
            for column in range(4):
                tiles[place, column] = tiles[place - 1, column]
            place -= 1
        tiles[place, 0], tiles[place, 1] = first, end - first
        tiles[place, 2], tiles[place, 3] = positions[first], sequences[first]
        num_tiles += 1
        first = end
    return num_tiles


class ThreadRoom:
    """What threads write while they work on a task: room of each one's own.

    `values` (threads, size) float32, each thread's on lines of its own: scaled queries (D, 8), the
    columns of four groups of keys, mixtures (8, D rounded up to 16), and scores behind them.
    `keys` (threads, length) int64: the rows of the cache that hold a tile's keys.
    """

    def __init__(self, config: GPTConfig, *, num_threads: int, length: int) -> None:
        length = -(-length // (PANEL * LANES)) * PANEL * LANES + PANEL * LANES
        size = _places(config.head_size)[3] + ROWS * length
        space = np.empty(num_threads * size + _LINE, np.float32)
        skipped = -space.ctypes.data % _LINE // space.itemsize
        self.values = space[skipped : skipped + num_threads * size].reshape(num_threads, size)
        self.keys = np.empty((num_threads, length), np.int64)


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
        num_threads = torch.get_num_threads()
        self.room = ThreadRoom(config, num_threads=num_threads, length=int(positions.max()) + 1)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend in layer `layer`: q, k, v (N, H, D) -> (N, H, D)."""
        out = torch.empty(q.shape, dtype=q.dtype)
        team(torch.get_num_threads()).run(
            _attend, counters(2), view(torch.stack((q, k, v), 1).view(len(q), -1)), layer,
            np.float32(self._config.attention_scale(layer)), view(self.cache.k), view(self.cache.v),
            self.blocks, self.offsets, self.tables, self.tiles, self.room.values,
            self.room.keys, view(out.view(len(q), -1)),
        )  # fmt: skip
        return out


@_jitable
def _places(size: Any) -> Any:
    """Where in a thread's values columns, mixtures and scores begin, and what is between two."""
    channels = -(-size // 64) * 64  # of one group's columns
    mixtures = -(-size // LANES) * LANES  # of one row
    columns = ROWS * mixtures
    begin = columns + PANEL * LANES * channels
    return columns, channels, begin, begin + ROWS * mixtures, mixtures


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
        fetch(cache_k, place + head * block_size, 1, True)
        fetch(cache_v, place + head * block_size, 1, True)


@_jitable
def expect_attend(task: Any, layer: Any, cache_k: Array, tables: Array, tiles: Array) -> None:
    """Ask for the first keys of a task, if there is one of that number."""
    num_tiles, block_size = len(tiles), cache_k.shape[3]
    head = task // num_tiles
    if head < cache_k.shape[2]:
        block = tables[tiles[task - head * num_tiles, 3], 0]
        row = (layer * cache_k.shape[1] + block) * cache_k.shape[2] + head
        fetch(cache_k, row * block_size, min(block_size, 2 * LANES), False)


@_jitable
def attend_task(
    task: Any, thread: Any, layer: Any, scale: Any, qkv: Array, cache_k: Array, cache_v: Array,
    tables: Array, tiles: Array, values: Array, keys: Array, out: Array,
) -> None:  # fmt: skip
    """Attend with the rows of one tile and one head, of qkv (N, 3 C), into out (N, C).

    Tasks are 0 to `len(tiles)` times the heads. `thread` says which of the scratch's `values` and
    `keys` are the caller's alone. qkv and out are each float32 or bfloat16's bits.
    """
    # Indices are unsigned: one that might be negative keeps a loop from being vectorised, and a
    # slice counts its references, which threads would wait for.
    num_tiles = np.uintp(len(tiles))
    head = np.uintp(task) // num_tiles
    tile = np.uintp(task) - head * num_tiles
    first_row, num_rows = np.uintp(tiles[tile, 0]), np.uintp(tiles[tile, 1])
    first_length = np.uintp(tiles[tile, 2] + 1)  # keys that the first row sees
    length = first_length + num_rows - np.uintp(1)
    head_size = qkv.shape[1] // 3 // cache_k.shape[2]
    thread, size = np.uintp(thread), np.uintp(head_size)
    columns, channels, mixtures, scores, stride = _places(head_size)

    _list_keys(layer, head, tables, np.uintp(tiles[tile, 3]), length, cache_k, thread, keys)
    ask(qkv, first_row, num_rows, head * size, size, scale, address(values, thread, 0))

    keys_at = address(keys, thread, 0)
    num_groups = (np.intp(length) + LANES - 1) // LANES
    for panel in range(0, num_groups, PANEL):
        count: Any = min(PANEL, num_groups - panel)
        for index in range(count):
            first = (panel + index) * LANES
            if num_rows == 1:
                # The blocks of a sequence lie anywhere, where no processor looks ahead.
                prefetch(cache_k, keys_at, min(first + _AHEAD, (num_groups - 1) * LANES))
                prefetch(cache_v, keys_at, first)
            out_at = address(values, thread, columns + index * channels * LANES)
            gather_columns(cache_k, keys_at, first, out_at)
        score(
            num_rows, address(values, thread, 0), address(values, thread, columns),
            channels * LANES * 4, size, count,
            address(values, thread, scores + panel * LANES * ROWS),
        )  # fmt: skip
    totals = np.uintp(0)  # the queries have done their duty
    for r in range(num_rows):
        at = address(values, thread, scores + np.intp(r) * LANES)
        values[thread, totals + r] = np.float32(1) / soften(at, first_length + r)
    mix(
        num_rows, cache_v, keys_at, address(values, thread, scores), first_length,
        address(values, thread, mixtures), stride * 4,
    )  # fmt: skip
    for r in range(num_rows):
        at = address(values, thread, mixtures + np.intp(r) * stride)
        put(out, first_row + r, head * size, at, values[thread, totals + r], size)


@_jitable
def _list_keys(
    layer: Any, head: Any, tables: Array, table_row: Any, length: Any, cache: Array, thread: Any,
    keys: Array,
) -> None:  # fmt: skip
    """List the cache's rows with a sequence's keys for one head, by position."""
    num_blocks, num_heads = np.uintp(cache.shape[1]), np.uintp(cache.shape[2])
    block_size = np.uintp(cache.shape[3])
    first = np.uintp(0)
    for at in range((length + block_size - np.uintp(1)) // block_size):
        block = np.uintp(layer) * num_blocks + np.uintp(tables[table_row, at])
        row = (block * num_heads + head) * block_size
        for place in range(min(block_size, length - first)):
            keys[thread, first + place] = np.intp(row + place)
        first += block_size
    # Groups are of 16 keys and tiles of 8 rows, so some more are read, and do not count.
    last = keys[thread, length - np.uintp(1)]
    for place in range(length, length + np.uintp(LANES + ROWS)):
        keys[thread, place] = last


@numba.njit(**KERNEL)
def _attend(
    thread: Any, num_threads: Any, counts: Array, qkv: Array, layer: Any, scale: Any,
    cache_k: Array, cache_v: Array, blocks: Array, offsets: Array, tables: Array, tiles: Array,
    values: Array, keys: Array, out: Array,
) -> None:  # fmt: skip
    num_rows, num_tasks = len(qkv), len(tiles) * cache_k.shape[2]
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
            task, thread, layer, scale, qkv, cache_k, cache_v, tables, tiles, values, keys, out
        )  # fmt: skip
        finish(counts, 1)
    wait(counts, 1, num_tasks)


_list_tiles = numba.njit(**KERNEL)(list_tiles)
