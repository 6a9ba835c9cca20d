"""The report on a GPU, as far as it can be tried without one."""

import contextlib
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton comes with torch on CUDA and with the test extra")

from benchmarks.gpu.__main__ import PARTS, run
from benchmarks.gpu.checks import check_kernels, check_rounds
from benchmarks.gpu.draws import check_draws, time_draws
from benchmarks.gpu.report import GOALS, Goal, Report
from benchmarks.gpu.times import count_kernels
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


def test_kernels_are_counted_in_whole_steps() -> None:
    layers = ["_layer_norm_kernel", "_decode_kernel", "_linear_kernel", "_linear_kernel"]
    head = ["_layer_norm_kernel", "_linear_kernel"]
    step = ["_begin_kernel", *layers, *head, "_peaks_kernel", "_finish_kernel"]
    cut, between = step[4:], ["Memcpy HtoD (Pinned -> Device)", "index_put"]
    filled = [step[0], "fill", *step[1:]]

    plain = count_kernels([*cut, *step, *between, *step, *step[:3]])
    longer = count_kernels([*cut, *filled, *between])

    assert plain == (4, 5)
    assert longer == (4, 6)


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
