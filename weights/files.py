"""The files of a checkpoint by name, and what may lie in their stead; knows not what they say."""

from pathlib import Path
from typing import Any

from model.files import FileError, read_object
from weights.errors import CheckpointError

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_MAX_JSON_BYTES = 4 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a regular file; raises CheckpointError, naming the file."""
    try:
        return read_object(path, max_bytes=_MAX_JSON_BYTES)
    except FileError as error:
        raise CheckpointError(str(error)) from error


def what_else_lies_in(directory: Path) -> str:
    """What someone may have meant by a directory that is no checkpoint: a sentence, or nothing."""
    inside = sorted(path.parent for path in directory.glob(f"*/{CONFIG_FILE}"))
    if inside:  # the directory of a training run, for one
        return f" There is one in {', '.join(map(str, inside[:5]))}."
    others = sorted(
        path.name
        for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5")
        for path in directory.glob(pattern)
    )
    return f" It has {', '.join(others)}: bring it in with kvik convert." if others else ""
