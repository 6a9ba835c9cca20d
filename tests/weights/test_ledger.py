import os
from pathlib import Path

import pytest
import torch

from model.attention import CausalAttention
from model.config import GPTConfig
from tests.tiny_models import random_tokens, tiny_config, tiny_gpt
from weights.ledger import MemoryLedger, available_memory_bytes, format_bytes


@pytest.mark.parametrize(
    ("precision", "weight_bytes", "other_bytes"),
    [("float32", 4, 4), ("bfloat16", 2, 2), ("int8", 1, 2)],
)
def test_the_ledger_counts_every_parameter_and_the_head_s_copy_of_the_embedding(
    precision: str, weight_bytes: int, other_bytes: int
) -> None:
    model = tiny_gpt(tiny_config(n_layer=3, n_inner=5))
    is_weight = {
        name: name.startswith("h.") and parameter.dim() == 2
        for name, parameter in model.named_parameters()
    }

    ledger = MemoryLedger.of(model.config, precision=precision)

    assert ledger.weights_bytes == model.wte.weight.numel() * weight_bytes + sum(
        parameter.numel() * (weight_bytes if is_weight[name] else other_bytes)
        for name, parameter in model.named_parameters()
    )


def test_the_ledger_counts_the_keys_and_values_that_layers_ask_to_attend() -> None:
    model = tiny_gpt(tiny_config(n_layer=3))
    asked: list[int] = []
    whole = CausalAttention(model.config)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        asked.append(k.nbytes + v.nbytes)
        return whole(layer, q, k, v)

    model(random_tokens(model.config, 16), torch.arange(16), attend)

    ledger = MemoryLedger.of(model.config, precision="float32")
    assert ledger.kv_bytes_per_sequence == sum(asked)
    assert ledger.kv_bytes_per_token == sum(asked) // 16


@pytest.mark.parametrize(
    ("free", "fits"), [(0, 0), (99, 0), (100, 0), (149, 0), (150, 1), (250, 3)]
)
def test_as_many_contexts_fit_as_the_memory_beside_the_weights_holds(free: int, fits: int) -> None:
    ledger = MemoryLedger(weights_bytes=100, kv_bytes_per_token=5, n_ctx=10)

    assert ledger.num_sequences(free) == fits


def test_a_token_of_gpt2_takes_36_kib_in_bfloat16() -> None:
    ledger = MemoryLedger.of(GPTConfig(), precision="bfloat16")

    assert ledger.kv_bytes_per_token == 36 * 1024


MEMINFO = "MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 5000 kB\n"


def write_cgroup(directory: Path, *, limit: str, used: int, inactive_file: int) -> None:
    (directory / "memory.max").write_text(f"{limit}\n")
    (directory / "memory.current").write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"anon 7\ninactive_file {inactive_file}\n")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A machine with 5,000 KiB available, and a process in the first of its groups."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/\n")
    (tmp_path / "proc" / "meminfo").write_text(MEMINFO)
    return tmp_path / "proc"


def test_what_the_machine_has_is_available(proc: Path, tmp_path: Path) -> None:
    assert available_memory_bytes(proc, tmp_path / "no cgroup") == 5000 * 1024


def test_a_container_has_what_its_limit_leaves(proc: Path, tmp_path: Path) -> None:
    write_cgroup(tmp_path, limit="4000000", used=1_000_000, inactive_file=0)

    assert available_memory_bytes(proc, tmp_path) == 3_000_000


def test_files_in_memory_do_not_count_against_a_container(proc: Path, tmp_path: Path) -> None:
    write_cgroup(tmp_path, limit="4000000", used=3_900_000, inactive_file=3_000_000)

    assert available_memory_bytes(proc, tmp_path) == 3_100_000


@pytest.mark.parametrize("limit", ["max", "900000000"])
def test_a_container_has_no_more_than_the_machine(limit: str, proc: Path, tmp_path: Path) -> None:
    write_cgroup(tmp_path, limit=limit, used=1_000_000, inactive_file=0)

    assert available_memory_bytes(proc, tmp_path) == 5000 * 1024


def test_a_container_beyond_its_limit_has_nothing(proc: Path, tmp_path: Path) -> None:
    write_cgroup(tmp_path, limit="4000000", used=4_100_000, inactive_file=0)

    assert available_memory_bytes(proc, tmp_path) == 0


@pytest.mark.parametrize("path", ["/", "/system.slice/kvik.service", "/elsewhere/on/the/machine"])
def test_a_limit_is_seen_in_the_group_and_in_those_around_it(
    path: str, proc: Path, tmp_path: Path
) -> None:
    (proc / "self" / "cgroup").write_text(f"0::{path}\n")
    unit = tmp_path / "system.slice" / "kvik.service"
    unit.mkdir(parents=True)
    write_cgroup(unit, limit="max", used=0, inactive_file=0)
    write_cgroup(tmp_path, limit="4000000", used=1_000_000, inactive_file=0)

    assert available_memory_bytes(proc, tmp_path) == 3_000_000


def test_the_tightest_group_counts(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/a\n")
    (tmp_path / "a").mkdir()
    write_cgroup(tmp_path, limit="4000000", used=1_000_000, inactive_file=0)
    write_cgroup(tmp_path / "a", limit="2000000", used=500_000, inactive_file=0)

    assert available_memory_bytes(proc, tmp_path) == 1_500_000


@pytest.mark.parametrize(
    ("limit", "available"), [(4_000_000, 3_100_000), (9223372036854771712, 5000 * 1024)]
)
def test_a_limit_of_the_first_version_is_seen(
    limit: int, available: int, proc: Path, tmp_path: Path
) -> None:
    # As Docker shows it: the path on the machine, and the group's own files where the first lies.
    (proc / "self" / "cgroup").write_text("4:memory:/docker/1234\n3:cpu:/docker/1234\n0::/\n")
    memory = tmp_path / "memory"
    memory.mkdir()
    (memory / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (memory / "memory.usage_in_bytes").write_text("3900000\n")
    (memory / "memory.stat").write_text("inactive_file 5\ntotal_inactive_file 3000000\n")

    assert available_memory_bytes(proc, tmp_path) == available


def test_without_either_file_something_is_available(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path, tmp_path) > 0


def test_a_system_that_tells_only_what_there_is_is_asked_for_half(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = {name: value for name, value in os.sysconf_names.items() if "AVPHYS" not in name}
    monkeypatch.setattr(os, "sysconf_names", names)  # as on macOS

    there_is = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0.49 * there_is < available_memory_bytes(tmp_path, tmp_path) < 0.51 * there_is


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (23_456_789, "23.46 MB"),
     (5e9, "5.00 GB"), (4e13, "40000.00 GB")],
)  # fmt: skip
def test_bytes_are_told_in_the_largest_unit_that_fits(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text
