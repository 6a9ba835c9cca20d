import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.gpt import GPT
from tests.byte_pairs import byte_pair_tokenizer
from tests.weights.kill_points import TEXT_FILES, Outcome
from weights.checkpoint import save

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """What saves that died or failed, each at another point, left behind."""
    script = subprocess.run(
        [sys.executable, "-m", "tests.weights.kill_points", tmp_path_factory.mktemp("saves")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert script.returncode == 0, script.stderr
    return [Outcome(**outcome) for outcome in json.loads(script.stdout)]


@pytest.fixture(scope="module")
def killed(outcomes: list[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.point.startswith("killed")]


@pytest.fixture(scope="module")
def full(outcomes: list[Outcome]) -> list[Outcome]:
    """Those whose file system let a file grow no further."""
    return [outcome for outcome in outcomes if outcome.point.startswith("full")]


def test_a_save_that_nobody_disturbs_is_whole(outcomes: list[Outcome]) -> None:
    *_, last = outcomes

    assert (last.point, last.end, last.new, last.beside) == ("nothing", "done", "whole", [])


def test_every_kill_killed(killed: list[Outcome]) -> None:
    assert {outcome.end for outcome in killed} == {"killed"}


def test_kills_fall_before_between_and_after_all_files(killed: list[Outcome]) -> None:
    assert len(killed) > 40
    assert {outcome.new for outcome in killed} == {"absent", "whole"}


def test_a_kill_leaves_no_new_checkpoint_or_a_whole_one(killed: list[Outcome]) -> None:
    assert [outcome for outcome in killed if outcome.new not in ("absent", "whole")] == []


def test_neither_kill_nor_failure_harms_the_previous_checkpoint(outcomes: list[Outcome]) -> None:
    assert [outcome for outcome in outcomes if not outcome.is_previous_intact] == []


def test_a_kill_leaves_at_most_one_hidden_directory_beside(killed: list[Outcome]) -> None:
    assert all(len(outcome.beside) <= 1 for outcome in killed)
    assert all(name.startswith(".new.partial-") for o in killed for name in o.beside)


def test_a_full_disk_is_said_in_a_sentence(full: list[Outcome]) -> None:
    assert len(full) == 7 + 3 * len(TEXT_FILES)
    assert all("cannot be written: " in outcome.end for outcome in full)
    assert all("File too large" in outcome.end for outcome in full)


def test_a_full_disk_leaves_nothing(full: list[Outcome]) -> None:
    assert [outcome for outcome in full if outcome.new != "absent" or outcome.beside] == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_everything_is_on_the_disk_before_it_gets_its_name(
    model: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A kill leaves the page cache; a power cut does not. What it would find depends on this order.
    calls: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        calls.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    save(model, tmp_path / "new", tokenizer=byte_pair_tokenizer(), max_shard_bytes=18_000)

    partial = tmp_path / f".new.partial-{os.getpid()}"
    flushed = [partial / file.name for file in (tmp_path / "new").iterdir()]
    place = calls.index(("rename", str(tmp_path / "new")))
    assert {*calls[:place]} == {("fsync", str(path)) for path in [partial, *flushed]}
    assert calls[place - 1] == ("fsync", str(partial))
    assert calls[place + 1 :] == [("fsync", str(tmp_path))]
