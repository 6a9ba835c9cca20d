"""Attention over the paged cache on a GPU: kernels in Triton that walk the block table.

Whatever a row gets depends on its sequence alone. Keys are taken in tiles that begin at fixed
positions, and every K and V, the chunk's own included, is as the cache holds it. Rows come in two
classes, each with its own arithmetic: positions of the prompt are prefill, later ones decode, also
where a sequence is computed again.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.batch import ModelInput
from engine.kv_cache import KVCache
from engine.triton_operands import operand_type
from model.config import GPTConfig

PART_TOKENS = 128  # keys of a sequence that decoding takes at once, whatever the batch
# From so many pairs of row and head on, each has one program, which takes its parts in turn; fewer
# would leave multiprocessors idle, so there every part has its own. The bits are the same. Beside a
# prompt, which keeps them busy, one program serves however few.
_MANY_PAIRS = 512
# Positions of one sequence, and keys, in a tile of prefill. Without tensor cores, which have no
# float32, large ones do not fit into the registers.
_PREFILL_TILE = {
    torch.float32: (16, 32),
    torch.float16: (64, 64),
    torch.bfloat16: (64, 64),
    torch.float8_e4m3fn: (64, 64),  # of a cache; the model's own is bfloat16
}


class TritonPagedAttention:
    """An `Attend` equal to `PagedAttention`, for float32, float16 and bfloat16 and any head size.

    The cache holds the same, or beside bfloat16 8 bits.

    A step that only decodes takes one kernel a layer, which also writes the new key and value. The
    keys of a sequence are cut into parts, which are added up in order of position: by the one
    program that takes them in turn or, where each part has its own, by the last of these to end
    (split keys: Dao et al., 2023, "Flash-Decoding"). Otherwise K and V of all rows are written
    first, then prefill and decode rows read them, a kernel each. Prefill is tiled as in
    FlashAttention-2 (Dao, 2023, arXiv:2307.08691).
    """

    def __init__(
        self,
        config: GPTConfig,
        cache: KVCache,
        batch: ModelInput,
        num_done: Tensor | None = None,
    ) -> None:
        """Prepare a step; nothing is read back to the host.

        `num_done` is of `TritonAttention`; a step of its own has counts of its own.
        """
        device = batch.positions.device
        assert batch.positions.is_contiguous(), "kernels know no stride"
        assert batch.row_sequences.is_contiguous(), "kernels know no stride"
        assert batch.block_tables.is_contiguous(), "kernels know no stride"
        self._scales = [config.attention_scale(layer) for layer in range(config.n_layer)]
        self._cache = cache
        self._batch = batch
        self._n_head, self._head_size = config.n_head, config.head_size
        self._is_decode = not batch.spans
        if self._is_decode:
            self._tiles: Tensor | None = None
            self._rows: Tensor | None = None
            num_rows = len(batch.positions)
        else:
            tiles, rows = _classes(batch, _PREFILL_TILE[cache.k.dtype][0])
            self._tiles = torch.from_numpy(tiles).to(device, non_blocking=True)
            self._rows = torch.from_numpy(rows).to(device, non_blocking=True)
            num_rows = len(rows)
        self._num_decode_rows = num_rows
        length = batch.block_tables.shape[1] * cache.block_size
        in_turn = not self._is_decode or num_rows * config.n_head >= _MANY_PAIRS
        self._num_programs = 1 if in_turn else -(-length // PART_TOKENS)  # of a pair
        # Scratch of the decode rows: sums, maxima and mixtures of the parts.
        parts = (num_rows, config.n_head, self._num_programs)
        self._padded_size = max(16, triton.next_power_of_2(config.head_size))
        # A thread holds 32 registers of keys, and as many of values.
        num_bytes = PART_TOKENS * self._padded_size * cache.k.itemsize
        self._num_warps = min(16, max(4, num_bytes // (32 * 32 * 4)))
        self._mixtures = torch.empty(*parts, self._padded_size, device=device)
        self._maxima = torch.empty(parts, device=device)
        self._totals = torch.empty(parts, device=device)
        self._num_done = _new_counts(device) if num_done is None else num_done

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend in layer `layer`: q, k, v (N, H, D) -> (N, H, D)."""
        assert all(t.stride()[1:] == (self._head_size, 1) for t in (q, k, v)), "heads lie in a row"
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if not self._is_decode:
            self._write(layer, k, v)
            self._prefill(layer, q, out)
        if self._num_decode_rows:
            self._decode(layer, q, k, v, out)
        return out

    def _write(self, layer: int, k: Tensor, v: Tensor) -> None:
        cache, batch = self._cache, self._batch
        width = self._n_head * self._head_size
        _write_kernel[(len(k),)](
            k, v, cache.k[layer], cache.v[layer],
            batch.positions, batch.row_sequences, batch.block_tables,
            k.stride(0), v.stride(0), batch.block_tables.stride(0), cache.k.stride(1),
            WIDTH=width, PADDED_WIDTH=triton.next_power_of_2(width),
            D=self._head_size, BLOCK_SIZE=cache.block_size,
        )  # fmt: skip

    def _prefill(self, layer: int, q: Tensor, out: Tensor) -> None:
        assert self._tiles is not None
        if not len(self._tiles):
            return
        cache, batch = self._cache, self._batch
        num_queries, num_keys = _PREFILL_TILE[cache.k.dtype]
        _prefill_kernel[(len(self._tiles), self._n_head)](
            q, out, cache.k[layer], cache.v[layer], self._tiles, batch.block_tables,
            self._scales[layer],
            q.stride(0), out.stride(0), batch.block_tables.stride(0), cache.k.stride(1),
            D=self._head_size, PADDED_D=self._padded_size, BLOCK_SIZE=cache.block_size,
            QUERIES=num_queries, KEYS=num_keys, OPERAND=operand_type(q.dtype),
            num_warps=4, num_stages=1 if q.dtype == torch.float32 else 2,
            enable_fp_fusion=True,
        )  # fmt: skip

    def _decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        cache, batch = self._cache, self._batch
        _decode_kernel[(self._num_decode_rows, self._n_head, self._num_programs)](
            q, k, v, out, cache.k[layer], cache.v[layer],
            # Unused where every row decodes, but a pointer all the same.
            batch.positions if self._rows is None else self._rows,
            batch.positions, batch.row_sequences, batch.block_tables,
            self._mixtures, self._maxima, self._totals, self._num_done,
            self._scales[layer],
            q.stride(0), k.stride(0), v.stride(0), out.stride(0),
            batch.block_tables.stride(0), cache.k.stride(1),
            D=self._head_size, PADDED_D=self._padded_size, BLOCK_SIZE=cache.block_size,
            PART=PART_TOKENS, ALL_ROWS=self._is_decode, IN_TURN=self._num_programs == 1,
            # Without fused multiplication and addition: where a compiler fuses is its own affair,
            # and the variants of this kernel must give the same bits.
            num_warps=self._num_warps, enable_fp_fusion=False,
        )  # fmt: skip


