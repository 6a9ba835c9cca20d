"""Stopped anywhere and resumed, a run is the run that was never stopped."""

import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.training.forked_runs import SETTINGS
from tests.training.tiny import SETTINGS as SHAPE
from tests.training.tiny import begin, contents, losses, metrics, resume, train
from training.checkpointing import RunDirectory
from training.config import Value
from training.display import LogDisplay
from training.errors import ConfigError, DataError, RunError
from training.start import resume_run, start_run
from training.stop_request import StopRequest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "COLUMNS": "300"}

# Long enough for a signal to arrive on the way.
LONG: Mapping[str, Value] = {
    **SHAPE,
    "max_steps": 400,
    "dropout": 0.1,
    "eval_interval": 100,
    "checkpoint_interval": 30,
    "sample_interval": 150,
}


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(run, data, SETTINGS)
    return run


@pytest.fixture(scope="module")
def undisturbed_long(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed_long") / "run"
    train(run, data, LONG)
    return run


def kvik_train(run: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kvik", "train", "--out", run, *arguments]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def keys(settings: Mapping[str, Value]) -> list[str]:
    return [part for key, value in settings.items() for part in (f"--{key}", str(value).lower())]


def wait_for_losses(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, errors = process.communicate(timeout=120)
    return process.returncode, output + errors


def test_run_killed_at_any_file_operation_resumes_bit_for_bit(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    # All the points take a minute; a prime stride visits operations of every kind.
    stride = 1 if "KVIK_TEST_EVERY_KILL" in os.environ else 11

    done = subprocess.run(
        [sys.executable, "-m", "tests.training.forked_runs", data, tmp_path, "0", str(stride)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100 // stride
    expected = contents(undisturbed)
    for run in tmp_path.iterdir():
        assert contents(run) == expected, f"killed at file operation {run.name}"


def test_run_killed_from_outside_and_resumed_ends_as_if_undisturbed(
    data: Path, undisturbed_long: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = kvik_train(run, "--data", data, *keys(LONG))
    wait_for_losses(run, 70, process)

    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    status, output = finish(kvik_train(run, "--resume"))

    assert status == 0, output
    assert contents(run) == contents(undisturbed_long)


def test_signals_end_the_step_save_and_say_how_to_go_on(
    data: Path, undisturbed_long: Path, tmp_path: Path
) -> None:
    run = tmp_path / "a run"
    process = kvik_train(run, "--data", data, *keys(LONG))
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        done = len(losses(run)) if run.exists() else 0
        wait_for_losses(run, done + 5, process)

        process.send_signal(number)
        found, output = finish(process)

        assert found == status, output
        assert f"go on with: kvik train --out '{run}' --resume" in output
        assert (run / "latest").resolve().name == f"step-{len(losses(run)):08}"
        process = kvik_train(run, "--resume")
    assert finish(process)[0] == 0
    assert metrics(run) == metrics(undisturbed_long)
    weights = "latest/model.safetensors"
    assert (run / weights).read_bytes() == (undisturbed_long / weights).read_bytes()


def test_second_signal_leaves_at_once() -> None:
    program = (
        "import os, signal, time\n"
        "from training.stop_request import StopRequest\n"
        "with StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(600)\n"
    )

    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, timeout=120)

    assert done.returncode == 130


class StoppingDisplay(LogDisplay):
    """Asks for a stop as soon as a certain step is done, before its evaluation."""

    def __init__(self, stop: StopRequest, step: int) -> None:
        self._stop = stop
        self._step = step

    def advance(self, step: int) -> None:
        if step == self._step:
            self._stop.signal_number = signal.SIGTERM


@pytest.mark.parametrize("step", range(1, 7))
def test_run_stopped_after_any_step_resumes_bit_for_bit(
    data: Path, undisturbed: Path, tmp_path: Path, step: int
) -> None:
    run = tmp_path / "run"
    stop = StopRequest()
    trainer = start_run(
        run,
        {**SHAPE, **SETTINGS},
        data=data,
        init=None,
        display=StoppingDisplay(stop, step),
        stop=stop,
    )
    trainer.train()
    assert trainer.state.step == step

    resumed = resume(run)
    assert resumed.state.step == step
    resumed.train()

    assert metrics(run) == metrics(undisturbed)
    assert (run / "samples.jsonl").read_bytes() == (undisturbed / "samples.jsonl").read_bytes()
    assert (run / "best").readlink() == (undisturbed / "best").readlink()
    for path in (undisturbed / "latest").iterdir():
        assert (run / "latest" / path.name).read_bytes() == path.read_bytes()


def test_run_with_muon_stopped_and_resumed_is_the_undisturbed_one(
    data: Path, tmp_path: Path
) -> None:
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    settings: dict[str, Value] = {**SHAPE, **SETTINGS, "optimizer": "muon"}
    train(undisturbed, data, settings)
    for step in (3, 5):  # momentum is lost, if it is, at the second stop as well as at the first
        stop = StopRequest()
        display = StoppingDisplay(stop, step)
        if run.exists():
            resume_run(run, {}, data=None, display=display, stop=stop).train()
        else:
            start_run(run, settings, data=data, init=None, display=display, stop=stop).train()

    resume(run).train()

    assert metrics(run) == metrics(undisturbed)
    for path in (undisturbed / "latest").iterdir():
        assert (run / "latest" / path.name).read_bytes() == path.read_bytes()


class CrashingDisplay(LogDisplay):
    """Ends the run without a save once a certain step is done."""

    def __init__(self, step: int) -> None:
        self._step = step

    def advance(self, step: int) -> None:
        if step == self._step:
            raise InterruptedError


def test_evaluation_lost_in_a_crash_after_a_stop_is_recorded_once(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stop = StopRequest()
    settings = {**SHAPE, **SETTINGS}
    display = StoppingDisplay(stop, 4)
    start_run(run, settings, data=data, init=None, display=display, stop=stop).train()
    again = resume_run(run, {}, data=None, display=CrashingDisplay(5), stop=StopRequest())
    with pytest.raises(InterruptedError):
        again.train()

    resume(run).train()

    assert metrics(run) == metrics(undisturbed)
    assert (run / "samples.jsonl").read_bytes() == (undisturbed / "samples.jsonl").read_bytes()


def test_looking_more_often_changes_no_weight(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    train(run, data, SETTINGS, eval_interval=1, sample_interval=1, log_interval=3)

    weights = "latest/model.safetensors"
    assert (run / weights).read_bytes() == (undisturbed / weights).read_bytes()


def test_finished_run_resumes_to_no_more_steps(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, symlinks=True)

    resume(run).train()

    assert contents(run) == contents(undisturbed)


def test_finished_run_goes_on_to_a_larger_max_steps(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, symlinks=True)

    resume(run, max_steps=9).train()

    assert [record["step"] for record in metrics(run) if "loss" in record] == list(range(1, 10))
    assert (run / "latest").readlink() == Path("checkpoints/step-00000009")
    with pytest.raises(ConfigError, match=r"max_steps must be at least 9, .* got 8"):
        resume(run, max_steps=8)


def test_resuming_refuses_another_learning_rate(undisturbed: Path) -> None:
    with pytest.raises(ConfigError, match=r"learning_rate is 0\.001 in this run .* max_steps"):
        resume(undisturbed, learning_rate=0.1)


@pytest.mark.parametrize(("begun", "wanted"), [("adamw", "muon"), ("muon", "adamw")])
def test_resuming_refuses_another_optimizer(
    data: Path, tmp_path: Path, begun: str, wanted: str
) -> None:
    run = tmp_path / "run"
    train(run, data, max_steps=1, optimizer=begun)

    with pytest.raises(ConfigError, match=rf"optimizer is {begun} in this run"):
        resume(run, optimizer=wanted)


def test_resuming_refuses_other_data(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    other = shutil.copytree(data, tmp_path / "other")
    facts = (other / "data.json").read_text()
    (other / "data.json").write_text(facts.replace("tiny.txt", "else.txt"))

    with pytest.raises(RunError, match=r"other is not the data .* expected"):
        resume_run(undisturbed, {}, data=other, display=LogDisplay(), stop=StopRequest())


def test_data_may_lie_elsewhere_on_resuming(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(data, tmp_path / "moved")

    trainer = resume_run(undisturbed, {}, data=moved, display=LogDisplay(), stop=StopRequest())

    assert trainer.state.step == 7


def test_all_of_a_checkpoint_can_be_read_by_those_who_can_read_the_rest(undisturbed: Path) -> None:
    checkpoint = undisturbed / "latest"
    expected = stat.S_IMODE(checkpoint.stat().st_mode) & 0o666

    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in checkpoint.iterdir()}

    assert modes == dict.fromkeys(modes, expected)


def test_existing_run_is_not_begun_again(undisturbed: Path, data: Path) -> None:
    before = contents(undisturbed)

    with pytest.raises(RunError, match=r"exists already; go on with it by --resume"):
        begin(undisturbed, data)

    assert contents(undisturbed) == before


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is no run directory: run\.json cannot be read"):
        resume(tmp_path)


def test_two_processes_do_not_train_in_one_directory(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, symlinks=True)
    first, second = resume(run, max_steps=8), resume(run, max_steps=8)

    class Meanwhile(LogDisplay):
        def advance(self, step: int) -> None:
            with pytest.raises(RunError, match="Another process is training in"):
                second.train()

    stop = StopRequest()
    busy = resume_run(run, {"max_steps": 8}, data=None, display=Meanwhile(), stop=stop)
    busy.train()

    assert first.state.step == 7
    assert busy.state.step == 8


class NarrowingDisplay(LogDisplay):
    """Lets no file grow beyond a limit once a certain step is done, as a full disk would."""

    def __init__(self, step: int, limit_bytes: int) -> None:
        self._step = step
        self._limit_bytes = limit_bytes

    def advance(self, step: int) -> None:
        if step == self._step:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self._limit_bytes, hard))


@pytest.mark.parametrize("limit_bytes", [500, 10_000, 50_000])
def test_save_that_fails_leaves_the_checkpoint_before(
    data: Path, undisturbed: Path, tmp_path: Path, limit_bytes: int
) -> None:
    run = tmp_path / "run"
    settings = {**SHAPE, **SETTINGS}
    display = NarrowingDisplay(5, limit_bytes)
    trainer = start_run(run, settings, data=data, init=None, display=display, stop=StopRequest())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    try:
        with pytest.raises(
            RunError, match=r"cannot be written|The last checkpoint is .*step-0000000[34]"
        ):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    resume(run).train()
    assert contents(run) == contents(undisturbed)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_flipped_bit_in_a_checkpoint_is_named_with_the_remedy(
    undisturbed: Path, tmp_path: Path, name: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, symlinks=True)
    path = run / "latest" / name
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)

    with pytest.raises(RunError, match=rf"{name} has sha256 .* expected .* Remove .*step-00000007"):
        resume(run)


def test_cut_off_checkpoint_is_named_with_the_remedy(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, symlinks=True)
    path = run / "latest" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(RunError, match=r"cannot be resumed from .*model\.safetensors .*Remove"):
        resume(run)


def test_missing_data_is_said_on_resuming(undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.json cannot be read"):
        resume_run(
            undisturbed, {}, data=tmp_path / "gone", display=LogDisplay(), stop=StopRequest()
        )


def test_data_that_lay_where_it_does_not_lie_any_more_is_asked_for(
    data: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(data, tmp_path / "moved")
    train(tmp_path / "run", moved, max_steps=1)
    moved.rename(tmp_path / "elsewhere")

    with pytest.raises(DataError, match=r"moved, which is not there; say with --data"):
        resume(tmp_path / "run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_run_of_a_gpu_says_how_to_go_on_without_one(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, symlinks=True)
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace('device = "cpu"', 'device = "cuda"'))

    with pytest.raises(RunError, match=r"no CUDA device .* begin it with --init .*latest"):
        resume(run)


def test_a_sample_with_a_line_separator_in_it_survives_resuming(
    undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, symlinks=True)
    journal = RunDirectory(run).samples
    for step in (1, 2):
        journal.append({"step": step, "text": "one\u2028two\x85three"})
    before = (run / "samples.jsonl").read_bytes()

    resume(run).train()

    assert (run / "samples.jsonl").read_bytes() == before
