"""Kernels that only the interpreter runs are none: they compile for a GPU that is not here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton comes with torch on CUDA and with the test extra")

ROOT = Path(__file__).parents[2]
# Arrays of a value a row or a sequence: where they lie in memory follows from the number of rows.
LITTLE = {
    *("rows", "positions", "row_sequences", "temperatures", "seeds", "choices", "best", "chosen"),
    *("gathered", "gathered_shares", "part_peaks", "part_ids", "drawn", "token_ids"),
    *("top_ks", "top_ps", "min_ps", "winners"),
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the compiler made of each kernel."""
    cache = str(tmp_path_factory.mktemp("kernels"))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.compile_kernels"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_a_hopper_chip(kernels: list[dict[str, Any]]) -> None:
    assert {kernel["kernel"] for kernel in kernels} == {
        "_write_kernel",
        "_prefill_kernel",
        "_decode_kernel",
        "_linear_kernel",
        "_layer_norm_kernel",
        "_draw_kernel",
        "_filter_kernel",
        "_begin_kernel",
        "_peaks_kernel",
        "_finish_kernel",
    }
    for kernel in kernels:
        assert kernel["has_code"]
        assert kernel["fits"], "into a block's shared memory"
        # Two programs of one kernel might differ in the last bits of what they compute.
        assert LITTLE.isdisjoint(kernel["specialised"])
        if kernel["kernel"] in ("_prefill_kernel", "_linear_kernel") and kernel["values"] == "bf16":
            assert kernel["uses_tensor_cores"]
            assert kernel["loads_ahead"]


def test_no_kernel_spills_its_registers(kernels: list[dict[str, Any]]) -> None:
    """A kernel whose values do not fit into registers works, many times slower."""
    if any(kernel["bytes_beside_registers"] is None for kernel in kernels):
        pytest.skip("this triton comes without cuobjdump, which tells of registers")

    # A pair of addresses, say, a compiler may put aside to have more threads at work.
    spilled = {k["kernel"] for k in kernels if k["bytes_beside_registers"] > 16}

    assert not spilled


def test_the_variants_of_decoding_add_up_in_the_same_order(kernels: list[dict[str, Any]]) -> None:
    """Part by part or in turn, or beside prompts: a row must come out in the same bytes."""
    for cache in ("bf16", "fp8e4nv"):
        variants = [
            kernel
            for kernel in kernels
            if kernel["kernel"] == "_decode_kernel" and kernel["values_in_cache"] == cache
        ]

        assert len(variants) == 3
        assert all(kernel["reductions"] == variants[0]["reductions"] for kernel in variants)
        assert not any(kernel["fuses"] for kernel in variants)
