"""What a model costs in memory, computed from its shape alone; loads nothing."""

import os
from dataclasses import dataclass

from model.config import GPTConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLedger:
    """Bytes by purpose for one model in one precision."""

    weights_bytes: int
    kv_bytes_per_token: int  # keys and values of all layers
    n_ctx: int

    @classmethod
    def of(cls, config: GPTConfig, *, bytes_per_value: int) -> "MemoryLedger":
        """The ledger of a model whose weights and cache take `bytes_per_value` a number."""
        return cls(
            weights_bytes=config.num_parameters * bytes_per_value,
            kv_bytes_per_token=2 * config.n_layer * config.n_embd * bytes_per_value,
            n_ctx=config.n_ctx,
        )

    @property
    def kv_bytes_per_sequence(self) -> int:
        """Keys and values of one sequence as long as the context."""
        return self.kv_bytes_per_token * self.n_ctx

    def num_sequences(self, memory_bytes: int) -> int:
        """How many full contexts fit into so much memory beside the weights."""
        return max(0, memory_bytes - self.weights_bytes) // self.kv_bytes_per_sequence


def available_memory_bytes() -> int:
    """Memory that this machine, or the container we run in, can give out now."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:  # caches count as available
            for line in lines:
                if line.startswith("MemAvailable:"):
                    available = int(line.split()[1]) * 1024
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit_file:
            limit = limit_file.read().strip()
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as current_file:
            used = int(current_file.read())
        if limit != "max":
            available = min(available, int(limit) - used)
    except (OSError, ValueError):
        pass  # another operating system, or no container: the first figure stands
    return max(0, available)
