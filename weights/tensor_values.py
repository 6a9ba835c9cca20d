"""Tensors out of safetensors files, in pieces, and into them; knows no model and no config."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from weights.errors import CheckpointError
from weights.files import INDEX_FILE, WEIGHTS_FILE
from weights.tensor_headers import StoredTensor

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK_BYTES = 2**20  # read at a time, so that loading needs little more than the model


def dtype_name(dtype: torch.dtype) -> str:
    """What torch calls a dtype, such as float32."""
    return str(dtype).removeprefix("torch.")


class TensorReader:
    """Reads tensors a MiB at a time, through the same memory again and again.

    Fresh pages would cost more than what is read into them. Not mapped: the pages of a map count
    as ours, and a file cut short behind it kills.
    """

    def __init__(self) -> None:
        self._raw = torch.empty(_CHUNK_BYTES, dtype=torch.uint8)
        self._turned = torch.empty(_CHUNK_BYTES, dtype=torch.uint8)

    def chunks(self, tensor: StoredTensor) -> Iterator[Tensor]:
        """A stored tensor's rows, in pieces each of which overwrites the one before it."""
        num_rows, *rest = tensor.shape
        row_bytes = tensor.num_bytes // num_rows
        if row_bytes > len(self._raw):
            self._raw, self._turned = (torch.empty(row_bytes, dtype=torch.uint8) for _ in range(2))
        # Counted in float32, so that two copies of a tensor in two dtypes come in the same pieces.
        step = max(1, _CHUNK_BYTES // (4 * math.prod(rest)))
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.offset)
            for first in range(0, num_rows, step):
                count = min(step, num_rows - first)
                raw = self._raw[: count * row_bytes]
                if stream.readinto(raw.numpy().data) != len(raw):
                    raise CheckpointError(f"{tensor.file} was cut off while {tensor.key} was read.")
                yield raw.view(DTYPES[tensor.dtype]).view(count, *rest)

    def fill(self, parameter: Tensor, tensor: StoredTensor, *, is_transposed: bool) -> None:
        """Fill a parameter from the file.

        Raises CheckpointError for a value that is not finite, or not in the parameter's dtype.
        """
        row = 0
        for chunk in self.chunks(tensor):
            _check_values(tensor, chunk, parameter.dtype)
            rows = slice(row, row + len(chunk))
            if is_transposed:
                parameter[:, rows] = self._transpose(chunk)
            else:
                parameter[rows] = chunk
            row = rows.stop

    def _transpose(self, chunk: Tensor) -> Tensor:
        """The transpose of a piece, contiguous, overwriting the one before it.

        torch turns one contiguous tensor into another by blocks; straight into columns of a larger
        one it would go value by value.
        """
        turned = self._turned[: chunk.nbytes].view(chunk.dtype).view(chunk.shape[1], len(chunk))
        return turned.copy_(chunk.T)


def _check_values(tensor: StoredTensor, chunk: Tensor, dtype: torch.dtype) -> None:
    """Check that no value is infinite or NaN, as stored and in `dtype`.

    By the smallest and the largest: one pass without temporaries, a NaN makes both NaN, and
    rounding keeps their order.
    """
    ends = torch.stack(torch.aminmax(chunk))
    if not torch.isfinite(ends).all():
        raise CheckpointError(f"{tensor.file}: tensor {tensor.key} holds values not finite.")
    if not torch.isfinite(ends.to(dtype)).all():
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.key} has values beyond the range of "
            f"{dtype_name(dtype)}; load it as float32."
        )


def write_tensors(tensors: dict[str, Tensor], directory: Path, max_shard_bytes: int) -> None:
    """Write tensors by key into a directory, those beyond `max_shard_bytes` into further files.

    Raises CheckpointError or OSError.
    """
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        write_file(tensors, directory / WEIGHTS_FILE)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(shard, directory / name)
        places |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one safetensors file. Raises CheckpointError."""
    try:
        save_file(tensors, path, {"format": "pt"})  # without it, transformers refuses the file
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be written: {error}.") from error
    # The library leaves the file to its owner alone; let it be as open as what it lies in.
    path.chmod(path.parent.stat().st_mode & 0o666)
