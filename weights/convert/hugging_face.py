"""Directories that are in Hugging Face's layout already, or but for their pickled weights."""

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from weights.checkpoint import load_layout
from weights.convert.foreign import (
    ForeignCheckpoint,
    check_size,
    check_tensors,
    clean_names,
    describe,
)
from weights.convert.torch_file import read_torch_file
from weights.errors import CheckpointError
from weights.files import CONFIG_FILE, GENERATION_CONFIG_FILE, read_json
from weights.hub import TOKENIZER_FILES
from weights.hugging_face_config import parse_config
from weights.layout import TRANSPOSED, read_layout
from weights.tensor_values import DTYPES

PICKLED_FILE = "pytorch_model.bin"
PICKLED_INDEX_FILE = "pytorch_model.bin.index.json"


def is_state_dict(content: Any) -> bool:
    """Whether what torch.load gave is named tensors and nothing else."""
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(value, Tensor) for value in content.values())
    )


def read_safetensors_directory(directory: Path) -> ForeignCheckpoint:
    """Load a directory that can be served as it lies; raises CheckpointError."""
    layout = read_layout(directory)
    one = layout.dtypes[0] if len(layout.dtypes) == 1 else "F32"
    model = load_layout(layout, device="cpu", dtype=DTYPES[one])
    dtypes = ", ".join(layout.dtypes)
    changed = []
    if layout.head is not None:
        changed.append("dropped lm_head.weight, which equals wte.weight")
    if len(layout.dtypes) > 1:
        changed.append(f"brought {dtypes} to one precision")
    return ForeignCheckpoint(
        path=directory,
        config=layout.config,
        tensors={name: parameter.detach() for name, parameter in model.named_parameters()},
        found=[
            f"{directory}: a Hugging Face GPT-2 in {len(layout.files)} safetensors file(s), "
            f"{dtypes}",
            describe(layout.config, DTYPES[one]),
        ],
        changed=changed,
        tokenizer_places=[directory],
        huggingface=directory,
    )


def read_pickled_directory(directory: Path, file: Path | None = None) -> ForeignCheckpoint:
    """Load a directory with a config and pytorch_model.bin, in one file or several.

    Args:
        directory: where the config lies.
        file: the weights, if they have another name.

    Raises:
        CheckpointError: anything is missing, unexpected, or not plain tensors.
    """
    config_path = directory / CONFIG_FILE
    config = parse_config(read_json(config_path), config_path)
    if file is not None:
        files = [file]
    elif (directory / PICKLED_FILE).exists():
        files = [directory / PICKLED_FILE]
    else:
        files = _read_index(directory / PICKLED_INDEX_FILE)
    stored: dict[Any, Any] = {}
    for part in files:
        content = read_torch_file(part)
        if not is_state_dict(content):
            raise CheckpointError(f"{part} holds something else than named tensors.")
        twice = stored.keys() & content.keys()
        if twice:
            raise CheckpointError(f"{part} stores {min(twice)!r} again; another file has it too.")
        stored |= content
    path = files[0] if len(files) == 1 else directory / PICKLED_INDEX_FILE
    num_bytes = sum(part.stat().st_size for part in files)
    tensors, changed = clean_names(path, stored, num_bytes)
    check_size(path, config, num_bytes)
    conv1d = [name for name in tensors if name.endswith(TRANSPOSED) and tensors[name].dim() == 2]
    tensors |= {name: tensors[name].T for name in conv1d}
    check_tensors(path, config, tensors)
    changed.append(f"read {', '.join(part.name for part in files)} without running anything in it")
    return ForeignCheckpoint(
        path=path,
        config=config,
        tensors=tensors,
        found=[
            f"{directory}: a Hugging Face GPT-2 in {len(files)} pickled file(s)",
            describe(config, tensors["wte.weight"].dtype),
        ],
        changed=changed,
        tokenizer_places=[directory],
        huggingface=directory,
    )


def copy_tokenizer(source: Path, destination: Path) -> list[str]:
    """Copy every tokenizer file as it is; returns the names."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, destination / name)
    return names


def keep_token_ids(source: Path, document: dict[str, Any], destination: Path) -> None:
    """Carry over the bos and eos ids that a directory names, in its config and beside it.

    Args:
        source: the directory.
        document: the new config, changed in place.
        destination: where the generation config is copied to, if there is one.
    """
    original = read_json(source / CONFIG_FILE)
    for field in ("bos_token_id", "eos_token_id"):
        # Absent is not null: silence means GPT-2's end of text, null means none.
        document.pop(field, None)
        if field in original:
            document[field] = original[field]
    if (source / GENERATION_CONFIG_FILE).is_file():
        shutil.copyfile(source / GENERATION_CONFIG_FILE, destination / GENERATION_CONFIG_FILE)


def _read_index(path: Path) -> list[Path]:
    entries = read_json(path).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(f"{path} has no weight_map.")
    files: set[Path] = set()
    for key, name in entries.items():
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            raise CheckpointError(f"{path} places {key} in {name!r}, which is no file beside it.")
        if not (path.parent / name).is_file():
            raise CheckpointError(
                f"{path.parent / name} is missing; {path.name} places {key} there."
            )
        files.add(path.parent / name)
    return sorted(files)
