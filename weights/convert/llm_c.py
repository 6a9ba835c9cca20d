"""llm.c's model.bin and its tokenizer file: a header of 256 integers, then plain arrays."""

import itertools
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from model.config import GPTConfig
from model.tokenizer import BytePairTokenizer
from model.vocabulary import END_OF_TEXT, TokenizerError, byte_alphabet
from weights.convert.foreign import ForeignCheckpoint, describe
from weights.errors import CheckpointError

_MODEL_MAGIC = 20240326
TOKENIZER_FILE = "gpt2_tokenizer.bin"
_TOKENIZER_MAGIC = 20240328
_OTHER_MAGICS = {
    20240327: "llm.c's debug state",
    _TOKENIZER_MAGIC: "llm.c's tokenizer",
    20240520: "llm.c's tokens",
    20240527: "llm.c's optimizer state",
    20240801: "llm.c's tokens",
    20240803: "a Llama 3 of llm.c",
}
_HEADER = struct.Struct("<256i")
_MAX_TOKENIZER_BYTES = 64 * 2**20
_DTYPES = {3: torch.float32, 5: torch.bfloat16}  # by version


def is_llm_c(start: bytes, *, only_models: bool = False) -> bool:
    """Whether a file that begins so is one of llm.c's, of whatever kind or a model."""
    magic = _magic(start)
    return magic == _MODEL_MAGIC or (magic in _OTHER_MAGICS and not only_models)


