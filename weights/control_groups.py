"""The control groups of Linux that a process is in: where its limits stand; knows no torch."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def group_folders(controller: str, process: Path, cgroups: Path) -> Iterator[Path]:
    """The folders of the groups a process is in, and of those around them, of version 2 and 1.

    `process` is its `/proc/PID/cgroup`. A container may see its group's path on the machine, and
    its files where the first group lies: so not every folder need be there.
    """
    lines: list[str] = []
    with suppress(OSError):  # another operating system
        lines = process.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for root in (cgroups, cgroups / controllers) if controllers else (cgroups,):
            inner = root / path.lstrip("/")
            yield inner
            while inner != root:
                inner = inner.parent
                yield inner
