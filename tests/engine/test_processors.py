"""Processors that this one can stand in for: those with less than it has.

Kernels are compiled for the processor that numba is told of, by other instructions and with other
tiles. Each runs in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.cpu_features import processor

ROOT = Path(__file__).parents[2]
_AVX2 = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt"
# LLVM's name of a processor, what it has, and how it multiplies float32, bfloat16 and 8 bits.
PROCESSORS = {
    "AVX-512, its first": (
        "skylake-avx512", f"{_AVX2},+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl",
        ("AVX-512", "AVX-512 in float32", "AVX-512 in 16 bits"),
    ),
    "AVX-VNNI": ("alderlake", f"{_AVX2},+avxvnni", ("AVX2", "AVX2 in float32", "AVX-VNNI")),
    "AVX2": ("x86-64-v3", _AVX2, ("AVX2", "AVX2 in float32", "AVX2 in 16 bits")),
    "AVX": ("sandybridge", "+avx,+popcnt", ("AVX", "AVX in float32", "AVX in 16 bits")),
    "SSE2": ("x86-64", "+sse2", ("SSE2", "SSE2 in float32", "SSE2 in 16 bits")),
    "ARM": ("generic", "+fp-armv8,+neon", ("NEON", "NEON in float32", "NEON in pairs")),
    "ARM's dot products": (
        "generic", "+fp-armv8,+neon,+dotprod", ("NEON", "NEON in float32", "NEON dot products"),
    ),
}  # fmt: skip
WHAT_DIFFERS = (
    "test_fused_product_equals_its_parts",
    "test_a_row_of_the_head_has_the_same_bytes_at_every_row_count",
    "test_the_fused_network_equals_the_model",
    "test_several_threads_give_what_one_gives",
    "test_eight_bits_bear_an_offset_and_loud_channels",
    "test_a_row_that_is_not_finite_stays_so_and_alone",
)


def run_on(processor_name: str, folder: Path, *command: str) -> str:
    """What a command prints where numba takes this for another processor."""
    name, features, _ = PROCESSORS[processor_name]
    wanted = {feature[1:] for feature in features.split(",")}
    if not wanted <= processor()[1]:
        pytest.skip(f"this processor lacks {', '.join(sorted(wanted - processor()[1]))}")
    environment = {
        **os.environ, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(folder),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def story() -> str:
    """How the storyteller's likeliest story goes on here."""
    return subprocess.run(TELL, cwd=ROOT, capture_output=True, text=True, check=True).stdout


TELL = [sys.executable, "-m", "kvik", "generate", "Once upon a time", "--temperature", "0",
        "--dtype", "float32", "--max-tokens", "40"]  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
def test_each_multiplies_as_it_can(name: str, tmp_path: Path) -> None:
    program = (
        "from engine.tile_cpu import arithmetic; print([arithmetic(k).name for k in range(3)])"
    )

    printed = run_on(name, tmp_path, "-c", program)

    assert printed.strip() == str(list(PROCESSORS[name][2]))


@pytest.mark.parametrize("name", PROCESSORS)
def test_products_and_networks_are_right_on_each(name: str, tmp_path: Path) -> None:
    tests = Path(__file__).with_name("test_linear_cpu.py")

    run_on(name, tmp_path, "-m", "pytest", "-q", *(f"{tests}::{one}" for one in WHAT_DIFFERS))


@pytest.mark.parametrize("name", ["AVX2", "SSE2", "ARM"])
def test_each_tells_the_same_story(name: str, story: str, tmp_path: Path) -> None:
    assert run_on(name, tmp_path, *TELL[1:]) == story
