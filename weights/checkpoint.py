"""GPTs to and from checkpoint directories; what may lie in one is `layout.py`'s to say."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from model.gpt import GPT
from model.tokenizer import Tokenizer
from weights.errors import CheckpointError
from weights.files import CONFIG_FILE
from weights.hugging_face_config import format_config
from weights.layout import TRANSPOSED, Layout, read_layout, stored_shapes
from weights.new_directory import new_directory
from weights.tensor_headers import StoredTensor
from weights.tensor_values import DTYPES, TensorReader, dtype_name, write_tensors


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
        tokenizer: written beside it; its bos and eos ids go into the config. None leaves
            weights alone, which nothing serves until a tokenizer lies beside them.
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
    if dtype not in DTYPES.values():
        raise CheckpointError(
            f"Checkpoints hold float32, float16 or bfloat16, not {dtype_name(dtype)}."
        )
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
            raise CheckpointError(
                f"The tensor {name} is not finite in {dtype_name(dtype)}; not saved."
            )
        tensors[f"transformer.{name}"] = tensor
    document = format_config(
        config,
        dtype=dtype_name(dtype),
        bos_token_id=tokenizer.bos_token_id if tokenizer else None,
        eos_token_id=tokenizer.eos_token_id if tokenizer else None,
    )
    try:
        write_tensors(tensors, directory, max_shard_bytes)
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
        dtype = DTYPES[on_disk[0]] if len(on_disk) == 1 else torch.float32
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
    reader = TensorReader()

    def read(prefix: str) -> None:
        for name, tensor in layout.tensors.items():
            if not name.startswith(prefix) or not model.get_parameter(name).is_meta:
                continue
            parameter = torch.empty(model.get_parameter(name).shape, dtype=dtype, device=device)
            reader.fill(parameter, tensor, is_transposed=name.endswith(TRANSPOSED))
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
        self._unread = set(range(len(blocks)))

    def __iter__(self) -> Iterator[nn.Module]:
        for layer in range(len(self)):
            # Once: what was read may be another thing by now, packed weights for example.
            if layer in self._unread:
                try:
                    self._read(f"h.{layer}.")
                except OSError as error:  # whoever loops over blocks expects no files
                    raise CheckpointError(
                        f"The checkpoint cannot be read: {error.strerror}."
                    ) from error
                self._unread.remove(layer)
            yield self[layer]


def _check_equal(reader: TensorReader, head: StoredTensor, embedding: StoredTensor) -> None:
    """Check that a stored output head is the embedding: ours is tied to it."""
    pieces = zip(reader.chunks(embedding), TensorReader().chunks(head), strict=True)
    for ours, theirs in pieces:
        if ours.dtype != theirs.dtype:
            ours, theirs = ours.float(), theirs.float()
        if not torch.equal(ours, theirs):
            raise CheckpointError(
                f"{head.file}: {head.key} differs from {embedding.key}; only tied output heads are "
                "supported."
            )
