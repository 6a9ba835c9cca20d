"""The CPU kernels against the plain reference, and both against attention without a cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.attention import PagedAttention
from engine.attention_cpu import CPUPagedAttention
from engine.batch import ModelInput
from engine.config import EngineConfig
from engine.cpu_features import processor
from engine.kv_cache import KVCache
from model.attention import CausalAttention
from model.config import GPTConfig

# float32: a few roundings of the sum; bfloat16: the output itself is rounded, to 2^-8 of its size.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.bfloat16]
CACHES = [*DTYPES, torch.int8]


def make_config(*, n_head: int = 3, head_size: int = 8, n_ctx: int = 64) -> GPTConfig:
    return GPTConfig(
        n_layer=2,
        n_head=n_head,
        n_embd=n_head * head_size,
        n_ctx=n_ctx,
        vocab_size=11,
        scale_attn_by_inverse_layer_idx=True,
    )


def make_cache(
    config: GPTConfig, *, dtype: torch.dtype, block_size: int = 4, num_blocks: int | None = None
) -> KVCache:
    num_blocks = num_blocks or 1 + 4 * -(-config.n_ctx // block_size)
    cache = KVCache(config, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device="cpu")
    # What is not yet written must not matter, as long as it is finite.
    for tensor in (cache.k, cache.v):
        if dtype == torch.int8:
            tensor.random_(-127, 128)
            scales = torch.rand(tensor.shape[:-1]) / 64
            tensor[..., config.head_size :] = scales[..., None].view(torch.int8)
        else:
            tensor.copy_(torch.randn(tensor.shape))
    return cache


def rounded(x: Tensor) -> Tensor:
    """What 8 bits with a scale for the last dimension hold of x."""
    largest = x.float().abs().amax(-1, keepdim=True)
    factors = torch.full_like(largest, 127) / largest
    codes = (x.double() * factors.double()).round()  # exact, and so are ties
    return codes.float() * (largest / 127)


def exact(cache: KVCache, config: GPTConfig) -> KVCache:
    """The numbers that a cache of 8 bits stands for."""
    shape = {"num_blocks": cache.k.shape[1], "block_size": cache.block_size}
    twin = KVCache(config, **shape, dtype=torch.float32, device="cpu")
    for ours, theirs in ((cache.k, twin.k), (cache.v, twin.v)):
        codes, scales = ours[..., : config.head_size], ours[..., config.head_size :]
        theirs.copy_(codes * scales.contiguous().view(torch.float32))
    return twin


def make_input(cache: KVCache, spans: list[tuple[int, int]], *, n_ctx: int) -> ModelInput:
    """Rows for sequence s at positions spans[s]; tables are shuffled blocks."""
    size = cache.block_size
    blocks_each = -(-n_ctx // size)
    order = torch.randperm(len(spans) * blocks_each) + 1
    tables = order.view(len(spans), blocks_each).int()
    positions = torch.cat([torch.arange(first, end) for first, end in spans])
    counts = torch.tensor([end - first for first, end in spans])
    rows = torch.repeat_interleave(torch.arange(len(spans)), counts)
    return ModelInput(
        tokens=torch.zeros_like(positions),
        positions=positions,
        row_sequences=rows,
        block_tables=tables,
        slot_blocks=tables[rows, positions // size].long(),
        slot_offsets=positions % size,
    )


def qkv(config: GPTConfig, num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    shape = (3, num_rows, config.n_head, config.head_size)
    q, k, v = torch.randn(shape).to(dtype if dtype.is_floating_point else torch.float32).unbind()
    return q, k, v


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    n_head=st.integers(1, 4),
    head_size=st.sampled_from([1, 5, 8, 16, 48, 64, 80, 128]),
    block_size=st.sampled_from([1, 3, 4, 16]),
    spans=st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 20)).map(lambda x: (x[0], x[0] + x[1])),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 2**31),
)
def test_cpu_kernel_equals_the_reference(
    dtype: torch.dtype,
    n_head: int,
    head_size: int,
    block_size: int,
    spans: list[tuple[int, int]],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    config = make_config(n_head=n_head, head_size=head_size)
    cache = make_cache(config, dtype=dtype, block_size=block_size)
    twin = make_cache(config, dtype=dtype, block_size=block_size)
    twin.k.copy_(cache.k)
    twin.v.copy_(cache.v)
    batch = make_input(cache, spans, n_ctx=config.n_ctx)
    kernel = CPUPagedAttention(config, cache, batch)
    reference = PagedAttention(config, twin, batch)

    for layer in range(config.n_layer):
        q, k, v = qkv(config, len(batch.positions), dtype)
        ours, theirs = kernel(layer, q, k, v), reference(layer, q, k, v)

        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(cache.k, twin.k)
    assert torch.equal(cache.v, twin.v)


@pytest.mark.parametrize("head_size", [1, 5, 16, 17, 64, 100, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bits_are_a_scale_times_whole_numbers(dtype: torch.dtype, head_size: int) -> None:
    torch.manual_seed(head_size)
    config = make_config(head_size=head_size)
    cache = make_cache(config, dtype=torch.int8)
    batch = make_input(cache, [(3, 30), (40, 41)], n_ctx=config.n_ctx)
    twin = exact(cache, config)
    q, k, v = qkv(config, 28, dtype)

    y = CPUPagedAttention(config, cache, batch)(1, q, k, v)

    expected = PagedAttention(config, twin, batch)(1, q.float(), rounded(k), rounded(v))
    torch.testing.assert_close(y.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(exact(cache, config).k, twin.k, rtol=1e-6, atol=0)


@pytest.mark.parametrize("computes", DTYPES)
@pytest.mark.parametrize("stores", DTYPES)
def test_the_cache_may_be_of_another_precision(computes: torch.dtype, stores: torch.dtype) -> None:
    config = make_config(head_size=64)
    cache = make_cache(config, dtype=stores)
    batch = make_input(cache, [(0, 40)], n_ctx=config.n_ctx)
    q, k, v = qkv(config, 40, computes)

    y = CPUPagedAttention(config, cache, batch)(0, q, k, v)

    expected = CausalAttention(config)(0, q.float(), k.to(stores).float(), v.to(stores).float())
    tolerance = TOLERANCE[computes]
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("head_size", [5, 64, 80])
def test_a_row_has_the_same_bytes_for_any_size_of_blocks_and_chunks(
    dtype: torch.dtype, head_size: int
) -> None:
    config = make_config(n_head=2, head_size=head_size)
    q, k, v = qkv(config, 60, dtype)
    whole: Tensor | None = None
    for block_size, chunk in ((16, 60), (1, 7), (3, 60), (7, 13), (16, 1), (24, 8), (64, 32)):
        cache = make_cache(config, dtype=dtype, block_size=block_size)
        batch = make_input(cache, [(0, 60)], n_ctx=config.n_ctx)
        parts = []
        for first in range(0, 60, chunk):
            rows = slice(first, min(first + chunk, 60))
            kernel = CPUPagedAttention(config, cache, rows_of(batch, rows))
            parts.append(kernel(1, q[rows], k[rows], v[rows]))
        y = torch.cat(parts)

        whole = y if whole is None else whole
        assert torch.equal(y, whole), (block_size, chunk)


@pytest.mark.parametrize("attention", [PagedAttention, CPUPagedAttention])
def test_paged_attention_over_a_whole_sequence_equals_causal_attention(
    attention: type[PagedAttention] | type[CPUPagedAttention],
) -> None:
    config = make_config()
    cache = make_cache(config, dtype=torch.float32)
    batch = make_input(cache, [(0, 40)], n_ctx=config.n_ctx)
    q, k, v = qkv(config, 40, torch.float32)

    y = attention(config, cache, batch)(1, q, k, v)

    expected = CausalAttention(config)(1, q, k, v)
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", CACHES)
def test_a_row_has_the_same_bytes_whatever_rows_come_with_it(dtype: torch.dtype) -> None:
    config = make_config(n_head=2, head_size=64)
    cache = make_cache(config, dtype=dtype)
    batch = make_input(cache, [(0, 50), (20, 33)], n_ctx=config.n_ctx)
    q, k, v = qkv(config, 63, dtype)
    together = CPUPagedAttention(config, cache, batch)(0, q, k, v)

    for row in range(63):
        one = slice(row, row + 1)
        y = CPUPagedAttention(config, cache, rows_of(batch, one))(0, q[one], k[one], v[one])

        assert torch.equal(y[0], together[row])


def rows_of(batch: ModelInput, rows: slice) -> ModelInput:
    return ModelInput(
        tokens=batch.tokens[rows],
        positions=batch.positions[rows],
        row_sequences=batch.row_sequences[rows],
        block_tables=batch.block_tables,
        slot_blocks=batch.slot_blocks[rows],
        slot_offsets=batch.slot_offsets[rows],
    )


@pytest.mark.parametrize("dtype", CACHES)
def test_a_row_has_the_same_bytes_at_every_row_count_of_a_step(dtype: torch.dtype) -> None:
    """Decode rows of many sequences, then a prompt, cut at every place of both."""
    torch.manual_seed(0)
    budget = EngineConfig().step_tokens
    config = make_config(n_head=2, head_size=64, n_ctx=1024)
    spans = [(31 * index, 31 * index + 1) for index in range(30)]
    spans.append((200, 200 + budget - len(spans)))
    cache = make_cache(config, dtype=dtype, block_size=16, num_blocks=1 + 31 * 64)
    batch = make_input(cache, spans, n_ctx=config.n_ctx)
    # As c_attn leaves them: q, k and v of a row beside each other. A lone row of them is
    # contiguous, several are not, and compiled code may tell the two apart.
    fused = torch.randn(budget, 3 * config.n_embd)
    if dtype.is_floating_point:
        fused = fused.to(dtype)
    q, k, v = (part.view(budget, config.n_head, -1) for part in fused.chunk(3, dim=-1))
    together = CPUPagedAttention(config, cache, batch)(0, q, k, v)

    def last(count: int) -> Tensor:
        rows = slice(budget - count, budget)
        kernel = CPUPagedAttention(config, cache, rows_of(batch, rows))
        return kernel(0, q[rows], k[rows], v[rows])

    counts = range(1, budget) if dtype == torch.bfloat16 else range(1, budget, 7)
    different = [n for n in counts if not torch.equal(last(n), together[budget - n :])]

    assert different == []


@pytest.mark.parametrize("dtype", CACHES)
def test_a_broken_key_or_value_breaks_the_rows_that_see_it_and_no_others(
    dtype: torch.dtype,
) -> None:
    config = make_config()
    cache = make_cache(config, dtype=dtype)
    batch = make_input(cache, [(0, 10), (0, 10)], n_ctx=config.n_ctx)
    q, k, v = qkv(config, 20, dtype)
    healthy = CPUPagedAttention(config, cache, batch)(0, q, k, v)
    k[4] = torch.nan
    v[15] = torch.inf

    y = CPUPagedAttention(config, cache, batch)(0, q, k, v)

    assert torch.equal(y[:4], healthy[:4])
    assert not torch.isfinite(y[4:10]).any()
    assert torch.equal(y[10:15], healthy[10:15])
    assert not torch.isfinite(y[15:]).any()


def test_kernels_serve_processors_with_shorter_vectors(tmp_path: Path) -> None:
    """The same tests where LLVM knows of AVX2 alone, and must split vectors of 16 numbers."""
    if "avx2" not in processor()[1]:
        pytest.skip("needs a processor with AVX2")
    names = (
        "test_the_cache_may_be_of_another_precision",
        "test_a_row_has_the_same_bytes_for_any_size_of_blocks_and_chunks",
    )
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "x86-64-v3",
        "NUMBA_CPU_FEATURES": "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *(f"{__file__}::{name}" for name in names)],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout


def test_reference_reads_nothing_back_to_the_host() -> None:
    config = make_config()
    with torch.device("meta"):
        cache = KVCache(config, num_blocks=9, block_size=4, dtype=torch.float32, device="meta")
        batch = ModelInput(
            tokens=torch.zeros(5, dtype=torch.long),
            positions=torch.zeros(5, dtype=torch.long),
            row_sequences=torch.zeros(5, dtype=torch.long),
            block_tables=torch.zeros(2, 4, dtype=torch.int32),
            slot_blocks=torch.zeros(5, dtype=torch.long),
            slot_offsets=torch.zeros(5, dtype=torch.long),
        )
        q, k, v = qkv(config, 5, torch.float32)

        y = PagedAttention(config, cache, batch)(0, q, k, v)

    assert y.shape == (5, config.n_head, config.head_size)


@pytest.mark.parametrize("dtype", CACHES)
def test_several_threads_give_what_one_gives(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = make_config(head_size=11)
    spans = [(0, 20), (3, 4), (40, 41), (7, 30)]
    q, k, v = qkv(config, 45, dtype)
    cache = make_cache(config, dtype=dtype)
    batch = make_input(cache, spans, n_ctx=config.n_ctx)
    alone = CPUPagedAttention(config, cache, batch)(1, q, k, v)
    before = torch.get_num_threads()

    found = []
    for num_threads in (2, 3) * 20:
        torch.set_num_threads(num_threads)
        found.append(CPUPagedAttention(config, cache, batch)(1, q, k, v))
    torch.set_num_threads(before)

    assert all(torch.equal(out, alone) for out in found)
