"""Where compiled kernels are kept, and that an engine runs where they cannot be."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.kernel_folder import first_writable, kernels_name

ROOT = Path(__file__).parents[2]

# A kernel as the engine has them; it is run, and then said where it lies.
KERNEL = """
import pathlib
import numba
from engine.cpu_math import KERNEL

@numba.njit(**KERNEL)
def double(x):
    return 2 * x

assert double(2) == 4
folder = pathlib.Path(numba.config.CACHE_DIR)
print(folder, any(folder.rglob("*.nbc")))
"""

# The same, where somebody waits for it.
ANNOUNCED = KERNEL.replace("import KERNEL", "import KERNEL, announce_compiling").replace(
    "assert double(2)", "with announce_compiling(): assert double(2)"
)

# `kvik`, which ends before any command; and then what it has told numba.
COMMAND = """
import os, sys
from kvik.__main__ import main
sys.argv = ["kvik", "--version"]
try: main()
except SystemExit: pass
print(os.environ.get("NUMBA_CACHE_DIR"))
"""


def closed(folder: Path) -> Path:
    """A folder that nobody can write in, root included, because it lies in a file."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.parent.joinpath("file").write_text("not a folder")
    return folder.parent / "file" / folder.name


def code_without_room(folder: Path) -> Path:
    """A copy of the code, beside which nothing can be kept."""
    for room in ("engine", "model", "weights", "kvik"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / room / "__pycache__").write_text("not a folder")
    return folder


def run(program: str, code: Path, **environment: str) -> tuple[str, str]:
    """The last line a program prints, and what it says on the way."""
    (code / "program.py").write_text(program)
    kept = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=code, env={**kept, "PYTHONPATH": str(code), **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()[-1], done.stderr


def test_the_first_that_can_be_written_is_taken(tmp_path: Path) -> None:
    folders = [closed(tmp_path / "a"), tmp_path / "b" / "c", tmp_path / "d"]

    assert first_writable(folders) == tmp_path / "b" / "c"
    assert first_writable(folders[:1]) is None
    assert not (tmp_path / "b").exists()  # looking leaves nothing behind


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that holds next to nothing."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only who may mount has a small disk to try")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_passed_over_unless_kernels_lie_on_it(
    small_disk: Path, tmp_path: Path
) -> None:
    folders = [small_disk / "a", tmp_path / "b"]

    assert first_writable(folders) == tmp_path / "b"
    (small_disk / "a" / "kernels-0123456789abcdef" / "old").mkdir(parents=True)
    assert first_writable(folders) == tmp_path / "b"
    (small_disk / "a" / kernels_name() / "kernel").mkdir(parents=True)
    assert first_writable(folders) == small_disk / "a"


def test_an_engine_without_a_folder_for_kernels_says_so_and_cleans_up(tmp_path: Path) -> None:
    code = code_without_room(tmp_path / "code")

    said, warned = run(KERNEL, code, NUMBA_CACHE_DIR=str(closed(tmp_path / "kernels")))

    folder, is_kept = said.split()
    assert is_kept == "True"
    assert not Path(folder).parent.exists()
    assert "every start compiles" in warned
    assert str(tmp_path / "file" / "kernels") in warned


def test_an_engine_keeps_kernels_where_it_is_told_to_and_is_silent(tmp_path: Path) -> None:
    code = code_without_room(tmp_path / "code")

    said, warned = run(KERNEL, code, NUMBA_CACHE_DIR=str(tmp_path / "kernels"))

    folder, is_kept = said.split()
    assert is_kept == "True"
    assert Path(folder).parent == tmp_path / "kernels"
    assert warned == ""


def test_whoever_waits_for_kernels_is_told_and_the_next_one_does_not_wait(tmp_path: Path) -> None:
    code = code_without_room(tmp_path / "code")
    folder = {"NUMBA_CACHE_DIR": str(tmp_path / "kernels")}

    first, second = (run(ANNOUNCED, code, **folder)[1] for _ in range(2))

    assert first.count("compiling kernels") == 1
    assert "the next start finds them" in first
    assert second == ""


def test_nobody_is_told_of_a_next_start_that_finds_no_kernels(tmp_path: Path) -> None:
    code = code_without_room(tmp_path / "code")

    _, warned = run(ANNOUNCED, code, NUMBA_CACHE_DIR=str(closed(tmp_path / "kernels")))

    assert "every start compiles" in warned
    assert "compiling kernels" in warned
    assert "the next start" not in warned


def test_the_command_line_falls_back_to_the_user_s_cache(tmp_path: Path) -> None:
    code = code_without_room(tmp_path / "code")
    home = str(tmp_path / "home")
    (tmp_path / "home").mkdir()
    told = {"NUMBA_CACHE_DIR": str(closed(tmp_path / "kernels"))}

    assert run(COMMAND, code, HOME=home)[0] == f"{home}/.cache/kvik"
    assert run(COMMAND, code, **told, HOME=home)[0] == f"{home}/.cache/kvik"
    assert run(COMMAND, code, HOME=home, XDG_CACHE_HOME=f"{home}/x")[0] == f"{home}/x/kvik"
    assert run(COMMAND, code, HOME=str(closed(tmp_path / "nobody")))[0] == "None"


def test_the_command_line_leaves_alone_what_the_user_chose(tmp_path: Path) -> None:
    code = code_without_room(tmp_path / "code")

    chosen = str(tmp_path / "kernels")

    assert run(COMMAND, code, NUMBA_CACHE_DIR=chosen)[0] == chosen
