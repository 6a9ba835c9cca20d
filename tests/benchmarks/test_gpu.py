"""The report on a GPU, as far as it can be tried without one."""

import contextlib
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton comes with torch on CUDA and with the test extra")

from benchmarks.gpu.__main__ import PARTS, run
from benchmarks.gpu.checks import check_kernels, check_rounds
from benchmarks.gpu.draws import check_draws, time_draws
from benchmarks.gpu.processes import supervise
from benchmarks.gpu.report import GOALS, Goal, Report
from benchmarks.gpu.times import count_kernels, time_disturbances
from benchmarks.gpu.workbench import Workbench

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_a_goal_says_whether_it_was_reached() -> None:
    fast = Goal("speed", 10, "tokens/s")
    short = Goal("time", 10, "ms", is_at_least=False)

    assert [fast.verdict(value) for value in (9.9, 10, None)] == ["FAIL", "pass", "not measured"]
    assert [short.verdict(value) for value in (10.1, 10, None)] == ["FAIL", "pass", "not measured"]


def test_a_report_names_every_goal_though_nothing_ran(tmp_path: Path) -> None:
    run(device=DEVICE, is_smoke=True, out=tmp_path, limit_seconds=-1)

    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert text.count("| not measured |") == len(GOALS)
    assert text.count("Not run: the time was up.") == len(PARTS)


def test_no_time_of_a_trial_run_is_held_against_a_goal() -> None:
    values = {"1": 2.0, "kernels": 1.0}

    trial = Report(has_times=False, values=values).goals()
    measured = Report(has_times=True, values=values).goals()

    assert "FAIL" not in trial
    assert trial.count("| pass |") == 1
    assert "FAIL" in measured


def test_kernels_are_compared_and_found_right() -> None:
    report = Report(has_times=False)

    check_kernels(Workbench(device=DEVICE, is_smoke=True), report)

    assert report.values["kernels"] == 1.0
    assert report.parts[0].count("| pass |") == 31


def test_a_kernel_that_fails_is_told_and_the_others_are_compared() -> None:
    report = Report(has_times=False)
    bench = Workbench(device=DEVICE, is_smoke=True)
    weight = bench.model.wte.weight
    weight.data = weight.data.T.contiguous().T  # no kernel takes that

    check_kernels(bench, report)

    assert report.values["kernels"] == 0.0
    assert "kernels know no stride" in report.parts[0]
    assert report.parts[-1].count("| FAIL |") == 2
    assert report.parts[-1].count("| pass |") == 27


def test_kernels_are_counted_in_whole_steps() -> None:
    layers = ["_layer_norm_kernel", "_decode_kernel", "_linear_kernel", "_linear_kernel"]
    head = ["_layer_norm_kernel", "_linear_kernel"]
    step = ["_begin_kernel", *layers, *head, "_peaks_kernel", "_finish_kernel"]
    cut, between = step[4:], ["Memcpy HtoD (Pinned -> Device)", "index_put"]
    filled = [step[0], "fill", *step[1:]]

    plain = count_kernels([*cut, *step, *between, *step, *step[:3]])
    longer = count_kernels([*cut, *filled, *between])

    assert [plain, longer] == [(4, 5), (4, 6)]


def test_draws_are_compared_and_found_right() -> None:
    report = Report(has_times=False)

    check_draws(Workbench(device=DEVICE, is_smoke=True), report)

    assert report.values["draws"] == 1.0
    assert report.parts[0].count("| pass |") == 24


def test_draws_are_timed_beside_their_definition() -> None:
    report = Report(has_times=False)

    time_draws(Workbench(device=DEVICE, is_smoke=True), report)

    assert report.values["draw"] > 0
    assert len(report.parts) == 4


def test_what_neighbours_pay_is_timed() -> None:
    report = Report(has_times=False)

    time_disturbances(Workbench(device=DEVICE, is_smoke=True), report)

    lines = [line for line in report.parts[0].splitlines() if line.startswith("| 3 |")]
    assert len(lines) == 3
    assert all(float(line.split("|")[4]) > 0 for line in lines)


def test_several_rounds_are_compared_with_single_ones() -> None:
    report = Report(has_times=False)

    check_rounds(Workbench(device=DEVICE, is_smoke=True), report)

    assert report.values["rounds"] == 1.0


def test_a_part_that_fails_or_takes_too_long_is_told_and_the_others_run(tmp_path: Path) -> None:
    def fail(bench: Workbench, report: Report) -> None:
        raise RuntimeError("no such device")

    def wait(bench: Workbench, report: Report) -> None:
        with contextlib.suppress(Exception):  # as a peer may
            time.sleep(10)
        report.parts.append("Went on.")

    def work(bench: Workbench, report: Report) -> None:
        assert "no such device" in (tmp_path / "gpu.md").read_text(encoding="utf-8")
        report.parts.append("Done.")

    run(
        device=DEVICE,
        is_smoke=True,
        out=tmp_path,
        limit_seconds=60,
        parts=(("Fails", fail, 5), ("Waits", wait, 0.1), ("Works", work, 5)),
    )

    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "Went on." not in text
    assert text.index("no such device") < text.index("Stopped:") < text.index("Done.")


PROGRAM = """
import os, pathlib, signal, sys, time
from benchmarks.gpu.__main__ import DeviceLostError, run

def die(bench, report):
    report.parts.append("Died.")
    os.kill(os.getpid(), signal.SIGKILL)

def hang(bench, report):  # as in a call that no signal ends
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(60)

def lose(bench, report):
    def synchronize():
        raise RuntimeError("an illegal memory access was encountered")
    bench.synchronize = synchronize
    synchronize()

def work(bench, report):
    bench.synchronize()
    report.values["kernels"] = report.values.get("kernels", 0.0) + 1
    report.parts.append("Done.")

first, limit = (argument.split("=")[1] for argument in sys.argv[2:])
parts = ("Works", work), ("Dies", die), ("Hangs", hang), ("Loses", lose), ("Works on", work)
try:
    run(
        device="cpu", is_smoke=True, out=pathlib.Path(sys.argv[1]), limit_seconds=float(limit),
        parts=tuple((name, part, 0.5) for name, part in parts), first=int(first),
    )
except DeviceLostError:
    sys.exit(3)
"""


def test_what_comes_after_a_part_that_kills_its_process_runs_in_another(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    report = Report(has_times=False)

    supervise(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path)],
        [0.5] * 5,
        report,
        out=tmp_path,
        limit_seconds=100,
        grace_seconds=4,
    )

    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert report.values == {"kernels": 2.0}
    assert text == report.markdown()
    headings = [part[3:] for part in report.parts if part.startswith("## ")]
    assert headings == ["Works", "Dies", "Hangs", "Loses", "Works on"]
    assert text.count("The process ended here, with -9:") == 2
    assert text.index("an illegal memory access") < text.index("ended here, with 3:")
    assert text.index("ended here, with 3:") < text.index("## Works on")
