"""The report on a GPU, as far as it can be tried without one."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton comes with torch on CUDA and with the test extra")

from benchmarks.gpu import GOALS, Bench, Goal, Report, run

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
    assert text.count("Not run: the time was up.") == 11


def test_no_time_of_a_trial_run_is_held_against_a_goal() -> None:
    values = {"1": 2.0, "kernels": 1.0}

    trial = Report(has_times=False, values=values).goals()
    measured = Report(has_times=True, values=values).goals()

    assert "FAIL" not in trial
    assert trial.count("| pass |") == 1
    assert "FAIL" in measured


def test_kernels_are_compared_and_found_right() -> None:
    report = Report(has_times=False)

    Bench(device=DEVICE, is_smoke=True, report=report).check_kernels()

    assert report.values["kernels"] == 1.0
    assert report.parts[0].count("| pass |") == 27
