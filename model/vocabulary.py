"""Byte-level BPE vocabularies as they lie on disk, in the layouts GPT-2's was published in.

Reads files and checks them; knows nothing of how text is encoded.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

END_OF_TEXT = "<|endoftext|>"

# Of the merges of OpenAI's GPT-2, joined by newlines: known good, so the check below is skipped.
_GPT2_MERGES_SHA256 = "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0"
_MERGES_FILES = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
_MAX_FILE_BYTES = 64 * 2**20


class TokenizerError(Exception):
    """A vocabulary that cannot be used, or text or ids that it does not cover."""


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in GPT-2's files: character -> byte.

    Printable Latin-1 stands for itself; the 68 other bytes are shifted, in order, to U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return alphabet


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A byte-level BPE: ids of token strings in the byte alphabet, and merges in order.

    Raises TokenizerError unless ids, merges and tokens fit together.
    """

    tokens: Mapping[str, int]  # byte-alphabet string -> id, special tokens not included
    merges: list[tuple[str, str]]
    special: Mapping[str, int] = field(default_factory=dict)  # text -> id; never read from text
    added: Mapping[str, int] = field(default_factory=dict)  # text -> id; recognised in text

    def __post_init__(self) -> None:
        ids = [*self.tokens.values(), *self.special.values(), *self.added.values()]
        if any(type(i) is not int or i < 0 for i in ids):
            raise TokenizerError("The vocabulary has an id that is not a whole number from 0 on.")
        if len(set(ids)) != len(ids):
            raise TokenizerError("The vocabulary gives one id to two tokens.")
        alphabet = byte_alphabet()
        last = -1
        for left, right in self.merges:
            merged = self.tokens.get(left + right)
            if merged is None or left not in self.tokens or right not in self.tokens:
                raise TokenizerError(
                    f"The merge {left!r} {right!r} needs a token that is not in the vocabulary."
                )
            if merged <= last:
                raise TokenizerError(
                    f"The merge {left!r} {right!r} makes id {merged} after id {last}: merges must "
                    "be listed in the order of the ids they make."
                )
            last = merged
        reachable = {left + right for left, right in self.merges}
        for token in self.tokens:
            if token not in reachable and token not in alphabet:
                raise TokenizerError(f"No merge makes the token {token!r} of the vocabulary.")
            if not all(character in alphabet for character in token):
                raise TokenizerError(
                    f"The token {token!r} is not written in GPT-2's byte alphabet: this is not a "
                    "byte-level BPE."
                )

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(
            max(group.values(), default=-1) for group in (self.tokens, self.special, self.added)
        )

    def token_bytes(self) -> dict[bytes, int]:
        """The bytes of every ordinary token, with its id."""
        alphabet = byte_alphabet()
        return {bytes(alphabet[c] for c in token): i for token, i in self.tokens.items()}

    def check_merges(self) -> None:
        """Check that merging by rank alone, as tiktoken does, is merging by this list of pairs.

        tiktoken merges any two neighbours whose concatenation is a token; the list allows one pair
        a token. They agree on every text if and only if each token's own bytes, merged by the
        ranks below its own, end as its listed pair: whatever surrounds them, merges inside a span
        whose two ends survive are those of the span alone. Raises TokenizerError otherwise.
        """
        listing = "\n".join(f"{left} {right}" for left, right in self.merges)
        if hashlib.sha256(listing.encode()).hexdigest() == _GPT2_MERGES_SHA256:
            return
        for left, right in self.merges:
            parts = self._merge(left + right)
            if parts != [left, right]:
                raise TokenizerError(
                    f"The vocabulary is ambiguous: the token {left + right!r} is listed as "
                    f"{left!r} + {right!r}, and its bytes merge as {' + '.join(map(repr, parts))}."
                )

    def _merge(self, token: str) -> list[str]:
        """Merge a token's characters by the ranks below its own."""
        limit, parts, tokens = self.tokens[token], list(token), self.tokens
        while len(parts) > 2:
            ranks = [tokens.get(parts[i] + parts[i + 1], limit) for i in range(len(parts) - 1)]
            best = min(ranks)
            if best >= limit:
                break
            place = ranks.index(best)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        return parts


def read_vocabulary(directory: Path) -> Vocabulary:
    """Read a checkpoint's BPE: `tokenizer.json`, or `vocab.json` with `merges.txt` or their elders.

    Raises TokenizerError, naming the file, for whatever is not a byte-level BPE with GPT-2's rule
    for splitting text.
    """
    for name, read in (
        ("tokenizer.json", _read_tokenizer_json),
        ("vocab.json", _read_pair),
        ("encoder.json", _read_pair),
    ):
        path = directory / name
        if path.exists():
            try:
                return read(path)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise TokenizerError(f"{path} is not built as expected: {error!r}.") from error
    raise TokenizerError(
        f"{directory} holds no tokenizer: expected vocab.json and merges.txt, encoder.json and "
        "vocab.bpe, tokenizer.json, or characters.json."
    )


