"""What lies in a checkpoint directory, checked before anything is used; reads no tensor, no torch.

The layout is Hugging Face's for GPT-2: `config.json`, `model.safetensors` (or shards with an
index), tokenizer files.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import GPTConfig
from model.files import FileError, regular_file_size, shown
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

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}  # the safetensors names of what we load

_MAX_HEADER_BYTES = 2**20  # the 1.5B's header has 90 kB; the format alone would allow 100 MB
_MAX_TENSORS = 4096

# Conv1D in the published layout: stored (in, out), used by nn.Linear as (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


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
    if not os.path.lexists(directory / CONFIG_FILE):
        raise CheckpointError(
            f"{directory / CONFIG_FILE} is missing.{what_else_lies_in(directory)}"
        )
    document = read_json(directory / CONFIG_FILE)
    config = parse_config(document, directory / CONFIG_FILE)
    generation: dict[str, Any] = {}
    if os.path.lexists(directory / GENERATION_CONFIG_FILE):
        generation = read_json(directory / GENERATION_CONFIG_FILE)
    stored = _read_headers(directory)
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


def _read_headers(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a directory by parameter name, mask buffers left out."""
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
