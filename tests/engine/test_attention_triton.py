"""The GPU's kernels against the plain reference: on a GPU, or else in Triton's interpreter."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from engine.attention import PagedAttention
from engine.batch import ModelInput, Span
from engine.kv_cache import LARGEST_FLOAT8, KVCache
from model.config import GPTConfig

pytest.importorskip("triton", reason="triton comes with torch on CUDA and with the test extra")

from engine.attention_triton import PART_TOKENS, TritonPagedAttention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# float32: sums in another order. 16 bits: the output itself is rounded, in the interpreter even
# cut off, and so are the weights of prefill.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCE)

ALL_PREFILL = 10_000  # prompt tokens: more than any position
ALL_DECODE = 0


def make_config(*, n_head: int = 2, head_size: int = 64, n_ctx: int = 96) -> GPTConfig:
    return GPTConfig(
        n_layer=2,
        n_head=n_head,
        n_embd=n_head * head_size,
        n_ctx=n_ctx,
        vocab_size=11,
        scale_attn_by_inverse_layer_idx=True,
    )


def make_cache(
    config: GPTConfig, *, dtype: torch.dtype, block_size: int = 16, num_contexts: int = 4
) -> KVCache:
    """A cache for some contexts, full of other people's numbers."""
    num_blocks = 1 + num_contexts * -(-config.n_ctx // block_size)
    cache = KVCache(
        config, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=DEVICE
    )
    cache.k.copy_(torch.randn(cache.k.shape).to(dtype))
    cache.v.copy_(torch.randn(cache.v.shape).to(dtype))
    return cache


def copy_of(cache: KVCache, config: GPTConfig) -> KVCache:
    num_blocks = cache.k.shape[1]
    twin = KVCache(
        config,
        num_blocks=num_blocks,
        block_size=cache.block_size,
        dtype=cache.k.dtype,
        device=DEVICE,
    )
    twin.k.copy_(cache.k)
    twin.v.copy_(cache.v)
    return twin


def make_input(cache: KVCache, spans: Sequence[tuple[int, int, int]], *, n_ctx: int) -> ModelInput:
    """Rows of sequences, described by (first position, end, number of prompt tokens).

    The blocks of the tables are shuffled, and so are the tables' rows.
    """
    size = cache.block_size
    blocks_each = -(-n_ctx // size)
    tables = (torch.randperm(4 * blocks_each) + 1).view(4, blocks_each).int()
    table_rows = torch.randperm(4)[: len(spans)]
    positions = torch.cat([torch.arange(first, end) for first, end, _ in spans])
    counts = torch.tensor([end - first for first, end, _ in spans])
    rows = torch.repeat_interleave(table_rows, counts)
    is_decode = all(end - first == 1 and first >= prompt for first, end, prompt in spans)
    described = [
        Span(row, first, end, prompt)
        for row, (first, end, prompt) in zip(table_rows.tolist(), spans, strict=True)
    ]
    return ModelInput(
        tokens=torch.zeros_like(positions).to(DEVICE),
        positions=positions.to(DEVICE),
        row_sequences=rows.to(DEVICE),
        block_tables=tables.to(DEVICE),
        slot_blocks=tables[rows, positions // size].long().to(DEVICE),
        slot_offsets=(positions % size).to(DEVICE),
        spans=() if is_decode else tuple(described),
    )


def qkv(config: GPTConfig, num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As the projection leaves them: three parts of the same rows."""
    rows = torch.randn(num_rows, 3 * config.n_embd).to(DEVICE, dtype)
    q, k, v = rows.view(num_rows, 3, config.n_head, config.head_size).unbind(1)
    return q, k, v


def rows_of(batch: ModelInput, rows: slice, spans: tuple[Span, ...]) -> ModelInput:
    """Some rows of a batch as a batch of their own."""
    return ModelInput(
        tokens=batch.tokens[rows],
        positions=batch.positions[rows],
        row_sequences=batch.row_sequences[rows],
        block_tables=batch.block_tables,
        slot_blocks=batch.slot_blocks[rows],
        slot_offsets=batch.slot_offsets[rows],
        spans=spans,
    )


SPANS = {
    "a whole prompt": [(0, 70, 70)],
    "chunks of prompts": [(0, 9, 30), (20, 37, 40), (63, 66, 90)],
    "decoding": [(5, 6, 3), (0, 1, 0), (63, 64, 10), (95, 96, 95)],
    "completions computed again": [(10, 20, 10), (40, 43, 8)],
    "both classes": [(3, 4, 3), (30, 50, 42), (77, 78, 5), (0, 4, 9)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS.keys())
def test_kernels_equal_the_reference(spans: list[tuple[int, int, int]], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = make_config()
    cache = make_cache(config, dtype=dtype)
    twin = copy_of(cache, config)
    batch = make_input(cache, spans, n_ctx=config.n_ctx)
    kernels = TritonPagedAttention(config, cache, batch)
    reference = PagedAttention(config, twin, batch)

    for layer in range(config.n_layer):
        q, k, v = qkv(config, len(batch.positions), dtype)
        ours, theirs = kernels(layer, q, k, v), reference(layer, q, k, v)

        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(cache.k, twin.k)
    assert torch.equal(cache.v, twin.v)


@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS.keys())
def test_a_cache_of_8_bits_is_read_and_written_as_the_reference_does(
    spans: list[tuple[int, int, int]],
) -> None:
    torch.manual_seed(0)
    config = make_config()
    cache = make_cache(config, dtype=torch.float8_e4m3fn)
    twin = copy_of(cache, config)
    batch = make_input(cache, spans, n_ctx=config.n_ctx)
    q, k, v = qkv(config, len(batch.positions), torch.bfloat16)
    v[0] = 1000.0  # as the largest there is

    ours = TritonPagedAttention(config, cache, batch)(0, q, k, v)
    theirs = PagedAttention(config, twin, batch)(0, q, k, v)

    tolerance = TOLERANCE[torch.bfloat16]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert torch.equal(cache.k.float(), twin.k.float())
    assert torch.equal(cache.v.float(), twin.v.float())
    assert cache.v.float().max() == LARGEST_FLOAT8


@pytest.mark.parametrize("prompt", [ALL_PREFILL, ALL_DECODE])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_in_8_bits_what_is_no_number_stays_so_and_infinity_is_the_largest(
    broken: float, prompt: int
) -> None:
    torch.manual_seed(0)
    config = make_config()
    cache = make_cache(config, dtype=torch.float8_e4m3fn)
    twin = copy_of(cache, config)
    # Two sequences: of the first, whose value is broken, a token sees it in any case.
    batch = make_input(cache, [(17, 18, prompt), (70, 71, prompt)], n_ctx=config.n_ctx)
    q, k, v = qkv(config, 2, torch.bfloat16)
    v[0, 0, 3] = broken

    ours = TritonPagedAttention(config, cache, batch)(0, q, k, v)
    theirs = PagedAttention(config, twin, batch)(0, q, k, v)

    place = (0, int(batch.slot_blocks[0]), 0, int(batch.slot_offsets[0]), 3)
    stored = cache.v.float()[place].item()
    torch.testing.assert_close(cache.v.float(), twin.v.float(), rtol=0, atol=0, equal_nan=True)
    assert math.isnan(stored) or stored == math.copysign(LARGEST_FLOAT8, broken)
    assert math.isnan(stored) == math.isnan(broken)
    if math.isnan(broken) and prompt == ALL_PREFILL and DEVICE == "cpu":
        return  # Triton's interpreter reads NaN of 8 bits as 480; a row being decoded has its own
    tolerance = TOLERANCE[torch.bfloat16]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
    # No other channel, head or sequence.
    assert ours.isnan().nonzero().tolist() == ([[0, 0, 3]] if math.isnan(broken) else [])


@pytest.mark.parametrize("prompt", [ALL_PREFILL, ALL_DECODE])
@pytest.mark.parametrize(
    ("n_head", "head_size", "block_size"),
    [(1, 1, 1), (3, 5, 3), (2, 16, 4), (1, 80, 16), (1, 128, 32)],
)
def test_kernels_take_any_head_and_block_size(
    n_head: int, head_size: int, block_size: int, prompt: int
) -> None:
    torch.manual_seed(0)
    config = make_config(n_head=n_head, head_size=head_size)
    cache = make_cache(config, dtype=torch.float32, block_size=block_size)
    twin = copy_of(cache, config)
    batch = make_input(cache, [(17, 19, prompt), (70, 71, prompt)], n_ctx=config.n_ctx)
    q, k, v = qkv(config, 3, torch.float32)

    ours = TritonPagedAttention(config, cache, batch)(1, q, k, v)

    theirs = PagedAttention(config, twin, batch)(1, q, k, v)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(cache.k, twin.k)
    assert torch.equal(cache.v, twin.v)


@pytest.mark.parametrize("length", [1, PART_TOKENS, PART_TOKENS + 1, 3 * PART_TOKENS - 7])
def test_decoding_adds_up_the_parts_of_a_long_sequence(length: int) -> None:
    torch.manual_seed(0)
    config = make_config(n_ctx=3 * PART_TOKENS)
    cache = make_cache(config, dtype=torch.float32)
    twin = copy_of(cache, config)
    batch = make_input(cache, [(length - 1, length, 1), (299, 300, 1)], n_ctx=config.n_ctx)
    kernels = TritonPagedAttention(config, cache, batch)
    reference = PagedAttention(config, twin, batch)

    for layer in range(config.n_layer):  # the second finds the counts as the first left them
        q, k, v = qkv(config, 2, torch.float32)
        ours, theirs = kernels(layer, q, k, v), reference(layer, q, k, v)

        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_decode_row_has_the_same_bytes_alone_and_among_others(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = make_config(n_ctx=3 * PART_TOKENS)
    cache = make_cache(config, dtype=dtype)
    # Beside a prompt the keys are written first, alone they are taken as they come.
    batch = make_input(cache, [(300, 301, 4), (7, 9, 90), (64, 65, 3)], n_ctx=config.n_ctx)
    q, k, v = qkv(config, 4, torch.bfloat16 if dtype.itemsize == 1 else dtype)
    together = TritonPagedAttention(config, copy_of(cache, config), batch)(0, q, k, v)

    for row in (0, 3):
        one = slice(row, row + 1)
        alone = TritonPagedAttention(config, cache, rows_of(batch, one, ()))
        y = alone(0, q[one], k[one], v[one])

        assert torch.equal(y[0], together[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_program_for_all_parts_gives_the_bytes_of_one_for_each(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # With so many heads, eight rows are enough for one program a pair; one row has one a part.
    config = make_config(n_head=64, head_size=4, n_ctx=3 * PART_TOKENS)
    cache = make_cache(config, dtype=dtype, num_contexts=8)
    ends = [1, PART_TOKENS, PART_TOKENS + 1, 2 * PART_TOKENS, 300, 384, 70, 200]
    tables = torch.randperm(8 * config.n_ctx // cache.block_size).view(8, -1) + 1
    many = ModelInput(
        tokens=torch.zeros(8, dtype=torch.long, device=DEVICE),
        positions=torch.tensor(ends, device=DEVICE) - 1,
        row_sequences=torch.arange(8, device=DEVICE),
        block_tables=tables.int().to(DEVICE),
        slot_blocks=torch.zeros(8, dtype=torch.long, device=DEVICE),  # the kernels find their own
        slot_offsets=torch.zeros(8, dtype=torch.long, device=DEVICE),
    )
    q, k, v = qkv(config, 8, dtype)
    together = TritonPagedAttention(config, copy_of(cache, config), many)(0, q, k, v)

    for row in range(8):
        one = slice(row, row + 1)
        alone = TritonPagedAttention(config, copy_of(cache, config), rows_of(many, one, ()))

        assert torch.equal(alone(0, q[one], k[one], v[one])[0], together[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prompt_row_has_the_same_bytes_however_the_prompt_is_cut(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = make_config(n_head=1)
    cache = make_cache(config, dtype=dtype)
    batch = make_input(cache, [(0, 90, 90)], n_ctx=config.n_ctx)
    q, k, v = qkv(config, 90, dtype)
    whole = TritonPagedAttention(config, copy_of(cache, config), batch)(0, q, k, v)
    table_row = batch.spans[0].table_row

    for start, end in [(0, 1), (1, 37), (37, 64), (64, 90)]:
        rows = slice(start, end)
        chunk = rows_of(batch, rows, (Span(table_row, start, end, 90),))
        y = TritonPagedAttention(config, cache, chunk)(0, q[rows], k[rows], v[rows])

        assert torch.equal(y, whole[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_completion_computed_again_has_the_bytes_it_was_decoded_with(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = make_config(n_head=1)
    cache = make_cache(config, dtype=dtype)
    batch = make_input(cache, [(0, 30, 20)], n_ctx=config.n_ctx)
    q, k, v = qkv(config, 30, dtype)
    again = TritonPagedAttention(config, copy_of(cache, config), batch)(0, q, k, v)
    prompt = rows_of(batch, slice(20), (Span(batch.spans[0].table_row, 0, 20, 20),))
    TritonPagedAttention(config, cache, prompt)(0, q[:20], k[:20], v[:20])

    for row in range(20, 30):
        one = slice(row, row + 1)
        step = TritonPagedAttention(config, cache, rows_of(batch, one, ()))

        assert torch.equal(step(0, q[one], k[one], v[one])[0], again[row])


@pytest.mark.parametrize("prompt", [ALL_PREFILL, ALL_DECODE])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(
            torch.float8_e4m3fn,
            marks=pytest.mark.skipif(
                DEVICE == "cpu", reason="the interpreter knows no NaN of 8 bits"
            ),
        ),
    ],
    ids=str,
)
def test_a_broken_key_breaks_its_own_sequence_and_no_other(dtype: torch.dtype, prompt: int) -> None:
    torch.manual_seed(0)
    config = make_config()
    cache = make_cache(config, dtype=dtype)
    batch = make_input(cache, [(0, 10, prompt), (0, 10, prompt)], n_ctx=config.n_ctx)
    q, k, v = qkv(config, 20, torch.float32)
    healthy = TritonPagedAttention(config, cache, batch)(0, q, k, v)
    k[4] = torch.nan

    y = TritonPagedAttention(config, cache, batch)(0, q, k, v)

    assert not torch.isfinite(y[4:10]).any()
    assert torch.equal(y[10:], healthy[10:])


def test_padding_writes_to_the_null_block_alone() -> None:
    config = make_config()
    cache = make_cache(config, dtype=torch.float32)
    before = cache.k.clone()
    batch = ModelInput(
        tokens=torch.zeros(3, dtype=torch.long, device=DEVICE),
        positions=torch.zeros(3, dtype=torch.long, device=DEVICE),
        row_sequences=torch.zeros(3, dtype=torch.long, device=DEVICE),
        block_tables=torch.zeros(1, 6, dtype=torch.int32, device=DEVICE),
        slot_blocks=torch.zeros(3, dtype=torch.long, device=DEVICE),
        slot_offsets=torch.zeros(3, dtype=torch.long, device=DEVICE),
    )

    y = TritonPagedAttention(config, cache, batch)(0, *qkv(config, 3, torch.float32))

    assert y.isfinite().all()
    assert torch.equal(cache.k[:, 1:], before[:, 1:])
