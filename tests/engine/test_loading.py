"""What `load_engine` refuses, and that it says why."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import LaunchConfig
from engine.errors import StartRefused
from engine.loading import load_engine


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"same_bytes": False}, "on a CPU nothing would change: leave --same-bytes on"),
        ({"kv_cache_dtype": "float8"}, "float8 does not go with .* on cpu"),
        ({"kv_cache_dtype": "bfloat16", "dtype": "float32"}, "bfloat16 does not go with float32"),
    ],
)
def test_what_only_a_gpu_can_is_refused_on_a_cpu(
    checkpoint: Path, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(StartRefused, match=reason):
        load_engine(LaunchConfig(model=str(checkpoint), device="cpu", **settings))


def test_an_unknown_cache_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"kv_cache_dtype must be one of auto, .* got 'int4'"):
        LaunchConfig(model="m", kv_cache_dtype="int4")


def test_the_cache_is_as_the_model_computes_and_says_so(checkpoint: Path) -> None:
    for kv_cache_dtype in ("auto", "float32"):
        config = LaunchConfig(
            model=str(checkpoint),
            device="cpu",
            dtype="float32",
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_bytes=2**22,
        )
        _, ready = load_engine(config)

        assert (ready.kv_cache_dtype, ready.same_bytes) == ("float32", True)
        assert ready.kv_cache_bytes <= 2**22


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cache_of_8_bits_holds_twice_as_many_tokens(checkpoint: Path) -> None:
    blocks = []
    for kv_cache_dtype in ("auto", "float8"):
        config = LaunchConfig(
            model=str(checkpoint),
            device="cuda",
            dtype="bfloat16",
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_bytes=2**22,
        )
        blocks.append(load_engine(config)[1].num_blocks)

    assert blocks[1] == 2 * blocks[0]
