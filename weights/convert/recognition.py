"""Which program a checkpoint comes from, told by content; names only decide where to look."""

from pathlib import Path
from typing import Any

from model.config import Activation
from weights.convert.foreign import ForeignCheckpoint
from weights.convert.hugging_face import (
    PICKLED_FILE,
    PICKLED_INDEX_FILE,
    is_state_dict,
    read_pickled_directory,
    read_safetensors_directory,
)
from weights.convert.llm_c import is_llm_c, read_llm_c
from weights.convert.nanogpt import is_nanogpt, read_nanogpt
from weights.convert.torch_file import START_BYTES, is_torch_file, name_kind, read_torch_file
from weights.errors import CheckpointError
from weights.files import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE

_SUPPORTED = (
    "nanoGPT's ckpt.pt, llm.c's model.bin, and Hugging Face directories with model.safetensors or "
    "pytorch_model.bin"
)
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")  # of files worth a look in a directory


def read_foreign(source: Path, activation: Activation | None) -> ForeignCheckpoint:
    """Recognise and read a checkpoint file or directory.

    Args:
        source: see `convert`.
        activation: passed on to nanoGPT's reader; the other formats settle it.

    Raises:
        CheckpointError: it is missing, unknown, unsupported, or there are several to choose from.
    """
    if source.is_dir():
        return _read_directory(source, activation)
    if not source.exists():
        raise CheckpointError(f"There is no file or directory {source}.")
    if not source.is_file():
        raise CheckpointError(f"{source} is neither a file nor a directory.")
    return _read_file(source, activation)


def _read_directory(directory: Path, activation: Activation | None) -> ForeignCheckpoint:
    if (directory / CONFIG_FILE).exists():
        if (directory / WEIGHTS_FILE).exists() or (directory / INDEX_FILE).exists():
            return read_safetensors_directory(directory)
        if (directory / PICKLED_FILE).exists() or (directory / PICKLED_INDEX_FILE).exists():
            return read_pickled_directory(directory)
    files = sorted(file for file in directory.iterdir() if file.is_file())
    models = [file for file in files if file.suffix in _SUFFIXES and _may_be_model(_start(file))]
    if len(models) == 1:
        return _read_file(models[0], activation)
    if models:
        raise CheckpointError(
            f"{directory} holds {len(models)} checkpoints; name one of them: "
            f"{', '.join(file.name for file in models[:20])}."
        )
    names = ", ".join(file.name for file in files[:20]) or "no files"
    raise CheckpointError(f"{directory} holds {names}; expected one of {_SUPPORTED}.")


def _read_file(path: Path, activation: Activation | None) -> ForeignCheckpoint:
    start = _start(path)
    if is_torch_file(start):
        content = read_torch_file(path)
        if is_nanogpt(content):
            return read_nanogpt(path, content, activation)
        if is_state_dict(content):
            return _read_state_dict(path)
        raise CheckpointError(
            f"{path} was written by torch.save and holds {_describe(content)}. Expected nanoGPT's "
            "checkpoint, a dict with model and model_args, or named tensors."
        )
    if is_llm_c(start):
        return read_llm_c(path)
    if start[8:9] == b"{":
        if path.name == WEIGHTS_FILE and (path.parent / CONFIG_FILE).exists():
            return read_safetensors_directory(path.parent)
        raise CheckpointError(
            f"{path} is a safetensors file. It needs the name {WEIGHTS_FILE} and a {CONFIG_FILE} "
            "beside it; then convert the directory."
        )
    raise CheckpointError(f"{path} is {name_kind(start)}. Expected one of {_SUPPORTED}.")


def _read_state_dict(path: Path) -> ForeignCheckpoint:
    if not (path.parent / CONFIG_FILE).exists():
        raise CheckpointError(
            f"{path} holds named tensors and no settings; expected {path.parent / CONFIG_FILE}, a "
            "Hugging Face GPT-2 config, to go with them."
        )
    return read_pickled_directory(path.parent, path)


def _may_be_model(start: bytes) -> bool:
    return is_torch_file(start) or is_llm_c(start, only_models=True)


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(START_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def _describe(content: Any) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    return f"a dict of {', '.join(repr(key)[:40] for key in list(content)[:8]) or 'nothing'}"
