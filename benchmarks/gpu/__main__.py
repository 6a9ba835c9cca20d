"""Check and time the GPU path in one go, and write what came out as Markdown, with the goals.

`benchmarks/gpu.sh` calls this. Every part runs by itself and has its time: what fails or takes
longer is reported as that, and the rest goes on, in a new process where this one has lost the
device. `--device cpu --smoke` tries the whole on a small
model in Triton's interpreter (`TRITON_INTERPRET=1`): its checks mean something there, its times do
not.
"""

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from benchmarks.gpu import checks, draws, peers, serving, times
from benchmarks.gpu.processes import supervise
from benchmarks.gpu.report import Report
from benchmarks.gpu.workbench import Workbench

Part = Callable[[Workbench, Report], None]

# In order of what would be missed most, with the seconds each may take.
PARTS: tuple[tuple[str, Part, float], ...] = (
    ("Machine", times.describe_machine, 20),
    ("Kernels against float32 on the CPU", checks.check_kernels, 60),
    ("Same bytes", checks.check_bytes, 60),
    ("The engine against float32 on the CPU", checks.check_engine, 60),
    ("Draws against their definition", draws.check_draws, 30),
    ("Several rounds a step", checks.check_rounds, 40),
    ("Decoding, the engine alone", times.time_decode, 60),
    ("First token", times.time_first_token, 20),
    ("Memory", times.measure_memory, 20),
    ("A step's kernels", times.profile_step, 30),
    ("Draws", draws.time_draws, 30),
    ("Against a loop without cache", peers.time_loop, 20),
    ("Against transformers, static cache", peers.time_static, 60),
    ("What neighbours pay", times.time_disturbances, 30),
    ("Several rounds a step, timed", times.time_rounds, 30),
    ("Over HTTP", serving.time_serving, 100),
    ("Against vLLM", peers.time_vllm, 100),
    ("What can be chosen, and what it costs", times.time_variants, 60),
    ("Products: fixed tiles against cuBLAS", times.time_products, 30),
    ("Attention", times.time_attention, 30),
    ("Other tiles", times.time_tiles, 90),
    # Last, because its thread may live on where it is stopped.
    ("Against transformers, continuous batching", peers.time_continuous, 60),
)


class TimeIsUpError(BaseException):
    """A part took longer than it may. No Exception, which a peer's own code would catch."""


class DeviceLostError(Exception):
    """A part left the device in a state in which no other can use it from this process."""


def run(
    *,
    device: str,
    is_smoke: bool,
    out: Path,
    limit_seconds: float,
    parts: tuple[tuple[str, Part, float], ...] = PARTS,
    first: int = 0,
) -> Report:
    """Run every part for which there is time, from the `first` on; save the report around each.

    Raises DeviceLostError, the report saved, after which another process may go on.
    """
    report = Report(has_times=not is_smoke)
    if first:
        report.load(out)  # what the process before this one found
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + limit_seconds
    bench: Workbench | None = None
    for place, (heading, part, seconds) in enumerate(parts[first:], first):
        report.parts.append(f"## {heading}")
        report.save(out, place)
        is_lost = False
        began = time.monotonic()
        if began >= end:
            report.parts.append("Not run: the time was up.")
        else:
            signal.signal(signal.SIGALRM, _stop)
            signal.setitimer(signal.ITIMER_REAL, min(seconds, end - began))
            try:
                bench = bench or Workbench(device=device, is_smoke=is_smoke)
                part(bench, report)
            except TimeIsUpError:
                report.parts.append("Stopped: it took longer than it may.")
            except Exception:  # one part's failure is a finding, and the others are others
                report.parts.append(f"Failed:\n\n```\n{traceback.format_exc()}```")
                is_lost = bench is not None and not _answers(bench)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            report.parts.append(f"({time.monotonic() - began:.1f} s)")
        report.save(out, place)
        if is_lost:
            raise DeviceLostError
    report.save(out, len(parts))
    return report


def _answers(bench: Workbench) -> bool:
    """Whether the device still does what it is told."""
    try:
        bench.synchronize()
    except RuntimeError:
        return False
    return True


def _stop(number: int, frame: FrameType | None) -> None:
    raise TimeIsUpError


def main() -> None:
    """Read the options, run, print the goals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="a small model, and few of everything")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"))
    parser.add_argument("--limit-seconds", type=float, default=430)
    parser.add_argument("--first", type=int, help="run the parts from this one on, in this process")
    arguments = parser.parse_args()
    if arguments.first is None:
        report = Report(has_times=not arguments.smoke)
        supervise(
            [
                *(sys.executable, "-m", "benchmarks.gpu"),
                *(f"--device={arguments.device}", f"--out={arguments.out}"),
                *(["--smoke"] if arguments.smoke else []),
            ],
            [seconds for _, _, seconds in PARTS],
            report,
            out=arguments.out,
            limit_seconds=arguments.limit_seconds,
        )
        print(report.markdown())
        return
    status = 0
    try:
        run(
            device=arguments.device,
            is_smoke=arguments.smoke,
            out=arguments.out,
            limit_seconds=arguments.limit_seconds,
            first=arguments.first,
        )
    except DeviceLostError:
        status = 3
    sys.stdout.flush()
    os._exit(status)  # a peer that was stopped may have left a thread, which would be waited for


if __name__ == "__main__":
    main()
