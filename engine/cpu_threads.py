"""How many threads an engine on a CPU has: as many as it may use cores; knows no torch."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from weights.control_groups import group_folders


@dataclass(frozen=True, slots=True)
class Threads:
    """What was chosen."""

    count: int
    reason: str  # for people, without a full stop


def choose_threads(
    asked: int | None,
    num_cores: int,
    *,
    process: Path = Path("/proc/self/cgroup"),
    cgroups: Path = Path("/sys/fs/cgroup"),
) -> Threads:
    """Choose as `--num-threads` says, or else a thread a core, but no more than the quota allows.

    A container with a quota sees all cores of its machine. When its time is used up all of its
    threads stand still until the next tenth of a second, the server's among them: so the quota is
    rounded down, and what is left of it is the server's.
    """
    if asked is not None:
        return Threads(asked, "as was asked for")
    quota = cpu_quota(process, cgroups)
    if quota is None or quota >= num_cores:
        return Threads(num_cores, "one a core")
    return Threads(max(1, int(quota)), f"the quota here is {quota:g} of {num_cores} cores")


def cpu_quota(process: Path, cgroups: Path) -> float | None:
    """The cores that all groups together which a process is in leave to it; None: no limit.

    Of Linux's control groups, version 2 and 1.
    """
    quotas: list[float] = []
    for folder in group_folders("cpu", process, cgroups):
        with suppress(OSError, ValueError, ZeroDivisionError):  # ValueError for "max"
            time, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            quotas.append(int(time) / int(period))
        with suppress(OSError, ValueError, ZeroDivisionError):
            limit = int((folder / "cpu.cfs_quota_us").read_text(encoding="ascii"))
            period_us = int((folder / "cpu.cfs_period_us").read_text(encoding="ascii"))
            if limit > 0:  # -1 is no limit
                quotas.append(limit / period_us)
    return min(quotas, default=None)
