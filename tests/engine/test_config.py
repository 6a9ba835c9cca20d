from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from engine.config import EngineConfig, LaunchConfig


def test_the_defaults_are_possible() -> None:
    EngineConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"max_num_sequences": 0}, "max_num_sequences must be at least 1, got 0"),
        ({"max_num_rounds": 0}, "max_num_rounds must be at least 1, got 0"),
        ({"num_blocks": 1}, "num_blocks must be at least 2 .* or absent .* got 1"),
        (
            {"max_num_sequences": 8, "max_num_scheduled_tokens": 7},
            r"max_num_scheduled_tokens must be at least max_num_sequences \(8\).* got 7: raise it",
        ),
    ],
)
def test_an_impossible_value_is_named_with_its_remedy(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**values)


def test_a_cache_of_two_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got 5000 and 64: leave one of them out"):
        LaunchConfig(model="m", kv_cache_bytes=5000, engine=EngineConfig(num_blocks=64))


def test_more_threads_than_any_machine_has_use_for_are_refused() -> None:
    LaunchConfig(model="m", num_threads=1024)
    with pytest.raises(ValueError, match="num_threads must be at most 1024, got 100000"):
        LaunchConfig(model="m", num_threads=100_000)


def test_a_config_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        EngineConfig().block_size = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "on_cpu", "on_cuda"),
    [
        ({}, 256, 2048),
        ({"max_num_sequences": 3000}, 3000, 3000),
        ({"max_num_scheduled_tokens": 300}, 300, 300),
    ],
)
def test_a_step_is_as_long_as_its_device_is_fast(
    values: dict[str, Any], on_cpu: int, on_cuda: int
) -> None:
    config = EngineConfig(**values)

    assert config.step_tokens == on_cpu
    assert config.for_device("cpu").step_tokens == on_cpu
    assert config.for_device("cuda").step_tokens == on_cuda
