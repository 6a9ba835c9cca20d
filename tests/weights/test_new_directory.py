import os
from collections.abc import Callable
from pathlib import Path

import pytest

from weights.errors import CheckpointError
from weights.new_directory import new_directory


def test_a_new_directory_appears_when_its_writer_is_done(tmp_path: Path) -> None:
    with new_directory(tmp_path / "a" / "b") as partial:
        (partial / "x").write_text("1")
        during = (tmp_path / "a" / "b").exists()

    assert not during
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def write_and_fail() -> None:
        with new_directory(tmp_path / "b") as partial:
            (partial / "x").write_text("1")
            raise KeyError

    with pytest.raises(KeyError):
        write_and_fail()

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_a_path_that_exists_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "b")

    with pytest.raises(CheckpointError) as caught, new_directory(tmp_path / "b"):
        pass

    expected = f"{tmp_path / 'b'} exists already; name another place or remove it first."
    assert str(caught.value) == expected


def test_a_directory_made_meanwhile_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught, new_directory(tmp_path / "b"):
        (tmp_path / "b").mkdir()

    assert str(caught.value) == f"{tmp_path / 'b'} was made by someone else meanwhile."
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_place_where_nothing_can_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(CheckpointError) as caught, new_directory(tmp_path / "file" / "b"):
        pass

    assert str(caught.value) == f"{tmp_path / 'file' / 'b'} cannot be made: File exists."


def test_what_a_killed_process_with_our_id_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f".b.partial-{os.getpid()}"
    left.mkdir()
    (left / "old").touch()

    with new_directory(tmp_path / "b"):
        pass

    assert list(tmp_path.rglob("*")) == [tmp_path / "b"]
