"""What a checkpoint directory holds, and would take to run, in lines to read; loads no tensors."""

import hashlib
from pathlib import Path

from model.vocabulary import TokenizerError
from weights.errors import CheckpointError
from weights.layout import Layout, read_layout, read_tokenizer
from weights.ledger import PRECISIONS, MemoryLedger, available_memory_bytes, format_bytes


def describe(directory: Path) -> list[str]:
    """The facts of a checkpoint, its files and its memory ledger.

    Raises CheckpointError, or OSError for a weight file that cannot be read. An unusable tokenizer
    is one of the facts.
    """
    layout = read_layout(directory)
    # Lines and no table: rich would cut what is wider than the terminal, the sha256 first.
    return [*_facts(layout), *_files(layout), "", *_ledgers(layout, available_memory_bytes())]


def _facts(layout: Layout) -> list[str]:
    config = layout.config
    facts = (
        ("parameters", f"{config.num_parameters:,}"),
        ("layers, heads, width", f"{config.n_layer}, {config.n_head}, {config.n_embd}"),
        ("MLP width", f"{config.mlp_width} ({config.activation})"),
        ("context", f"{config.n_ctx} tokens"),
        ("vocabulary", f"{config.vocab_size:,} rows"),
        ("biases", "yes" if config.bias else "no (stored as zeros)"),
        ("tokenizer", _tokenizer(layout)),
        ("bos, eos", f"{layout.bos_token_id}, {list(layout.eos_token_ids)}"),
        ("dtype on disk", ", ".join(layout.dtypes)),
    )
    return [f"{heading:<22}{value}" for heading, value in facts]


def _tokenizer(layout: Layout) -> str:
    try:
        tokenizer = read_tokenizer(layout)
    except (CheckpointError, TokenizerError) as error:
        return f"unusable: {error}"
    return f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids"


def _files(layout: Layout) -> list[str]:
    lines = []
    for file in layout.files:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        size = format_bytes(file.stat().st_size)
        lines += [f"{'file':<22}{file.name} ({size})", f"  sha256 {digest}"]
    return lines


def _ledgers(layout: Layout, available_bytes: int) -> list[str]:
    rows = [("precision", "weights", "KV a token", "KV a context", "contexts fit")]
    kinds = [(precision, precision, None) for precision in PRECISIONS]
    for kind, precision, kv_cache_dtype in (*kinds, ("int8 cache", "bfloat16", "int8")):
        ledger = MemoryLedger.of(layout.config, precision=precision, kv_cache_dtype=kv_cache_dtype)
        rows.append(
            (
                kind,
                format_bytes(ledger.weights_bytes),
                format_bytes(ledger.kv_bytes_per_token),
                format_bytes(ledger.kv_bytes_per_sequence),
                f"{ledger.num_sequences(available_bytes):,}",
            )
        )
    return [
        f"memory available      {format_bytes(available_bytes)}",
        *(f"{first:<12}" + "".join(f"{value:>16}" for value in rest) for first, *rest in rows),
    ]
