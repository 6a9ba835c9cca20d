"""Where a checkpoint's tensors lie, by its files' headers; knows not which there should be."""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.files import FileError, regular_file_size, shown
from weights.errors import CheckpointError
from weights.files import INDEX_FILE, WEIGHTS_FILE, read_json, what_else_lies_in

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}  # the safetensors names of what we load

_MAX_HEADER_BYTES = 2**20  # the 1.5B's header has 90 kB; the format alone would allow 100 MB
_MAX_TENSORS = 4096
_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # of older checkpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies and how."""

    name: str  # GPT's parameter name
    key: str  # the name it is stored under
    file: Path
    dtype: str  # F32, F16 or BF16
    shape: tuple[int, ...]  # as stored, Conv1D weights (in, out)
    offset: int  # of its first byte in the file
    num_bytes: int


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a directory by parameter name, mask buffers left out.

    Raises CheckpointError, naming the file and the tensor.
    """
    if os.path.lexists(directory / WEIGHTS_FILE):
        files: dict[Path, set[str] | None] = {directory / WEIGHTS_FILE: None}
    elif os.path.lexists(directory / INDEX_FILE):
        files = dict(_read_index(directory))
    else:
        raise CheckpointError(
            f"{directory} has neither {WEIGHTS_FILE} nor {INDEX_FILE}."
            f"{what_else_lies_in(directory)}"
        )
    stored: dict[str, StoredTensor] = {}
    for file, keys in files.items():
        found = _read_header(file)
        if keys is not None and keys != {tensor.key for tensor in found}:
            odd = sorted(keys ^ {tensor.key for tensor in found})[0]
            raise CheckpointError(
                f"{directory / INDEX_FILE} and {file} disagree about {shown(odd)}."
            )
        for tensor in found:
            if _MASK_BUFFER.fullmatch(tensor.name):
                continue
            if tensor.name in stored:
                raise CheckpointError(
                    f"{file} stores {tensor.name} a second time, as {tensor.key}; first in "
                    f"{stored[tensor.name].file} as {stored[tensor.name].key}."
                )
            stored[tensor.name] = tensor
    return stored


def _read_index(directory: Path) -> dict[Path, set[str]]:
    path = directory / INDEX_FILE
    entries = read_json(path).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(f"{path} has no weight_map.")
    files: dict[Path, set[str]] = {}
    for key, name in entries.items():
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            raise CheckpointError(
                f"{path} places {shown(key)} in {shown(name)}, which is no file beside it."
            )
        files.setdefault(directory / name, set()).add(key)
    return files


def _read_header(file: Path) -> list[StoredTensor]:
    """Read a safetensors header and check that its tensors tile the file exactly.

    The library would do most of this on opening; here it happens without torch, with bounds of
    our own, and with errors that name the tensor.
    """
    try:
        size = regular_file_size(file)
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file} is no safetensors file, or cut off: it has {size} bytes and announces "
                    f"a header of {length} (at most {_MAX_HEADER_BYTES} are expected)."
                )
            raw = stream.read(length)
    except FileError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has an unreadable header: {error}.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a header that is not a JSON object.")
    header.pop("__metadata__", None)
    if len(header) > _MAX_TENSORS:
        raise CheckpointError(f"{file} lists {len(header)} tensors; at most {_MAX_TENSORS}.")
    tensors = [_parse_entry(file, key, entry, 8 + length) for key, entry in header.items()]
    end = 8 + length
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != end:
            raise CheckpointError(
                f"{file}: tensor {tensor.key} starts at byte {tensor.offset}; expected {end}, "
                "where the one before it ends."
            )
        end += tensor.num_bytes
    if end != size:
        raise CheckpointError(
            f"{file} has {size} bytes; its header accounts for {end}. Was the copy cut off?"
        )
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _parse_entry(file: Path, key: str, entry: Any, start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
        if (
            not (isinstance(dtype, str) and isinstance(shape, list) and key.isprintable())
            or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers)
            or begin > end
            or len(shape) > 8
        ):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{file} has an unreadable entry for tensor {shown(key)}.") from None
    # A dtype we do not load is reported later, with the tensor's role; masks may have any.
    expected = math.prod(shape) * DTYPE_BYTES[dtype] if dtype in DTYPE_BYTES else end - begin
    if end - begin != expected:
        raise CheckpointError(
            f"{file}: tensor {key} has {end - begin} bytes; expected {expected} for {dtype} of "
            f"shape {shape}."
        )
    return StoredTensor(
        name=key.removeprefix("transformer."),
        key=key,
        file=file,
        dtype=dtype,
        shape=tuple(shape),
        offset=start + begin,
        num_bytes=end - begin,
    )