class TritonAttention:
    """Makes a `TritonPagedAttention` for each step, all of which count parts in the same place.

    The counts are zero between layers, since whoever is last leaves them so. To make new ones in
    each step would be a kernel more.
    """

    def __init__(self, device: torch.device) -> None:
        self._num_done = _new_counts(device)

    def __call__(
        self, config: GPTConfig, cache: KVCache, batch: ModelInput
    ) -> TritonPagedAttention:
        """Prepare a step."""
        return TritonPagedAttention(config, cache, batch, self._num_done)


def _new_counts(device: torch.device) -> Tensor:
    """How many parts are in, of each pair of row and head: where these are many, none count."""
    return torch.zeros(_MANY_PAIRS, dtype=torch.int32, device=device)


def _classes(batch: ModelInput, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort the rows of a step into tiles of prefill and rows of decoding.

    A tile (int32) holds the rows of one sequence at neighbouring positions, from a multiple of
    `num_queries` on: so a row has its place in a tile for good. It is the row that position 0
    would have, its first position, the first position and the end of those that are there, and
    the row of the block tables.
    """
    tiles: list[tuple[int, int, int, int, int]] = []
    rows: list[int] = []
    first_row = 0
    for span in batch.spans:
        row_of_0 = first_row - span.start
        end_of_prefill = max(span.start, min(span.num_prompt_tokens, span.end))
        aligned = span.start // num_queries * num_queries
        for first in range(aligned, end_of_prefill, num_queries):
            there = (max(first, span.start), min(first + num_queries, end_of_prefill))
            if there[0] < there[1]:
                tiles.append((row_of_0, first, *there, span.table_row))
        rows.extend(range(row_of_0 + end_of_prefill, row_of_0 + span.end))
        first_row = row_of_0 + span.end
    return np.array(tiles, np.int32).reshape(-1, 5), np.array(rows, np.int32)


@triton.jit(do_not_specialize_on_alignment=["positions", "row_sequences"])
def _write_kernel(
    k, v, cache_k, cache_v, positions, row_sequences, tables,
    k_stride, v_stride, table_stride, block_stride,
    WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Store k and v of one row, all heads."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row)
    table = tables + tl.load(row_sequences + row) * table_stride
    block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
    channel = tl.arange(0, PADDED_WIDTH)
    is_channel = channel < WIDTH
    place = (channel // D) * (BLOCK_SIZE * D) + (position % BLOCK_SIZE) * D + channel % D
    to = block * block_stride + place
    key = tl.load(k + row * k_stride + channel, mask=is_channel, other=0.0)
    value = tl.load(v + row * v_stride + channel, mask=is_channel, other=0.0)
    key = _as_stored(key, cache_k).to(cache_k.dtype.element_ty)
    value = _as_stored(value, cache_v).to(cache_v.dtype.element_ty)
    tl.store(cache_k + to, key, mask=is_channel)
    tl.store(cache_v + to, value, mask=is_channel)


@triton.jit
def _prefill_kernel(
    q, out, cache_k, cache_v, tiles, tables, scale,
    q_stride, out_stride, table_stride, block_stride,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Attend for the rows of one tile in one head."""
    tile = tiles + tl.program_id(0) * 5
    head = tl.program_id(1)
    row_of_0 = tl.load(tile).to(tl.int64)
    positions = tl.load(tile + 1) + tl.arange(0, QUERIES)
    start = tl.load(tile + 2)
    end = tl.load(tile + 3)
    table = tables + tl.load(tile + 4).to(tl.int64) * table_stride

    d = tl.arange(0, PADDED_D)
    is_there = (positions >= start) & (positions < end)
    is_value = is_there[:, None] & (d < D)[None, :]
    rows = (row_of_0 + positions)[:, None]
    query = tl.load(q + rows * q_stride + head * D + d[None, :], mask=is_value, other=0.0)
    query = query.to(OPERAND)
    maximum = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixture = tl.zeros((QUERIES, PADDED_D), tl.float32)
    # A tile of keys that a row does not see changes nothing of it, to the bit: all its weights
    # are 0 and its factor is 1. So it does not matter how far the other rows look.
    for first_key in range(0, end, KEYS):
        places = first_key + tl.arange(0, KEYS)
        is_written = places < end
        block = tl.load(table + places // BLOCK_SIZE, mask=is_written, other=0).to(tl.int64)
        place = block * block_stride + head * (BLOCK_SIZE * D) + (places % BLOCK_SIZE) * D
        at = place[:, None] + d[None, :]
        is_value_of_key = is_written[:, None] & (d < D)[None, :]
        keys = tl.load(cache_k + at, mask=is_value_of_key, other=0.0).to(OPERAND)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(places[None, :] <= positions[:, None], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        factor = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum[:, None])
        total = total * factor + tl.sum(weights, 1)
        values = tl.load(cache_v + at, mask=is_value_of_key, other=0.0).to(OPERAND)
        mixture = mixture * factor[:, None]
        mixture = tl.dot(weights.to(OPERAND), values, mixture, input_precision="ieee")
        maximum = new_maximum
    mixture = mixture / total[:, None]
    at = rows * out_stride + head * D + d[None, :]
    tl.store(out + at, mixture.to(out.dtype.element_ty), mask=is_value)


@triton.jit
def _as_stored(values, cache):
    """Round values to what a cache holds, in float32; in 8 bits what is too large is the largest.

    Rounded here and not by a conversion, whose result Triton 3.6 cannot convert back: its compiler
    aborts. Also, it then does not matter how a conversion rounds.
    """
    if cache.dtype.element_ty == tl.float8e4nv:
        values = values.to(tl.float32)
        values = tl.where(values > 448.0, 448.0, values)  # not minimum: NaN must stay NaN
        values = tl.where(values < -448.0, -448.0, values)
        # A conversion may cut or round a NaN's bits, and of most a number is left: not of these.
        no_number = tl.full((), 0x7FF00000, tl.int32).to(tl.float32, bitcast=True)
        # To nearest and even: beside 2^23 eighths of a value's power of two (from 2^-6 on) there
        # is no place for more than three bits of it.
        power = (values.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        magic = tl.where(power < 0.015625, 0.015625, power) * (1.5 * 1048576.0)
        return tl.where(values == values, (values + magic) - magic, no_number)
    else:
        return values.to(cache.dtype.element_ty).to(tl.float32)


@triton.jit
def _part(
    first_key, length, query, table, cache_k, cache_v, head, own_key, own_value, block_stride,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PART: tl.constexpr, ALL_ROWS: tl.constexpr,
):  # fmt: skip
    """Attend to the keys of one part: maximum of the scores, sum and mixture of the weights."""
    d = tl.arange(0, PADDED_D)
    places = first_key + tl.arange(0, PART)
    is_seen = places < length
    block = tl.load(table + places // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)
    place = block * block_stride + head * (BLOCK_SIZE * D) + (places % BLOCK_SIZE) * D
    at = place[:, None] + d[None, :]
    is_value = is_seen[:, None] & (d < D)[None, :]
    keys = tl.load(cache_k + at, mask=is_value, other=0.0).to(tl.float32)
    values = tl.load(cache_v + at, mask=is_value, other=0.0).to(tl.float32)
    if ALL_ROWS:
        is_own = (places == length - 1)[:, None]
        keys = tl.where(is_own, own_key[None, :], keys)
        values = tl.where(is_own, own_value[None, :], values)
    scores = tl.sum(keys * query[None, :], 1)
    scores = tl.where(is_seen, scores, float("-inf"))
    maximum = tl.max(scores, 0)
    weights = tl.exp(scores - maximum)
    return maximum, tl.sum(weights, 0), tl.sum(weights[:, None] * values, 0)


@triton.jit
def _add_part(maximum, total, mixture, other_maximum, other_total, other_mixture):
    """Add a part to the sum of those before it."""
    new_maximum = tl.maximum(maximum, other_maximum)
    factor = tl.exp(maximum - new_maximum)
    other_factor = tl.exp(other_maximum - new_maximum)
    return (
        new_maximum,
        total * factor + other_total * other_factor,
        mixture * factor + other_mixture * other_factor,
    )


# An address of the little arrays may be a multiple of 16 or not, as the number of rows has it:
# specialised to that, it would be another program for one row than for two.
@triton.jit(do_not_specialize_on_alignment=["rows", "positions", "row_sequences"])
def _decode_kernel(
    q, k, v, out, cache_k, cache_v,
    rows, positions, row_sequences, tables,
    mixtures, maxima, totals, num_done, scale,
    q_stride, k_stride, v_stride, out_stride,
    table_stride, block_stride,
    D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PART: tl.constexpr, ALL_ROWS: tl.constexpr, IN_TURN: tl.constexpr,
):  # fmt: skip
    """Attend for one row in one head: to all its keys, part by part, or to those of one part.

    With ALL_ROWS each row is alone in its sequence: the program that sees the row's own key stores
    it, and takes it as it came, since none may count on another's store. The bits are those that
    the cache gets.
    """
    index = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = index
    if not ALL_ROWS:
        row = tl.load(rows + index).to(tl.int64)
    position = tl.load(positions + row).to(tl.int32)
    length = position + 1
    first_key = tl.program_id(2) * PART
    if first_key >= length:
        return
    table = tables + tl.load(row_sequences + row).to(tl.int64) * table_stride

    d = tl.arange(0, PADDED_D)
    is_d = d < D
    query = tl.load(q + row * q_stride + head * D + d, mask=is_d, other=0.0).to(tl.float32) * scale
    own_key = query  # of no use but where all rows decode
    own_value = query
    if ALL_ROWS:
        own_key = tl.load(k + row * k_stride + head * D + d, mask=is_d, other=0.0)
        own_value = tl.load(v + row * v_stride + head * D + d, mask=is_d, other=0.0)
        own_key = _as_stored(own_key, cache_k)
        own_value = _as_stored(own_value, cache_v)
        if (position < first_key + PART) | IN_TURN:
            block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
            place = block * block_stride + head * (BLOCK_SIZE * D) + (position % BLOCK_SIZE) * D
            tl.store(cache_k + place + d, own_key.to(cache_k.dtype.element_ty), mask=is_d)
            tl.store(cache_v + place + d, own_value.to(cache_v.dtype.element_ty), mask=is_d)

    maximum, total, mixture = _part(
        first_key, length, query, table, cache_k, cache_v, head, own_key, own_value, block_stride,
        D, PADDED_D, BLOCK_SIZE, PART, ALL_ROWS,
    )  # fmt: skip
    to = out + row * out_stride + head * D + d
    if IN_TURN:
        for first in range(PART, length, PART):
            other_maximum, other_total, other_mixture = _part(
                first, length, query, table, cache_k, cache_v, head, own_key, own_value,
                block_stride, D, PADDED_D, BLOCK_SIZE, PART, ALL_ROWS,
            )  # fmt: skip
            maximum, total, mixture = _add_part(
                maximum, total, mixture, other_maximum, other_total, other_mixture
            )
        tl.store(to, (mixture / total).to(out.dtype.element_ty), mask=is_d)
    elif length <= PART:  # the only part
        tl.store(to, (mixture / total).to(out.dtype.element_ty), mask=is_d)
    else:
        pair = index * tl.num_programs(1) + head
        part = pair * tl.num_programs(2) + tl.program_id(2)
        tl.store(mixtures + part * PADDED_D + d, mixture)
        tl.store(maxima + part, maximum)
        tl.store(totals + part, total)
        # All threads' stores come before the count, and the count before the loads of the last one.
        tl.debug_barrier()
        num_parts = tl.cdiv(length, PART)
        if tl.atomic_add(num_done + pair, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
            tl.debug_barrier()
            # .cg: from the cache that all multiprocessors share.
            at = pair * tl.num_programs(2)
            maximum = tl.load(maxima + at, cache_modifier=".cg")
            total = tl.load(totals + at, cache_modifier=".cg")
            mixture = tl.load(mixtures + at * PADDED_D + d, cache_modifier=".cg")
            for other in range(1, num_parts):
                other_maximum = tl.load(maxima + at + other, cache_modifier=".cg")
                other_total = tl.load(totals + at + other, cache_modifier=".cg")
                other_mixture = tl.load(
                    mixtures + (at + other) * PADDED_D + d, cache_modifier=".cg"
                )
                maximum, total, mixture = _add_part(
                    maximum, total, mixture, other_maximum, other_total, other_mixture
                )
            tl.store(to, (mixture / total).to(out.dtype.element_ty), mask=is_d)
            tl.store(num_done + pair, 0)  # for the next layer
