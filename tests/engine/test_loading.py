"""From a checkpoint to an engine: what it says it holds, and what a second start need not do."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig, LaunchConfig
from engine.errors import StartRefused
from engine.loading import load_engine
from engine.precision import choose_precision
from tests.tiny_models import tiny_checkpoint, tiny_config, tiny_gpt
from weights.layout import read_layout
from weights.ledger import PRECISIONS, MemoryLedger

ROOT = Path(__file__).parents[2]
ENGINE = EngineConfig(num_blocks=40, max_num_sequences=4, max_num_scheduled_tokens=32)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as wide as GPT-2, where what pads packed weights is little."""
    directory = tmp_path_factory.mktemp("loading") / "wide"
    config = tiny_config(n_layer=1, n_head=12, n_embd=768, vocab_size=3000)
    tiny_checkpoint(directory, model=tiny_gpt(config))
    return directory


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_ledger_tells_the_bytes_that_are_held(wide: Path, precision: str) -> None:
    config = LaunchConfig(
        model=str(wide), device="cpu", dtype=precision, vocab_size=3000, engine=ENGINE
    )

    _, ready = load_engine(config)

    foretold = MemoryLedger.of(read_layout(wide).config, precision=precision).weights_bytes
    assert ready.dtype == precision
    # Padding to whole tiles, and float32 biases, norms and scales.
    assert foretold <= ready.weights_bytes <= 1.03 * foretold


def test_what_a_start_says_of_its_numbers_is_what_was_chosen(wide: Path) -> None:
    _, ready = load_engine(LaunchConfig(model=str(wide), device="cpu", engine=ENGINE))

    chosen = choose_precision("auto", torch.device("cpu"))
    assert (ready.dtype, ready.products, ready.numerics) == (
        chosen.name, chosen.products, chosen.reason,
    )  # fmt: skip


def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model", model=tiny_gpt(tiny_config(n_embd=64)))
    kernels = tmp_path / "kernels"
    program = (
        "import pathlib, sys\n"
        "from engine.config import EngineConfig, LaunchConfig\n"
        "from engine import loading\n"
        "def available():\n"
        "    print(*pathlib.Path(sys.argv[2]).rglob('*.nbc'), sep='\\n')\n"
        "    return 10**9\n"
        "loading.available_memory_bytes = available\n"
        "small = EngineConfig(max_num_sequences=4, max_num_scheduled_tokens=32, num_blocks=200)\n"
        "config = LaunchConfig(\n"
        "    model=sys.argv[1], device='cpu', dtype=sys.argv[3], num_threads=1, engine=small\n"
        ")\n"
        "loading.load_engine(config)\n"
    )

    def start(dtype: str) -> tuple[set[str], dict[str, int]]:
        """Start, and say which kernels there were when memory was planned, and their ages."""
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "model"), str(kernels), dtype],
            env={**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(kernels)},
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        files = kernels.rglob("*.nbc")
        return set(done.stdout.split()), {str(file): file.stat().st_mtime_ns for file in files}

    planned_with, first = start("bfloat16")
    _, second = start("bfloat16")
    planned_with_more, more = start("int8")

    assert first
    assert second == first
    # What compiling takes is no memory for the cache.
    assert planned_with == set(first)
    assert planned_with_more == set(more) > set(first)


def test_a_worker_imports_nothing_large_that_it_does_not_use() -> None:
    program = "import sys, engine.worker; print(sorted(sys.modules))"

    modules = subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True, text=True
    ).stdout

    assert "'numba.np.arraymath'" in modules  # which would import scipy, where there is one
    for name in ("scipy.linalg", "sympy", "torch._dynamo", "numba.cuda", "transformers"):
        assert f"'{name}'" not in modules


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"same_bytes": False}, "on a CPU nothing would change: leave --same-bytes on"),
        ({"kv_cache_dtype": "float8"}, "float8 does not go with .* on cpu"),
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
