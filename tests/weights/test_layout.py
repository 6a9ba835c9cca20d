import os
import shutil
from pathlib import Path

import pytest
import torch

from model.tokenizer import CharacterTokenizer
from model.vocabulary import TokenizerError
from tests.byte_pairs import byte_pair_tokenizer
from tests.json_documents import nested
from tests.tiny_models import tiny_checkpoint
from tests.weights.damage import CONFIG, refusal
from weights.checkpoint import load
from weights.errors import CheckpointError
from weights.layout import read_layout, read_tokenizer, stored_shapes

# What a good directory says


def test_a_checkpoint_says_what_it_holds(directory: Path) -> None:
    layout = read_layout(directory)

    assert layout.config == CONFIG
    assert {name: tensor.shape for name, tensor in layout.tensors.items()} == stored_shapes(CONFIG)
    assert layout.dtypes == ["F32"]
    assert layout.files == [directory / "model.safetensors"]


def test_shards_hold_the_same_tensors_as_one_file(directory: Path, shards: Path) -> None:
    whole, parts = read_layout(directory), read_layout(shards)

    assert list(parts.tensors) == list(whole.tensors)
    assert len(parts.files) > 2


# Files that are none


def test_a_path_that_is_no_directory_is_refused(directory: Path) -> None:
    path = directory / "config.json"

    assert refusal(path) == (
        f"{path} is not a directory; a checkpoint is a directory with config.json and "
        "model.safetensors."
    )


@pytest.mark.parametrize("name", ["nowhere", "a\0b", "a\udcff", "x" * 300])
def test_a_name_of_no_directory_is_refused(name: str, tmp_path: Path) -> None:
    assert "is not a directory" in refusal(tmp_path / name)


def test_a_directory_that_is_closed_to_us_is_refused_as_such(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # nothing is closed to root

    assert refusal(directory) == f"{directory} cannot be read: Permission denied."


FILES = ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_checkpoint_without_a_file_is_refused(name: str, directory: Path) -> None:
    (directory / name).unlink()

    assert refusal(directory) in (
        f"{directory / 'config.json'} is missing.",
        f"{directory} has neither model.safetensors nor model.safetensors.index.json.",
    )


def test_weights_in_another_format_are_named_with_the_remedy(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "ckpt.pt", "notes.txt"):
        (directory / name).touch()

    assert refusal(directory) == (
        f"{directory} has neither model.safetensors nor model.safetensors.index.json. It has "
        "ckpt.pt, pytorch_model.bin: bring it in with kvik convert."
    )


def test_who_names_a_run_or_nanogpts_directory_is_told_what_lies_there(
    directory: Path, tmp_path: Path
) -> None:
    run, nanogpt = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    nanogpt.mkdir()
    (run / "best").symlink_to(directory)
    (run / "logs").mkdir()
    (nanogpt / "ckpt.pt").touch()

    assert refusal(run) == f"{run / 'config.json'} is missing. There is one in {run / 'best'}."
    assert refusal(nanogpt) == (
        f"{nanogpt / 'config.json'} is missing. It has ckpt.pt: bring it in with kvik convert."
    )


@pytest.mark.parametrize("name", FILES)
def test_a_dangling_link_is_refused(name: str, directory: Path) -> None:
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to("nowhere")

    assert refusal(directory) == f"{directory / name} is a dangling link."


@pytest.mark.parametrize("name", FILES)
def test_links_in_a_circle_are_refused(name: str, directory: Path) -> None:
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(name)

    assert refusal(directory) == f"{directory / name} is a dangling link."


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_is_refused_and_not_opened(name: str, directory: Path) -> None:
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)

    assert refusal(directory) == f"{directory / name} is not a regular file."


@pytest.mark.parametrize("name", FILES)
def test_a_directory_in_place_of_a_file_is_refused(name: str, directory: Path) -> None:
    (directory / name).unlink(missing_ok=True)
    (directory / name).mkdir()

    assert refusal(directory) == f"{directory / name} is not a regular file."


@pytest.mark.parametrize("name", FILES)
def test_a_device_is_refused(name: str, directory: Path) -> None:
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to("/dev/zero")

    assert refusal(directory) == f"{directory / name} is not a regular file."


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="/proc/self/mem is Linux's")
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_refused(name: str, directory: Path) -> None:
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to("/proc/self/mem")  # a regular file whose first byte is unreadable

    assert refusal(directory) == f"{directory / name} cannot be read: Input/output error."


def test_a_cache_of_links_to_blobs_is_read_as_it_lies(directory: Path, tmp_path: Path) -> None:
    # The layout of Hugging Face's cache: snapshots/<revision>/<name> -> ../../blobs/<hash>
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        shutil.copy(file, blobs / f"hash{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash{number}")

    model = load(snapshot)

    assert torch.equal(model.wte.weight, load(directory).wte.weight)


def test_a_directory_behind_a_link_is_read(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(directory)

    assert read_layout(tmp_path / "link").config == CONFIG


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not valid JSON: Expecting value"),
        ("{'a': 1}", "is not valid JSON: Expecting property name"),
        (nested(100_000), "is not valid JSON: maximum recursion depth exceeded"),
        ("1" * 5000, "is not valid JSON: Exceeds the limit"),
        ("[]", "must hold a JSON object, found list."),
        ("7", "must hold a JSON object, found int."),
        (" " * (2**22 + 1), "has 4194305 bytes; at most 4194304 are expected."),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(
    name: str, text: str, reason: str, directory: Path
) -> None:
    (directory / name).write_text(text)

    assert refusal(directory).startswith(f"{directory / name} {reason}")


# The tokenizer beside the weights


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(directory: Path) -> None:
    CharacterTokenizer.from_text("12345678").write(directory)

    with pytest.raises(CheckpointError) as caught:
        read_tokenizer(read_layout(directory))

    assert str(caught.value) == (
        f"{directory}: the tokenizer has 8 ids and the model only 7; they do not belong together."
    )


def test_a_tokenizer_with_fewer_ids_leaves_padding(tmp_path: Path) -> None:
    layout = read_layout(tiny_checkpoint(tmp_path / "tiny"))

    tokenizer = read_tokenizer(layout)

    assert tokenizer.vocab_size == byte_pair_tokenizer().vocab_size < layout.config.vocab_size


def test_a_directory_without_a_tokenizer_still_has_a_layout(directory: Path) -> None:
    layout = read_layout(directory)

    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        read_tokenizer(layout)
