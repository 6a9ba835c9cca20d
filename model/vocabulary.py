"""Byte-level BPE vocabularies as they lie on disk, in the layouts GPT-2's was published in.

Reads files and checks them; knows nothing of how text is encoded.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.files import FileError, read_object, read_text, shown

END_OF_TEXT = "<|endoftext|>"

# Of the merges of OpenAI's GPT-2, joined by newlines: known good, so the check below is skipped.
_GPT2_MERGES_SHA256 = "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0"
_MERGES_FILES = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
_SETTINGS_FILE = "tokenizer_config.json"
_MAX_FILE_BYTES = 64 * 2**20
_MAX_IDS = 2**20  # four times the largest vocabulary in use; tables are as long as the largest id
_MAX_TOKEN_BYTES = 1024  # GPT-2's longest has 128; checking the merges is quadratic in it


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
        if not ids:
            raise TokenizerError("The vocabulary is empty.")
        if any(type(i) is not int or i < 0 for i in ids):
            raise TokenizerError("The vocabulary has an id that is not a whole number from 0 on.")
        if any(i >= _MAX_IDS for i in ids):
            raise TokenizerError(
                f"The vocabulary has the id {shown(max(ids))}; ids beyond {_MAX_IDS - 1} are not "
                "supported."
            )
        if len(set(ids)) != len(ids):
            raise TokenizerError("The vocabulary gives one id to two tokens.")
        if len({*self.tokens, *self.special, *self.added}) != len(ids):
            raise TokenizerError("The vocabulary lists a token twice.")
        for text in (*self.special, *self.added):
            if not isinstance(text, str) or not text or not _is_unicode(text):
                raise TokenizerError(f"The added token {shown(text)} is not text.")
        alphabet = byte_alphabet()
        last = -1
        for left, right in self.merges:
            if not all(character in alphabet for character in left + right):
                raise TokenizerError(
                    f"The merge {shown(left)} {shown(right)} is not written in GPT-2's byte "
                    "alphabet: this is not a byte-level BPE."
                )
            merged = self.tokens.get(left + right)
            if merged is None or left not in self.tokens or right not in self.tokens:
                raise TokenizerError(
                    f"The merge {shown(left)} {shown(right)} needs a token that is not in the "
                    "vocabulary."
                )
            if merged <= last:
                raise TokenizerError(
                    f"The merge {shown(left)} {shown(right)} makes id {merged} after id {last}: "
                    "merges must be listed in the order of the ids they make."
                )
            last = merged
        reachable = {left + right for left, right in self.merges}
        for token in self.tokens:
            if token not in reachable and token not in alphabet:
                raise TokenizerError(f"No merge makes the token {shown(token)} of the vocabulary.")
            if len(token) > _MAX_TOKEN_BYTES:
                raise TokenizerError(
                    f"The token {shown(token)} has {len(token)} bytes; at most {_MAX_TOKEN_BYTES} "
                    "are supported."
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
                    f"The vocabulary is ambiguous: the token {shown(left + right)} is listed as "
                    f"{shown(left)} + {shown(right)}, and its bytes merge as "
                    f"{' + '.join(map(shown, parts))}."
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
        if os.path.lexists(path):
            try:
                return read(path)
            except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
                raise TokenizerError(f"{path} is not built as expected: {error!r}.") from error
    raise TokenizerError(
        f"{directory} holds no tokenizer: expected vocab.json and merges.txt, encoder.json and "
        "vocab.bpe, tokenizer.json, or characters.json."
    )


def write_vocabulary(vocabulary: Vocabulary, directory: Path, *, end_of_text: str | None) -> None:
    """Write `vocab.json`, `merges.txt` and the `tokenizer_config.json` that transformers wants."""
    # The added ones too: transformers numbers anew what it does not find there.
    listed = {**vocabulary.tokens, **vocabulary.special, **vocabulary.added}
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
        # Spelled out even where there is none: transformers would add <|endoftext|> as a new id.
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), end_of_text),
    }
    (directory / _SETTINGS_FILE).write_text(
        json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises TokenizerError, naming the file."""
    try:
        return read_object(path, max_bytes=_MAX_FILE_BYTES)
    except FileError as error:
        raise TokenizerError(str(error)) from error


def _read_settings(directory: Path, *refused: str) -> dict[str, Any]:
    """Read `tokenizer_config.json`, if it is there, and refuse the options that change the ids."""
    path = directory / _SETTINGS_FILE
    settings = read_json(path) if os.path.lexists(path) else {}
    for option in refused:
        if settings.get(option):
            raise TokenizerError(f"{path} asks for {option}, which is not supported.")
    return settings


