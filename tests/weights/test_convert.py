import os
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from kvik.command_line import app
from model.config import GPTConfig
from tests.weights.nanogpt_model import NanoGPT, nanogpt_checkpoint, write_meta
from weights.convert.conversion import convert
from weights.convert.foreign import check_size
from weights.errors import CheckpointError
from weights.layout import read_layout

CHARACTERS = "\n abcdefgh"


def nanogpt_run(directory: Path) -> Path:
    """A directory as nanoGPT leaves it, its characters beside the checkpoint."""
    directory.mkdir(parents=True)
    model = NanoGPT(vocab_size=len(CHARACTERS))
    torch.save(nanogpt_checkpoint(model), directory / "ckpt.pt")
    write_meta(directory / "meta.pkl", CHARACTERS)
    return directory / "ckpt.pt"


def kvik_convert(*arguments: object) -> Result:
    # A wide terminal: rich would wrap the sentences that the tests look for.
    return CliRunner(env={"COLUMNS": "400"}).invoke(app, ["convert", *map(str, arguments)])


def test_command_tells_line_by_line_what_it_did(tmp_path: Path) -> None:
    path = nanogpt_run(tmp_path / "out")

    result = kvik_convert(path, tmp_path / "ours", "--dtype", "bfloat16")

    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "found"
    assert lines[1].startswith(f"  {path}: a nanoGPT checkpoint, step 2000")
    assert "changed" in lines
    assert "  converted float32 to bfloat16" in lines
    assert f"wrote {tmp_path / 'ours'}" in lines
    assert lines[-1].startswith("  model.safetensors (")
    assert read_layout(tmp_path / "ours").dtypes == ["BF16"]


def test_command_says_that_nothing_had_to_change(tmp_path: Path) -> None:
    kvik_convert(nanogpt_run(tmp_path / "out"), tmp_path / "ours")

    lines = kvik_convert(tmp_path / "ours", tmp_path / "again").output.splitlines()

    assert lines[lines.index("changed") + 1] == "  nothing"


def test_second_run_refuses_to_overwrite(tmp_path: Path) -> None:
    path = nanogpt_run(tmp_path / "out")
    kvik_convert(path, tmp_path / "ours")
    before = {file: file.read_bytes() for file in (tmp_path / "ours").iterdir()}

    result = kvik_convert(path, tmp_path / "ours", "--dtype", "float16")

    assert result.exit_code == 1
    assert f"{tmp_path / 'ours'} exists already" in result.output
    assert {file: file.read_bytes() for file in (tmp_path / "ours").iterdir()} == before


def test_empty_directory_and_dangling_link_are_in_the_way_too(tmp_path: Path) -> None:
    path = nanogpt_run(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")

    for name in ("empty", "link"):
        with pytest.raises(CheckpointError, match=f"{name} exists already"):
            convert(path, tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "int8"), "--dtype must be one of float32, bfloat16, float16, got 'int8'."),
        (("--activation", "swish"), "--activation must be one of gelu_new, gelu, relu"),
        (("--no-tokenizer", "--meta", "x.pkl"), "Name one tokenizer at most"),
        (("--meta", "absent.pkl"), "absent.pkl cannot be read: No such file or directory."),
        (("--tokenizer-dir", "absent"), "absent holds no tokenizer"),
    ],
)
def test_wrong_option_is_one_clear_sentence(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    path = nanogpt_run(tmp_path / "out")

    result = kvik_convert(path, tmp_path / "ours", *arguments)

    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is of no known kind; its first bytes are missing"),
        (b"\0\1\2\3" * 8, "is of no known kind; its first bytes are 00 01 02 03"),
        (b"GGUF" + bytes(28), "is a GGUF file"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file, as TensorFlow writes it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "is of no known kind"),
        (b"PK\x03\x04 and no more", "is a damaged archive"),
    ],
)
def test_file_of_another_kind_is_refused_by_its_content(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "ckpt.pt").write_bytes(content)

    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "ckpt.pt", tmp_path / "ours", without_tokenizer=True)

    assert os.listdir(tmp_path) == ["ckpt.pt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds a list"),
        ({}, "holds a dict of nothing"),
        ({"epoch": 3, "state": {}}, r"holds a dict of 'epoch', 'state'. Expected nanoGPT's"),
        ({"wte.weight": torch.zeros(4, 4)}, r"no settings; expected .*config\.json"),
    ],
)
def test_torch_file_of_another_program_is_refused_by_its_content(
    tmp_path: Path, content: Any, message: str
) -> None:
    torch.save(content, tmp_path / "ckpt.pt")

    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "ckpt.pt", tmp_path / "ours", without_tokenizer=True)


