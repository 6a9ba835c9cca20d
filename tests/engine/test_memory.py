"""The ledger's arithmetic, and that what does not fit is refused with what to change to what."""

import pytest

from engine.config import EngineConfig
from engine.errors import DoesNotFit
from engine.memory import MemoryPlan, plan_memory, working_bytes
from model.config import GPTConfig
from weights.ledger import kv_bytes_per_token

GPT2 = GPTConfig()
BLOCK_BYTES = 16 * 2 * 12 * 768 * 2  # tokens, K and V, layers, width, bfloat16
GB = 10**9


def plan(
    available_bytes: int,
    *,
    engine: EngineConfig | None = None,
    kv_cache_bytes: int | None = None,
) -> MemoryPlan:
    return plan_memory(
        GPT2,
        engine or EngineConfig(),
        kv_bytes_per_token=BLOCK_BYTES // 16,
        weights_bytes=250_000_000,
        available_bytes=available_bytes,
        kv_cache_bytes=kv_cache_bytes,
    )


def test_plenty_of_memory_gives_every_sequence_a_full_context() -> None:
    ledger = plan(100 * GB)

    assert ledger.num_blocks == 1 + 256 * 64
    assert ledger.num_full_sequences == 256
    assert ledger.kv_cache_bytes == ledger.num_blocks * BLOCK_BYTES


def test_little_memory_gives_the_cache_its_share_of_what_a_step_leaves() -> None:
    working = working_bytes(GPT2, EngineConfig())

    ledger = plan(working + 2 * GB)

    assert ledger.num_blocks == int(0.8 * 2 * GB) // BLOCK_BYTES
    assert ledger.kv_cache_bytes <= 0.8 * 2 * GB


def test_an_explicit_size_is_taken_as_it_is() -> None:
    in_bytes = plan(100 * GB, kv_cache_bytes=300 * BLOCK_BYTES + 5)
    in_blocks = plan(100 * GB, engine=EngineConfig(num_blocks=300))

    assert in_bytes.num_blocks == in_blocks.num_blocks == 300
    assert in_bytes.num_full_sequences == 4


def test_a_cache_of_smaller_values_holds_more_of_them() -> None:
    def blocks(kv_cache_dtype: str) -> int:
        return plan_memory(
            GPT2,
            EngineConfig(),
            kv_bytes_per_token=kv_bytes_per_token(GPT2, kv_cache_dtype),
            weights_bytes=250_000_000,
            available_bytes=100 * GB,
            kv_cache_bytes=300 * BLOCK_BYTES,
        ).num_blocks

    assert (blocks("bfloat16"), blocks("float8"), blocks("float32")) == (300, 600, 150)


def test_room_for_less_than_one_context_is_refused_with_the_number_needed() -> None:
    with pytest.raises(DoesNotFit, match=r"raise num_blocks to 65 or kv_cache_bytes to 38338560"):
        plan(100 * GB, engine=EngineConfig(num_blocks=64))


def test_too_little_free_memory_is_refused_with_what_to_lower() -> None:
    with pytest.raises(DoesNotFit, match="Lower max_num_scheduled_tokens"):
        plan(GB // 10)


def test_a_cache_beyond_what_is_free_is_refused_with_the_most_that_fits() -> None:
    working = working_bytes(GPT2, EngineConfig())

    with pytest.raises(DoesNotFit, match=r"lower num_blocks to at most 100, "):
        plan(working + 100 * BLOCK_BYTES, engine=EngineConfig(num_blocks=101))


def test_the_smallest_cache_that_is_accepted_holds_one_context() -> None:
    assert plan(100 * GB, engine=EngineConfig(num_blocks=65)).num_full_sequences == 1
