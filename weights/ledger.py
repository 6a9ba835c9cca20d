"""What a model costs in memory, computed from its shape alone; loads nothing."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from model.config import GPTConfig
from weights.control_groups import group_folders

SCALE_BYTES = 4  # beside a head's 8-bit keys of one token, and as many beside its values

_VALUE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "float8": 1}
# Bytes of a weight that is multiplied with, and the type of any other number, the cache's too.
_PRECISIONS = {"float32": (4, "float32"), "bfloat16": (2, "bfloat16"), "int8": (1, "bfloat16")}
PRECISIONS = tuple(_PRECISIONS)

# Of a control group: its limit, what it uses, and which line of `memory.stat` says how much of that
# are files. Without a limit version 2 says "max", and version 1 more than there is memory.
_GROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def kv_bytes_per_token(config: GPTConfig, kv_cache_dtype: str) -> int:
    """What keys and values of all layers take in a cache of float32, bfloat16, int8 or float8."""
    scales = config.n_head * SCALE_BYTES if kv_cache_dtype == "int8" else 0
    return 2 * config.n_layer * (config.n_embd * _VALUE_BYTES[kv_cache_dtype] + scales)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLedger:
    """Bytes by purpose for one model in one precision."""

    weights_bytes: int
    kv_bytes_per_token: int  # keys and values of all layers
    n_ctx: int

    @classmethod
    def of(
        cls, config: GPTConfig, *, precision: str, kv_cache_dtype: str | None = None
    ) -> "MemoryLedger":
        """The ledger of a model as it is served in a precision: float32, bfloat16 or int8.

        The cache is as precise as what is computed with it, unless `kv_cache_dtype` says otherwise.
        The embedding lies there twice: to look tokens up, and packed as the output head. What pads
        packed weights, and the scales of 8 bits, are not in it: a hundredth at GPT-2's sizes.
        """
        weight_bytes, others = _PRECISIONS[precision]
        width = config.n_embd
        num_weights = config.n_layer * (4 * width**2 + 2 * width * config.mlp_width)
        num_others = config.num_parameters - num_weights
        return cls(
            weights_bytes=(num_weights + config.vocab_size * width) * weight_bytes
            + num_others * _VALUE_BYTES[others],
            kv_bytes_per_token=kv_bytes_per_token(config, kv_cache_dtype or others),
            n_ctx=config.n_ctx,
        )

    @property
    def kv_bytes_per_sequence(self) -> int:
        """Keys and values of one sequence as long as the context."""
        return self.kv_bytes_per_token * self.n_ctx

    def num_sequences(self, memory_bytes: int) -> int:
        """How many full contexts fit into so much memory beside the weights."""
        return max(0, memory_bytes - self.weights_bytes) // self.kv_bytes_per_sequence


def available_memory_bytes(
    proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> int:
    """Memory that this machine, and every control group that we are in, can give out now.

    A container is such a group, and so is a unit of systemd's. Files that the system holds in
    memory only because there was room count as available, be it the machine's room or the group's:
    a checkpoint that was just read is among them.
    """
    # macOS says no more than what there is: half of it should be to be had.
    tells = "SC_AVPHYS_PAGES" in os.sysconf_names
    pages = os.sysconf("SC_AVPHYS_PAGES") if tells else os.sysconf("SC_PHYS_PAGES") // 2
    available = pages * os.sysconf("SC_PAGE_SIZE")
    # Another operating system: the figure before stands, and so it does where there is no limit.
    with suppress(OSError, ValueError, KeyError):
        available = 1024 * _numbers(proc / "meminfo")["MemAvailable:"]
    for folder in group_folders("memory", proc / "self" / "cgroup", cgroups):
        for limit_name, used_name, files_name in _GROUP_FILES:
            with suppress(OSError, ValueError, KeyError):
                limit = int((folder / limit_name).read_text(encoding="ascii"))
                used = int((folder / used_name).read_text(encoding="ascii"))
                used -= _numbers(folder / "memory.stat")[files_name]
                available = min(available, limit - used)
    return max(0, available)


def format_bytes(num_bytes: float) -> str:
    """A number of bytes for people, in powers of a thousand."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1000
    raise AssertionError


def _numbers(path: Path) -> dict[str, int]:
    """The first number of every line, by its first word."""
    lines = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return {name: int(number) for name, number, *_ in lines}
