"""What lies in a checkpoint directory, checked before anything is used; reads no tensor, no torch.

The layout is Hugging Face's for GPT-2: `config.json`, `model.safetensors` (or shards with an
index), tokenizer files. Other modules read each of them; here they are held against one another.
"""

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import GPTConfig
from model.files import shown
from model.tokenizer import Tokenizer, load_tokenizer
from weights.errors import CheckpointError
from weights.files import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    read_json,
    what_else_lies_in,
)
from weights.hugging_face_config import parse_config, parse_token_ids
from weights.tensor_headers import DTYPE_BYTES, StoredTensor, read_headers

# Conv1D in the published layout: stored (in, out), used by nn.Linear as (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The facts of a checkpoint directory whose structure has been checked."""

    directory: Path
    config: GPTConfig
    tensors: Mapping[str, StoredTensor]  # by parameter name, every parameter of the config
    head: StoredTensor | None  # a stored copy of the tied output head
    zero_biases: tuple[StoredTensor, ...]  # stored for a model without biases; must be zero
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def config_file(self) -> Path:
        """The file that the config came from."""
        return self.directory / CONFIG_FILE

    @property
    def files(self) -> list[Path]:
        """The weight files, in order."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    @property
    def dtypes(self) -> list[str]:
        """The dtypes on disk, as safetensors names them."""
        return sorted({tensor.dtype for tensor in self.tensors.values()})


def read_layout(directory: Path) -> Layout:
    """Read and check a checkpoint's config and the headers of its weight files.

    Raises CheckpointError, naming the file, the tensor, what was expected and what was found.
    """
    if not os.path.isdir(directory):
        raise CheckpointError(
            f"{directory} is not a directory; a checkpoint is a directory with {CONFIG_FILE} and "
            f"{WEIGHTS_FILE}."
        )
    if not os.access(directory, os.X_OK):  # what lies there would seem to be missing
        raise CheckpointError(f"{directory} cannot be read: {os.strerror(errno.EACCES)}.")
    if not os.path.lexists(directory / CONFIG_FILE):
        raise CheckpointError(
            f"{directory / CONFIG_FILE} is missing.{what_else_lies_in(directory)}"
        )
    document = read_json(directory / CONFIG_FILE)
    config = parse_config(document, directory / CONFIG_FILE)
    generation: dict[str, Any] = {}
    if os.path.lexists(directory / GENERATION_CONFIG_FILE):
        generation = read_json(directory / GENERATION_CONFIG_FILE)
    stored = read_headers(directory)
    shapes = stored_shapes(config)
    head = stored.pop("lm_head.weight", None)
    if head is not None:
        _check_tensor(head, shapes["wte.weight"])
    for name in shapes:
        if name not in stored:
            where = directory / (
                WEIGHTS_FILE if (directory / WEIGHTS_FILE).exists() else INDEX_FILE
            )
            raise CheckpointError(f"{where} lacks the tensor {name}, shape {list(shapes[name])}.")
    for name, tensor in stored.items():
        if name not in shapes:
            raise CheckpointError(
                f"{tensor.file} holds the tensor {tensor.key}, which a GPT-2 of {config.n_layer} "
                "layers does not have."
            )
        _check_tensor(tensor, shapes[name])
    # A model without biases is stored with zeros in their place, for Hugging Face's sake.
    absent = {n for n in shapes if not config.bias and n.endswith(".bias")}
    bos = parse_token_ids(document, generation, "bos_token_id", config, directory)
    return Layout(
        directory=directory,
        config=config,
        tensors={name: stored[name] for name in shapes if name not in absent},
        head=head,
        zero_biases=tuple(stored[name] for name in shapes if name in absent),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=parse_token_ids(document, generation, "eos_token_id", config, directory),
    )


def read_tokenizer(layout: Layout) -> Tokenizer:
    """Load the checkpoint's tokenizer and check that it fits the model's vocabulary.

    Raises CheckpointError if it has ids that the model has not, TokenizerError if it is unusable.
    """
    tokenizer = load_tokenizer(layout.directory)
    if tokenizer.vocab_size > layout.config.vocab_size:
        raise CheckpointError(
            f"{layout.directory}: the tokenizer has {tokenizer.vocab_size} ids and the model only "
            f"{layout.config.vocab_size}; they do not belong together."
        )
    return tokenizer


def stored_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shape on disk of every tensor of a model, biases included, by parameter name."""
    width, inner = config.n_embd, config.mlp_width
    layer = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.c_attn.weight": (width, 3 * width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (width, inner),
        "mlp.c_fc.bias": (inner,),
        "mlp.c_proj.weight": (inner, width),
        "mlp.c_proj.bias": (width,),
    }
    return {
        "wte.weight": (config.vocab_size, width),
        "wpe.weight": (config.n_ctx, width),
        **{f"h.{i}.{name}": shape for i in range(config.n_layer) for name, shape in layer.items()},
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }


def _check_tensor(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.key} should have shape {list(shape)} by "
            f"{CONFIG_FILE}, found {list(tensor.shape)}."
        )
    if tensor.dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.key} has dtype {shown(tensor.dtype)}; supported are "
            f"{', '.join(DTYPE_BYTES)}."
        )
