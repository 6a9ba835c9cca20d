"""Runs the parts of a report in another process, and if that dies or hangs the rest in a new one.

A kernel that reads where it must not takes the device from its process for good, and one that never
ends cannot be stopped from within.
"""

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.report import Report


def supervise(
    command: Sequence[str],
    limits: Sequence[float],
    report: Report,
    *,
    out: Path,
    limit_seconds: float,
    grace_seconds: float = 30,
    start_seconds: float = 60,
) -> None:
    """Run `command` with the first part it shall run, until all parts have run; fill the report.

    It saves the report as each part begins, and ends each by itself within its limit, in seconds;
    who is late by `grace_seconds` hangs, or who begins no part in `start_seconds`.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").unlink(missing_ok=True)
    end = time.monotonic() + limit_seconds
    first = 0
    while first < len(limits):
        left = max(0.0, end - time.monotonic())
        child = subprocess.Popen([*command, f"--first={first}", f"--limit-seconds={left}"])
        place, late = first - 1, time.monotonic() + start_seconds
        try:
            while child.poll() is None:
                time.sleep(0.1)
                now, reached = time.monotonic(), report.load(out)
                if reached is not None and reached > place:
                    place = reached
                    limit = 0.0 if place == len(limits) else max(0.0, min(limits[place], end - now))
                    late = now + limit + grace_seconds
                if now > late:
                    child.kill()
        finally:
            child.kill()  # where this process is stopped
        reached = max(first, report.load(out) or 0)
        if reached < len(limits):
            report.parts.append(f"The process ended here, with {child.wait()}: a new one goes on.")
            report.save(out, reached)
        first = reached + 1
