"""Any supported checkpoint to ours: read, find the tokenizer, write, and tell all of it."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from model.config import Activation
from weights.checkpoint import write
from weights.convert.hugging_face import copy_tokenizer, keep_token_ids
from weights.convert.recognition import read_foreign
from weights.convert.tokenizer_search import FoundTokenizer, find_tokenizer, is_padded
from weights.errors import CheckpointError
from weights.files import CONFIG_FILE, read_json
from weights.layout import read_layout
from weights.new_directory import new_directory


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """What a conversion did, a line each, for people."""

    directory: Path
    found: list[str]
    changed: list[str]
    written: list[str]


def convert(
    source: Path,
    destination: Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer_directory: Path | None = None,
    meta: Path | None = None,
    without_tokenizer: bool = False,
    activation: Activation | None = None,
) -> ConversionReport:
    """Turn a checkpoint of another program into a directory of ours, whole or not at all.

    Args:
        source: nanoGPT's ckpt.pt, llm.c's model.bin, a Hugging Face directory with safetensors or
            pickled weights, or a directory with just one such file.
        destination: a new directory.
        dtype: float32, float16 or bfloat16 on disk; None keeps the source's.
        tokenizer_directory: a byte-level BPE's files, or a directory with llm.c's.
        meta: nanoGPT's meta.pkl, for a model of characters.
        without_tokenizer: go on without one; the result is served once a tokenizer lies beside it.
        activation: what a nanoGPT checkpoint is taken to compute; the others say it themselves.

    Raises:
        CheckpointError: naming the file, what was expected and found, and what to do.
    """
    if os.path.lexists(destination):
        raise CheckpointError(f"{destination} exists already; name another place or remove it.")
    try:
        before = _stamps(source)
        foreign = read_foreign(source, activation)
        if activation not in (None, foreign.config.activation):
            raise CheckpointError(
                f"{foreign.path} computes {foreign.config.activation}, as its format says, and not "
                f"{activation}: --activation is for nanoGPT's files, which do not say."
            )
        found = find_tokenizer(
            foreign, directory=tokenizer_directory, meta=meta, without=without_tokenizer
        )
    except OSError as error:
        where = error.filename or source
        raise CheckpointError(f"{where} cannot be read: {error.strerror}.") from error
    changed = [*foreign.changed, *found.passed_over]
    vocab_size = _choose_vocab_size(foreign.config.vocab_size, found, changed)
    model = foreign.build(vocab_size)
    dtype = _choose_dtype({parameter.dtype for parameter in model.parameters()}, dtype, changed)
    keeps_files = found.origin is not None and found.origin == foreign.huggingface
    try:
        with new_directory(destination) as partial:
            write(model, partial, tokenizer=None if keeps_files else found.tokenizer, dtype=dtype)
            if foreign.huggingface is not None and (keeps_files or found.tokenizer is None):
                _keep_huggingface(foreign.huggingface, partial, tokenizer=keeps_files)
            _check_usable(partial, source)
            _check_unchanged(foreign.path, before)
            written = sorted(f"{p.name} ({p.stat().st_size:,} bytes)" for p in partial.iterdir())
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be written: {error.strerror}.") from error
    return ConversionReport(
        directory=destination,
        found=[*foreign.found, _describe(found)],
        changed=changed,
        written=written,
    )


def _check_usable(partial: Path, source: Path) -> None:
    """What we wrote, we can read: checked before it gets its name."""
    try:
        read_layout(partial)
    except CheckpointError as error:
        raise CheckpointError(f"{source} would make no usable checkpoint: {error}") from error


def _stamps(source: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of a file, or of every file in a directory."""
    files = [file for file in source.iterdir() if file.is_file()] if source.is_dir() else [source]
    return {file: _stamp(file) for file in files if file.exists()}


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _check_unchanged(path: Path, before: dict[Path, tuple[int, int]]) -> None:
    """Refuse a mixture: nanoGPT writes each checkpoint over the last, and ours is a map of it."""
    if path in before and _stamp(path) != before[path]:
        raise CheckpointError(
            f"{path} was written to while it was read. Is training still running? Copy the file "
            "between two checkpoints, or try again."
        )


def _choose_vocab_size(rows: int, found: FoundTokenizer, changed: list[str]) -> int:
    """How many of the vocabulary's rows to keep; says so in `changed`."""
    if found.tokenizer is None:
        changed.append("no tokenizer: put its files beside the weights before you serve them")
        return rows
    num_ids = found.tokenizer.vocab_size
    if rows == num_ids:
        return rows
    if not is_padded(rows, num_ids):
        changed.append(f"kept {rows} rows of vocabulary, {rows - num_ids} more than there are ids")
        return rows
    changed.append(f"cut the vocabulary's padding: {rows} rows to the tokenizer's {num_ids}")
    return num_ids


def _choose_dtype(
    found: set[torch.dtype], wanted: torch.dtype | None, changed: list[str]
) -> torch.dtype:
    """The dtype to write, the source's own unless it has several or a wide one."""
    kept = next(iter(found)) if len(found) == 1 else torch.float32
    dtype = wanted or (torch.float32 if kept == torch.float64 else kept)
    names = [str(dtype).removeprefix("torch.") for dtype in (*sorted(found, key=str), dtype)]
    if found != {dtype}:
        changed.append(f"converted {', '.join(names[:-1])} to {names[-1]}")
    return dtype


def _keep_huggingface(source: Path, partial: Path, *, tokenizer: bool) -> None:
    """Leave as it was what a Hugging Face directory says beside its weights."""
    document = read_json(partial / CONFIG_FILE)
    keep_token_ids(source, document, partial)
    (partial / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if tokenizer:
        copy_tokenizer(source, partial)


def _describe(found: FoundTokenizer) -> str:
    if found.tokenizer is None:
        return "no tokenizer, as asked"
    kind, size = found.tokenizer.kind, found.tokenizer.vocab_size
    return f"{found.origin}: the tokenizer, {kind}, {size} ids"