def write_vocabulary(vocabulary: Vocabulary, directory: Path, *, end_of_text: str | None) -> None:
    """Write `vocab.json`, `merges.txt` and the `tokenizer_config.json` that transformers wants."""
    listed = {**vocabulary.tokens, **vocabulary.special}
    ordered = dict(sorted(listed.items(), key=lambda item: item[1]))
    (directory / "vocab.json").write_text(json.dumps(ordered, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in vocabulary.merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    decoder = {
        str(i): {
            "content": text,
            "special": special,
            "normalized": False,
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
        }
        for group, special in ((vocabulary.special, True), (vocabulary.added, False))
        for text, i in group.items()
    }
    settings: dict[str, Any] = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
    }
    if end_of_text is not None:
        settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), end_of_text)
    (directory / "tokenizer_config.json").write_text(
        json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises TokenizerError, naming the file."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise TokenizerError(f"{path} is larger than any vocabulary ({_MAX_FILE_BYTES} bytes).")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold a JSON object, found {type(value).__name__}.")
    return value


def _read_pair(path: Path) -> Vocabulary:
    directory = path.parent
    listed = read_json(path)
    merges = _read_merges(directory / _MERGES_FILES[path.name])
    # What neither is a byte nor comes from a merge was added by name, as <|endoftext|> was.
    alphabet, reachable = byte_alphabet(), {left + right for left, right in merges}
    tokens = {t: i for t, i in listed.items() if t in reachable or t in alphabet}
    special = {t: i for t, i in listed.items() if t not in tokens}
    added: dict[str, int] = {}
    if (directory / "added_tokens.json").exists():
        special |= read_json(directory / "added_tokens.json")
    if (directory / "tokenizer_config.json").exists():
        settings = read_json(directory / "tokenizer_config.json")
        if settings.get("add_prefix_space"):
            raise TokenizerError(
                f"{directory / 'tokenizer_config.json'} asks for add_prefix_space, which is not "
                "supported."
            )
        entries = settings.get("added_tokens_decoder") or {}
        new_special, added = _sort_added(
            directory / "tokenizer_config.json",
            ({"id": int(i), **entry} for i, entry in entries.items()),
        )
        special = {t: i for t, i in special.items() if t not in added} | new_special
    return _build(path, tokens, merges, special, added)


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise TokenizerError(f"{path} is not UTF-8 text.") from error
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        # Only the first line can be a comment: "#" is also a token that takes part in merges.
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise TokenizerError(f"{path}, line {number}: expected two tokens, found {line!r}.")
        merges.append((parts[0], parts[1]))
    return merges


def _read_tokenizer_json(path: Path) -> Vocabulary:
    document = read_json(path)
    model = document.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise TokenizerError(f"{path} has no vocabulary under model.vocab.")
    kind = model.get("type", "BPE" if "merges" in model else "unknown")
    if kind != "BPE":
        raise TokenizerError(f"{path} is a {kind} tokenizer; only byte-level BPE is supported.")
    for option in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                   "byte_fallback", "ignore_merges"):  # fmt: skip
        if model.get(option):
            raise TokenizerError(
                f"{path} sets model.{option} to {model[option]!r}, which is not supported."
            )
    if document.get("normalizer") is not None:
        raise TokenizerError(
            f"{path} has a {document['normalizer'].get('type')} normalizer, which is not supported."
        )
    split = document.get("pre_tokenizer") or {}
    if split.get("type") != "ByteLevel" or not split.get("use_regex", True):
        raise TokenizerError(
            f"{path} splits text by {split.get('type')}; only GPT-2's ByteLevel is supported."
        )
    if split.get("add_prefix_space"):
        raise TokenizerError(f"{path} asks for add_prefix_space, which is not supported.")
    after = document.get("post_processor") or {"type": "ByteLevel"}
    template = [part for part in after.get("single", ()) if "Sequence" not in part]
    if after.get("type") not in ("ByteLevel", "TemplateProcessing") or template:
        raise TokenizerError(
            f"{path} adds tokens by a {after.get('type')} post-processor, which is not supported."
        )
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if any(len(merge) != 2 for merge in merges):
        raise TokenizerError(f"{path} has a merge that is not a pair of tokens.")
    special, added = _sort_added(path, document.get("added_tokens") or [])
    named = special.keys() | added.keys()
    tokens = {token: i for token, i in model["vocab"].items() if token not in named}
    alphabet, reachable = byte_alphabet(), {left + right for left, right in merges}
    special |= {t: i for t, i in tokens.items() if t not in reachable and t not in alphabet}
    tokens = {token: i for token, i in tokens.items() if token not in special}
    return _build(path, tokens, merges, special, added)


def _sort_added(
    path: Path, entries: Iterable[Mapping[str, Any]]
) -> tuple[dict[str, int], dict[str, int]]:
    """Tell special tokens, which text cannot spell, from added ones, which it can."""
    special: dict[str, int] = {}
    added: dict[str, int] = {}
    for entry in entries:
        text = entry["content"]
        # A spelled-out <|endoftext|> stays text even where a file forgets to mark it special.
        if entry.get("special") or text == END_OF_TEXT:
            special[text] = entry["id"]
            continue
        for option in ("lstrip", "rstrip", "single_word"):
            if entry.get(option):
                raise TokenizerError(
                    f"{path} adds the token {text!r} with {option}, which is not supported."
                )
        added[text] = entry["id"]
    return special, added


def _build(
    path: Path,
    tokens: dict[str, int],
    merges: list[Any],
    special: dict[str, int],
    added: dict[str, int],
) -> Vocabulary:
    try:
        vocabulary = Vocabulary(tokens=tokens, merges=merges, special=special, added=added)
        vocabulary.check_merges()
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error
    return vocabulary