def _read_pair(path: Path) -> Vocabulary:
    directory = path.parent
    settings = _read_settings(directory, "add_prefix_space", "add_bos_token", "add_eos_token")
    listed = read_json(path)
    merges = _read_merges(directory / _MERGES_FILES[path.name])
    entries = settings.get("added_tokens_decoder") or {}
    special, added = _sort_added(
        directory / _SETTINGS_FILE, ({"id": int(i), **entry} for i, entry in entries.items())
    )
    # Before transformers 4.34, names and ids lay here, and elsewhere which of them are special.
    if os.path.lexists(directory / "added_tokens.json"):
        names = _special_names(directory, settings)
        for text, token_id in read_json(directory / "added_tokens.json").items():
            if text not in special and text not in added:
                (special if text in names else added)[text] = token_id
    return _build(path, listed, merges, special, added)


def _special_names(directory: Path, settings: Mapping[str, Any]) -> set[str]:
    """The tokens that an older checkpoint names as special: <|endoftext|>, padding and the like."""
    file = directory / "special_tokens_map.json"
    names = {END_OF_TEXT}
    for source in (settings, read_json(file) if os.path.lexists(file) else {}):
        for field_name, value in source.items():
            if field_name.endswith("_token") or field_name == "additional_special_tokens":
                for token in value if isinstance(value, list) else [value]:
                    text = token.get("content") if isinstance(token, dict) else token
                    if isinstance(text, str):
                        names.add(text)
    return names


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = read_text(path, max_bytes=_MAX_FILE_BYTES).split("\n")
    except FileError as error:
        raise TokenizerError(str(error)) from error
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        # Only the first line can be a comment: "#" is also a token that takes part in merges.
        if not line or (number == 1 and line.startswith("#version")):
            continue
        match line.split(" "):
            case [left, right] if left and right:
                merges.append((left, right))
            case _:
                raise TokenizerError(
                    f"{path}, line {number}: expected two tokens, found {shown(line)}."
                )
    return merges


def _read_tokenizer_json(path: Path) -> Vocabulary:
    # transformers lets this option overrule what tokenizer.json says.
    _read_settings(path.parent, "add_prefix_space")
    document = read_json(path)
    model = document.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise TokenizerError(f"{path} has no vocabulary under model.vocab.")
    kind = model.get("type", "BPE" if "merges" in model else "unknown")
    if kind != "BPE":
        raise TokenizerError(
            f"{path} is a {shown(kind)} tokenizer; only byte-level BPE is supported."
        )
    for option in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                   "byte_fallback", "ignore_merges"):  # fmt: skip
        if model.get(option):
            raise TokenizerError(
                f"{path} sets model.{option} to {shown(model[option])}, which is not supported."
            )
    if document.get("normalizer") is not None:
        raise TokenizerError(
            f"{path} has a {shown(document['normalizer'].get('type'))} normalizer, which is not "
            "supported."
        )
    split = document.get("pre_tokenizer") or {}
    if split.get("type") != "ByteLevel" or not split.get("use_regex", True):
        raise TokenizerError(
            f"{path} splits text by {shown(split.get('type'))}; only GPT-2's ByteLevel is "
            "supported."
        )
    if split.get("add_prefix_space"):
        raise TokenizerError(f"{path} asks for add_prefix_space, which is not supported.")
    after = document.get("post_processor") or {"type": "ByteLevel"}
    template = [part for part in after.get("single", ()) if "Sequence" not in part]
    if after.get("type") not in ("ByteLevel", "TemplateProcessing") or template:
        raise TokenizerError(
            f"{path} adds tokens by a {shown(after.get('type'))} post-processor, which is not "
            "supported."
        )
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if any(len(merge) != 2 for merge in merges):
        raise TokenizerError(f"{path} has a merge that is not a pair of tokens.")
    special, added = _sort_added(path, document.get("added_tokens") or [])
    return _build(path, model["vocab"], merges, special, added)


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
                    f"{path} adds the token {shown(text)} with {option}, which is not supported."
                )
        added[text] = entry["id"]
    return special, added


def _build(
    path: Path,
    listed: Mapping[str, int],
    merges: list[Any],
    special: Mapping[str, int],
    added: Mapping[str, int],
) -> Vocabulary:
    """Sort the tokens that a file lists from those that were added to it, and check them all."""
    alphabet, reachable = byte_alphabet(), {left + right for left, right in merges}
    tokens = {t: i for t, i in listed.items() if t in reachable or t in alphabet}
    try:
        for text, token_id in [*special.items(), *added.items()]:
            if listed.get(text, token_id) != token_id or (text in tokens and text in added):
                raise TokenizerError(
                    f"The token {shown(text)} is added as {shown(token_id)} and listed as "
                    f"{shown(listed[text])} too."
                )
        # What neither is a byte nor comes from a merge was added by name, as <|endoftext|> was.
        # What is a byte or comes from a merge is what text spells, whatever else it is named for.
        special = {
            text: token_id
            for text, token_id in {**listed, **special}.items()
            if text not in tokens and text not in added
        }
        vocabulary = Vocabulary(tokens=tokens, merges=merges, special=special, added=added)
        vocabulary.check_merges()
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error
    return vocabulary


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can write it: JSON can carry half of a surrogate pair, UTF-8 cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
