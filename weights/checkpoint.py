"""GPTs to and from checkpoint directories; what may lie in one is `layout.py`'s to say."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from model.gpt import GPT, Block
from model.tokenizer import Tokenizer
from weights.errors import CheckpointError
from weights.files import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from weights.hugging_face_config import format_config
from weights.layout import TRANSPOSED, Layout, read_layout, stored_shapes
from weights.new_directory import new_directory
from weights.tensor_headers import StoredTensor

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK_BYTES = 2**20  # read at a time, so that loading needs little more than the model


def save(
    model: GPT,
    directory: Path,
    *,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Save a model as a new checkpoint directory: there as a whole or not at all.

    Raises CheckpointError if the directory exists; see `write` for the rest.
    """
    with new_directory(directory) as partial:
        write(model, partial, tokenizer=tokenizer, dtype=dtype, max_shard_bytes=max_shard_bytes)


def write(
    model: GPT,
    directory: Path,
    *,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a checkpoint's files into a directory that `new_directory` yielded.

    Args:
        model: what to write.
        directory: an existing directory.
        tokenizer: written beside it; its bos and eos ids go into the config. None leaves a
            checkpoint that knows token ids only.
        dtype: float32, float16 or bfloat16 on disk; None keeps the model's own.
        max_shard_bytes: weights beyond this size are split over several files with an index.

    Raises:
        CheckpointError: the tokenizer does not fit the model, or a tensor is not finite.
    """
    config = model.config
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"The tokenizer has {tokenizer.vocab_size} ids and the model only "
            f"{config.vocab_size}; they do not belong together."
        )
    dtype = dtype or model.wte.weight.dtype
    if dtype not in _DTYPES.values():
        raise CheckpointError(f"Checkpoints hold float32, float16 or bfloat16, not {_name(dtype)}.")
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    for name, shape in stored_shapes(config).items():
        if name not in parameters:  # a model without biases: zeros, or Hugging Face cannot load it
            tensors[f"transformer.{name}"] = torch.zeros(shape, dtype=dtype)
            continue
        tensor = parameters[name].detach()
        if name.endswith(TRANSPOSED):
            tensor = tensor.T
        tensor = tensor.to("cpu", dtype).contiguous()
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"The tensor {name} is not finite in {_name(dtype)}; not saved.")
        tensors[f"transformer.{name}"] = tensor
    document = format_config(
        config,
        dtype=_name(dtype),
        bos_token_id=tokenizer.bos_token_id if tokenizer else None,
        eos_token_id=tokenizer.eos_token_id if tokenizer else None,
    )
    try:
        _write_tensors(tensors, directory, max_shard_bytes)
        text = json.dumps(document, indent=2) + "\n"
        (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.write(directory)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error.strerror}.") from error


def load(
    directory: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> GPT:
    """Load a model in any floating dtype straight to a device; None keeps the dtype on disk.

    Needs the model's own memory and some 5 MB. Raises CheckpointError, see `read_layout`; also
    for values that are not finite, an output head that differs from the embedding, and biases
    that are not zero in a model without biases.
    """
    layout = read_layout(directory)
    if dtype is None:
        on_disk = layout.dtypes
        dtype = _DTYPES[on_disk[0]] if len(on_disk) == 1 else torch.float32
    return load_layout(layout, device=device, dtype=dtype)


def load_layout(
    layout: Layout,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    reads_blocks_late: bool = False,
) -> GPT:
    """Load the model of a layout that has been read already; see `load`.

    With `reads_blocks_late`, a block is read when a loop over `model.h` comes to it, and no other
    access reads it: who makes something else of each block and drops it never holds them all. What
    is wrong with a block is raised then.
    """
    with torch.device("meta"):
        model = GPT(layout.config)
    reader = _Reader()

    def read(prefix: str) -> None:
        for name, tensor in layout.tensors.items():
            if not name.startswith(prefix) or not model.get_parameter(name).is_meta:
                continue
            parameter = torch.empty(model.get_parameter(name).shape, dtype=dtype, device=device)
            _copy(reader, tensor, parameter, is_transposed=name.endswith(TRANSPOSED))
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, nn.Parameter(parameter))

    for name, _ in model.named_children():
        if name != "h":
            read(f"{name}.")
    if reads_blocks_late:
        model.h = _StoredBlocks(model.h, read)
    else:
        read("h.")
    if layout.head is not None:
        _check_equal(reader, layout.head, layout.tensors["wte.weight"])
    for tensor in layout.zero_biases:
        if any(torch.count_nonzero(chunk) for chunk in reader.chunks(tensor)):
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.key} is not zero, and {CONFIG_FILE} says that the "
                "model has no biases."
            )
    return model.eval()


class _StoredBlocks(nn.ModuleList):
    """The blocks of a model, each read from the file when a loop comes to it."""

    def __init__(self, blocks: nn.ModuleList, read: Callable[[str], None]) -> None:
        super().__init__(blocks)
        self._read = read

    def __iter__(self) -> Iterator[nn.Module]:
        for layer in range(len(self)):
            if isinstance(self[layer], Block):  # and not what somebody made of it
                try:
                    self._read(f"h.{layer}.")
                except OSError as error:  # whoever loops over blocks expects no files
                    raise CheckpointError(
                        f"The checkpoint cannot be read: {error.strerror}."
                    ) from error
            yield self[layer]


class _Reader:
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
                yield raw.view(_DTYPES[tensor.dtype]).view(count, *rest)

    def transpose(self, chunk: Tensor) -> Tensor:
        """The transpose of a piece, contiguous, overwriting the one before it.

        torch turns one contiguous tensor into another by blocks; straight into columns of a larger
        one it would go value by value.
        """
        turned = self._turned[: chunk.nbytes].view(chunk.dtype).view(chunk.shape[1], len(chunk))
        return turned.copy_(chunk.T)


def _copy(reader: _Reader, tensor: StoredTensor, parameter: Tensor, *, is_transposed: bool) -> None:
    """Fill a parameter from the file."""
    row = 0
    for chunk in reader.chunks(tensor):
        _check_values(tensor, chunk, parameter.dtype)
        rows = slice(row, row + len(chunk))
        if is_transposed:
            parameter[:, rows] = reader.transpose(chunk)
        else:
            parameter[rows] = chunk
        row = rows.stop


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
            f"{tensor.file}: tensor {tensor.key} has values beyond the range of {_name(dtype)}; "
            "load it as float32."
        )


def _check_equal(reader: _Reader, head: StoredTensor, embedding: StoredTensor) -> None:
    """Check that a stored output head is the embedding: ours is tied to it."""
    pieces = zip(reader.chunks(embedding), _Reader().chunks(head), strict=True)
    for ours, theirs in pieces:
        if ours.dtype != theirs.dtype:
            ours, theirs = ours.float(), theirs.float()
        if not torch.equal(ours, theirs):
            raise CheckpointError(
                f"{head.file}: {head.key} differs from {embedding.key}; only tied output heads are "
                "supported."
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_tensors(tensors: dict[str, Tensor], directory: Path, max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        _write_file(tensors, directory / WEIGHTS_FILE)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(shard, directory / name)
        places |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, {"format": "pt"})  # without it, transformers refuses the file
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be written: {error}.") from error
    # The library leaves the file to its owner alone; let it be as open as what it lies in.
    path.chmod(path.parent.stat().st_mode & 0o666)
