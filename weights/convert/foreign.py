"""A checkpoint of another program as its reader hands it over, the same for every format.

Knows names and shapes of GPT-2's tensors; neither files nor what becomes of the result.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import GPTConfig
from model.gpt import GPT
from weights.errors import CheckpointError

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks that some versions store
_WRAPPERS = ("_orig_mod.", "module.")  # of torch.compile and DistributedDataParallel
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignCheckpoint:
    """What a reader found.

    `tensors` may be maps of the file: nothing of them is in memory until it is used.
    """

    path: Path  # the file or directory that errors name
    config: GPTConfig
    tensors: Mapping[str, Tensor]  # by GPT's parameter names, Linear weights (out, in)
    found: list[str]  # a line each, for people
    changed: list[str]
    meta_files: list[Path] = field(default_factory=list)  # where nanoGPT may keep its characters
    tokenizer_places: list[Path] = field(default_factory=list)  # directories, or llm.c's file
    dataset: str | None = None  # nanoGPT's name for the text it was trained on
    huggingface: Path | None = None  # the directory, if it already is in that layout

    def build(self, vocab_size: int) -> GPT:
        """Make the model, its vocabulary cut to `vocab_size` rows, sharing the tensors' memory."""
        with torch.device("meta"):
            model = GPT(replace(self.config, vocab_size=vocab_size))
        wte = self.tensors["wte.weight"][:vocab_size]
        model.load_state_dict({**self.tensors, "wte.weight": wte}, assign=True)
        return model.eval()


def check_size(path: Path, config: GPTConfig, num_bytes: int) -> None:
    """Refuse a shape that the file is too small for, before anything is made in that shape."""
    least = 2 * config.num_parameters
    if least > num_bytes:
        raise CheckpointError(
            f"{path} describes a model of {config.num_parameters} parameters, at least {least} "
            f"bytes, and has {num_bytes}. Is it cut off, or are its numbers wrong?"
        )


def check_tensors(path: Path, config: GPTConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless these are the parameters of `config`, by name and shape.

    Call `check_size` first: the work here grows with the number of layers that `config` claims.
    """
    with torch.device("meta"):
        expected = {name: list(p.shape) for name, p in GPT(config).named_parameters()}
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{path} lacks the tensor {name}, shape {shape}.")
        found = list(tensors[name].shape)
        if found != shape:
            raise CheckpointError(
                f"{path}: tensor {name} should have shape {shape} by the file's own description, "
                f"found {found}."
            )
    for name in tensors:
        if name not in expected:
            raise CheckpointError(
                f"{path} holds the tensor {name}, which a GPT-2 of {config.n_layer} layers "
                f"{'with' if config.bias else 'without'} biases does not have. A fork with another "
                "architecture cannot be converted."
            )


def clean_names(
    path: Path, stored: Mapping[Any, Any], num_bytes: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Bring a state dict's names to ours and drop what is no parameter.

    Args:
        path: for errors.
        stored: a state dict as it was read.
        num_bytes: of the file; tensors that claim more have been tampered with.

    Returns:
        The tensors by GPT's names, still in the orientation they were stored in, and a line about
        each change.
    """
    tensors: dict[str, Tensor] = {}
    wrapped, masks = 0, 0
    for key, value in stored.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} holds a {type(value).__name__} under {key!r} where only named tensors "
                "belong."
            )
        name = key
        while name.startswith(_WRAPPERS):
            name = name.split(".", 1)[1]
        wrapped += name != key
        name = name.removeprefix("transformer.")
        if name.endswith(_MASKS):
            masks += 1
            continue
        if name in tensors:
            raise CheckpointError(f"{path} stores {name} twice, the second time as {key}.")
        _check_plain(path, key, value)
        tensors[name] = value
    changed = []
    if wrapped:
        changed.append(f"took torch.compile's or DDP's prefix off {wrapped} names")
    if masks:
        changed.append(f"dropped {masks} stored causal masks")
    head = tensors.pop(_HEAD, None)
    if head is not None and "wte.weight" in tensors:
        wte = tensors["wte.weight"]
        if head.shape != wte.shape or not torch.equal(head, wte):
            raise CheckpointError(
                f"{path}: {_HEAD} differs from the embedding wte.weight; only models whose output "
                "head is tied to the embedding can be converted."
            )
        changed.append(f"dropped {_HEAD}, which equals wte.weight")
    # A tensor may claim to be larger than what is stored, by strides of zero.
    claimed = sum(tensor.nbytes for tensor in tensors.values())
    if claimed > num_bytes:
        raise CheckpointError(
            f"{path} has {num_bytes} bytes and its tensors claim {claimed}: it is damaged, or made "
            "to fill the disk."
        )
    return tensors, changed


def describe(config: GPTConfig, dtype: torch.dtype) -> str:
    """A model's shape in a line."""
    return (
        f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} wide, "
        f"context {config.n_ctx}, vocabulary {config.vocab_size}, "
        f"{'biases' if config.bias else 'no biases'}, {config.activation}, "
        f"{str(dtype).removeprefix('torch.')}: {config.num_parameters:,} parameters"
    )


def _check_plain(path: Path, key: str, tensor: Tensor) -> None:
    kind = "" if tensor.layout is torch.strided else f"{tensor.layout} ".removeprefix("torch.")
    if kind or tensor.device.type != "cpu" or tensor.dtype not in _FLOATS:
        raise CheckpointError(
            f"{path}: tensor {key} is a {kind}{tensor.dtype} tensor on {tensor.device}; expected "
            "plain floating-point numbers."
        )