def read_llm_c(path: Path) -> ForeignCheckpoint:
    """Map llm.c's model.bin; nothing is allocated by what its header claims.

    Raises CheckpointError if the file is not exactly as long as its header says, or of another
    kind or version.
    """
    num_bytes = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(_HEADER.size)
    if len(start) == _HEADER.size and _magic(start) in _OTHER_MAGICS:
        raise CheckpointError(f"{path} is {_OTHER_MAGICS[_magic(start)]}, not a model.")
    if len(start) < _HEADER.size:
        raise CheckpointError(f"{path} has {num_bytes} bytes; llm.c's header alone has 1024.")
    _, version, n_ctx, vocab_size, n_layer, n_head, n_embd, rows, *_ = _HEADER.unpack(start)
    # An old version 3 was bfloat16 without padding; it left the padded size at zero.
    if version not in _DTYPES or rows == 0:
        raise CheckpointError(
            f"{path} is of llm.c's format {version}{' without padding' if rows == 0 else ''}; "
            "supported are 3 (float32) and 5 (bfloat16), since April 2024. Write it again with a "
            "newer llm.c."
        )
    try:
        config = GPTConfig(
            n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_ctx=n_ctx, vocab_size=vocab_size
        )
    except ValueError as error:
        raise CheckpointError(f"{path} has an impossible header: {error}.") from error
    if rows < vocab_size:
        raise CheckpointError(
            f"{path} has an impossible header: {rows} padded rows for {vocab_size} tokens."
        )
    dtype = _DTYPES[version]
    num_values = config.num_parameters + (rows - vocab_size) * n_embd
    expected = _HEADER.size + num_values * dtype.itemsize
    if num_bytes != expected:
        raise CheckpointError(
            f"{path} has {num_bytes} bytes; by its header it should have {expected}. Was the copy "
            "cut off?"
        )
    values = torch.from_file(str(path), shared=False, size=num_bytes // dtype.itemsize, dtype=dtype)
    tensors = dict(_split(values[_HEADER.size // dtype.itemsize :], config, rows))
    tensors["wte.weight"] = tensors["wte.weight"][:vocab_size]
    changed = []
    if rows > vocab_size:
        changed.append(f"cut the embedding's padding, {rows} rows to {vocab_size}")
    return ForeignCheckpoint(
        path=path,
        config=config,
        tensors=tensors,
        found=[f"{path}: an llm.c model, format {version}", describe(config, dtype)],
        changed=changed,
        # llm.c keeps the tokenizer at its root, and a run's models there or in a directory below.
        tokenizer_places=[
            *(folder / TOKENIZER_FILE for folder in path.absolute().parents[:2]),
            path.absolute().parent,
        ],
    )


def read_llm_c_tokenizer(path: Path) -> BytePairTokenizer:
    """Read gpt2_tokenizer.bin, which lists every token's bytes.

    It has no merges, and needs none: a token's own bytes, merged by the ranks below its own, end
    as the pair it was made from. Raises CheckpointError.
    """
    if path.stat().st_size > _MAX_TOKENIZER_BYTES:
        raise CheckpointError(
            f"{path} is larger than any tokenizer ({_MAX_TOKENIZER_BYTES} bytes)."
        )
    content = path.read_bytes()
    header = _HEADER.unpack(content[: _HEADER.size]) if len(content) >= _HEADER.size else (0,) * 4
    magic, version, num_tokens, end_of_text = header[:4]
    if magic != _TOKENIZER_MAGIC or version != 2 or not 0 <= end_of_text < num_tokens:
        raise CheckpointError(
            f"{path} is not a tokenizer of llm.c's format 2: magic {magic}, version {version}, "
            f"{num_tokens} tokens, end of text {end_of_text}."
        )
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    ids: dict[str, int] = {}
    place = _HEADER.size
    for token_id in range(num_tokens):
        length = content[place] if place < len(content) else 0
        token = content[place + 1 : place + 1 + length]
        if not token or len(token) != length:
            raise CheckpointError(f"{path} is cut off, or empty, at token {token_id}.")
        place += 1 + length
        if token_id != end_of_text:
            ids["".join(letters[byte] for byte in token)] = token_id
    if place != len(content):
        raise CheckpointError(f"{path} goes on for {len(content) - place} bytes after its tokens.")
    merges = [_pair(token, ids, path) for token in ids if len(token) > 1]
    try:
        return BytePairTokenizer.from_merges(ids, merges, {END_OF_TEXT: end_of_text})
    except TokenizerError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _magic(start: bytes) -> int:
    return int.from_bytes(start[:4], "little")


def _split(values: Tensor, config: GPTConfig, rows: int) -> Iterator[tuple[str, Tensor]]:
    """Cut the flat array into named views: every kind of tensor lies together, layer by layer."""
    width, inner = config.n_embd, config.mlp_width
    place = 0

    def take(*shape: int) -> Tensor:
        nonlocal place
        view = values[place : place + math.prod(shape)].view(shape)
        place += view.numel()
        return view

    yield "wte.weight", take(rows, width)
    yield "wpe.weight", take(config.n_ctx, width)
    for name, shape in (
        ("ln_1.weight", (width,)),
        ("ln_1.bias", (width,)),
        ("attn.c_attn.weight", (3 * width, width)),
        ("attn.c_attn.bias", (3 * width,)),
        ("attn.c_proj.weight", (width, width)),
        ("attn.c_proj.bias", (width,)),
        ("ln_2.weight", (width,)),
        ("ln_2.bias", (width,)),
        ("mlp.c_fc.weight", (inner, width)),
        ("mlp.c_fc.bias", (inner,)),
        ("mlp.c_proj.weight", (width, inner)),
        ("mlp.c_proj.bias", (width,)),
    ):
        for layer in range(config.n_layer):
            yield f"h.{layer}.{name}", take(*shape)
    yield "ln_f.weight", take(width)
    yield "ln_f.bias", take(width)
    assert place == len(values)


def _pair(token: str, ids: dict[str, int], path: Path) -> tuple[str, str]:
    """The two parts that `token` was merged from."""
    parts = list(token)
    while len(parts) > 2:
        ranks = [ids.get(a + b, len(ids) + 1) for a, b in itertools.pairwise(parts)]
        place = ranks.index(min(ranks))
        if ranks[place] >= ids[token]:
            raise CheckpointError(f"{path}: no two tokens make token {ids[token]}, {token!r}.")
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]