def test_name_of_the_file_does_not_matter(tmp_path: Path) -> None:
    path = nanogpt_run(tmp_path / "out")
    path.rename(tmp_path / "out" / "model.bin")

    convert(tmp_path / "out" / "model.bin", tmp_path / "ours")

    assert read_layout(tmp_path / "ours").config.vocab_size == len(CHARACTERS)


def test_directory_with_several_checkpoints_asks_which(tmp_path: Path) -> None:
    path = nanogpt_run(tmp_path / "out")
    (tmp_path / "out" / "best.pt").write_bytes(path.read_bytes())

    with pytest.raises(CheckpointError, match=r"2 checkpoints; .*: best\.pt, ckpt\.pt\."):
        convert(tmp_path / "out", tmp_path / "ours")


def test_directory_without_a_checkpoint_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "input.txt").write_text("hello")

    with pytest.raises(CheckpointError, match=r"texts holds input\.txt; expected one of nanoGPT's"):
        convert(tmp_path / "texts", tmp_path / "ours")
    with pytest.raises(CheckpointError, match="There is no file or directory"):
        convert(tmp_path / "nowhere", tmp_path / "ours")


def test_pipe_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ckpt.pt")

    with pytest.raises(CheckpointError, match="neither a file nor a directory"):
        convert(tmp_path / "ckpt.pt", tmp_path / "ours")


def test_lone_safetensors_file_asks_for_its_directory(tmp_path: Path) -> None:
    save_file({"wte.weight": torch.zeros(4, 4)}, tmp_path / "weights.safetensors")

    with pytest.raises(CheckpointError, match=r"needs the name model\.safetensors"):
        convert(tmp_path / "weights.safetensors", tmp_path / "ours")


def test_safetensors_file_stands_for_its_directory(tmp_path: Path) -> None:
    convert(nanogpt_run(tmp_path / "out"), tmp_path / "ours")

    convert(tmp_path / "ours" / "model.safetensors", tmp_path / "again")

    assert read_layout(tmp_path / "again").config == read_layout(tmp_path / "ours").config


def test_destination_may_lie_in_directories_yet_to_be_made(tmp_path: Path) -> None:
    path = nanogpt_run(tmp_path / "out")

    convert(path, tmp_path / "models" / "characters" / "v1")

    assert read_layout(tmp_path / "models" / "characters" / "v1").config.bias


def test_destination_under_a_file_is_refused(tmp_path: Path) -> None:
    path = nanogpt_run(tmp_path / "out")

    with pytest.raises(CheckpointError, match=r"ckpt\.pt/ours cannot be made"):
        convert(path, path / "ours")


def test_checkpoint_that_is_written_to_meanwhile_is_refused(tmp_path: Path) -> None:
    path = nanogpt_run(tmp_path / "out")
    is_done = threading.Event()

    def touch() -> None:
        while not is_done.wait(0.001):
            path.touch()

    training = threading.Thread(target=touch)
    training.start()
    try:
        with pytest.raises(CheckpointError, match=r"ckpt\.pt was written to while it was read"):
            convert(tmp_path / "out", tmp_path / "ours")
    finally:
        is_done.set()
        training.join()

    assert os.listdir(tmp_path) == ["out"]


def test_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    path = nanogpt_run(tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    try:
        with pytest.raises(CheckpointError, match=r"cannot be written: .*too large"):
            convert(path, tmp_path / "ours")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert os.listdir(tmp_path) == ["out"]


def test_size_of_a_described_model_is_checked_before_it_is_built() -> None:
    with pytest.raises(CheckpointError, match="describes a model of"):
        check_size(Path("x"), GPTConfig(n_layer=10**12), num_bytes=10**9)
