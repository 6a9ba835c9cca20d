"""Text to ids and back, by the vocabulary that lies with the checkpoint; downloads nothing."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import tiktoken

from model.vocabulary import (
    END_OF_TEXT,
    TokenizerError,
    Vocabulary,
    read_json,
    read_vocabulary,
    write_vocabulary,
)

CHARACTERS_FILE = "characters.json"

# How GPT-2 splits text before merging, in the possessive form that seldom backtracks.
_GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# Where it does, tiktoken panics after a million steps. The last character of a run of white space
# is split from the rest anyhow, so cutting the text there changes nothing.
_MANY = 100_000
_LONG_BLANK = re.compile(
    rf"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{{{_MANY},}}"
)


class Tokenizer(Protocol):
    """A vocabulary in use. Ids run from 0 to `vocab_size` - 1; the model may have padding above."""

    @property
    def kind(self) -> str:
        """What it is, for people: "byte-level BPE" or "characters"."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id it knows."""
        ...

    @property
    def bos_token_id(self) -> int | None:
        """The id an empty text starts from, if there is one."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text, if there is one."""
        ...

    @property
    def special_token_ids(self) -> frozenset[int]:
        """The ids that no text spells: <|endoftext|>, padding and the like."""
        ...

    @property
    def fingerprint(self) -> str:
        """sha256 of the vocabulary, in hex: equal exactly when ids mean the same."""
        ...

    def encode(self, text: str) -> list[int]:
        """Turn ordinary text into ids; special tokens spelled out in it are just characters.

        Raises TokenizerError, showing the character, for what the vocabulary does not cover.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one id stands for; they need not be whole UTF-8. Raises TokenizerError.

        No bytes for an id below `vocab_size` that the vocabulary skips: a model can sample it.
        """
        ...

    def decode(self, token_ids: Iterable[int]) -> str:
        """Turn ids into text, U+FFFD standing for what is no UTF-8. Raises TokenizerError."""
        ...

    def write(self, directory: Path) -> None:
        """Write the vocabulary's files, those that `load_tokenizer` reads."""
        ...


class BytePairTokenizer:
    """A byte-level BPE, encoded by tiktoken."""

    kind = "byte-level BPE"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.vocab_size = vocabulary.size
        self.bos_token_id = self.eos_token_id = vocabulary.special.get(END_OF_TEXT)
        self.special_token_ids = frozenset(vocabulary.special.values())
        ranks = vocabulary.token_bytes()
        self._bytes: list[bytes | None] = [None] * self.vocab_size
        for token, token_id in ranks.items():
            self._bytes[token_id] = token
        for text, token_id in [*vocabulary.special.items(), *vocabulary.added.items()]:
            self._bytes[token_id] = text.encode()
        # tiktoken panics on a byte without a rank: give the missing ones ids out of range.
        self._missing = frozenset(b for b in range(256) if bytes([b]) not in ranks)
        ranks |= {bytes([b]): self.vocab_size + b for b in self._missing}
        self._encoding = tiktoken.Encoding(
            "kvik", pat_str=_GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={}
        )
        # The longest first: of two that begin alike, tiktoken would find either.
        names = sorted(vocabulary.added, key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, names))) if names else None
        digest = hashlib.sha256()
        for token_id, piece in enumerate(self._bytes):
            digest.update(b"%d:%d:" % (token_id, -1 if piece is None else len(piece)))
            digest.update(piece or b"")
        self.fingerprint = digest.hexdigest()

    @classmethod
    def from_merges(
        cls, vocab: dict[str, int], merges: list[tuple[str, str]], special_tokens: dict[str, int]
    ) -> "BytePairTokenizer":
        """Build from token strings in GPT-2's byte alphabet, as in vocab.json and merges.txt."""
        vocabulary = Vocabulary(tokens=vocab, merges=merges, special=special_tokens)
        vocabulary.check_merges()
        return cls(vocabulary)

    def encode(self, text: str) -> list[int]:
        """See Tokenizer.encode."""
        _check_unicode(text)
        ids: list[int] = []
        start = 0
        for match in self._added.finditer(text) if self._added else ():
            ids += self._encode_ordinary(text, start, match.start())
            ids.append(self._vocabulary.added[match[0]])
            start = match.end()
        return ids + self._encode_ordinary(text, start, len(text))

    def _encode_ordinary(self, text: str, start: int, end: int) -> list[int]:
        """Encode a part of a text that no added token lies in."""
        cuts = [start, end]
        if end - start > _MANY:
            blanks = _LONG_BLANK.finditer(text, start, end)
            cuts[1:1] = [blank.end() - 1 for blank in blanks if blank.end() < end]
        ids: list[int] = []
        for left, right in pairwise(cuts):
            ids += self._encoding.encode_ordinary(text[left:right])
        if self._missing and any(token_id >= self.vocab_size for token_id in ids):
            place = next(i for i in range(start, end) if self._missing & {*text[i].encode()})
            raise _unknown_character(text[place], place, self.vocab_size, "tokens")
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """See Tokenizer.token_bytes."""
        if not 0 <= token_id < self.vocab_size:
            raise _unknown_id(token_id, self.vocab_size)
        return self._bytes[token_id] or b""

    def decode(self, token_ids: Iterable[int]) -> str:
        """See Tokenizer.decode."""
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace")

    def write(self, directory: Path) -> None:
        """See Tokenizer.write."""
        end_of_text = END_OF_TEXT if END_OF_TEXT in self._vocabulary.special else None
        write_vocabulary(self._vocabulary, directory, end_of_text=end_of_text)


class CharacterTokenizer:
    """One id a character, as nanoGPT's character-level models have it.

    A plain dictionary: tiktoken has no use for a vocabulary that does not cover every byte.
    """

    kind = "characters"
    eos_token_id = None
    special_token_ids: frozenset[int] = frozenset()

    def __init__(self, characters: Sequence[str]) -> None:
        """Take the characters in the order of their ids; raises TokenizerError."""
        if not characters:
            raise TokenizerError("A character vocabulary needs at least one character.")
        for character in characters:
            if len(character) != 1:
                raise TokenizerError(f"{character!r} in a character vocabulary is no character.")
            _check_unicode(character)
        self._ids = {character: token_id for token_id, character in enumerate(characters)}
        if len(self._ids) != len(characters):
            raise TokenizerError("A character vocabulary lists a character twice.")
        self._characters = list(characters)
        self.vocab_size = len(characters)
        self.bos_token_id = self._ids.get("\n")  # nanoGPT samples from a newline
        self.fingerprint = hashlib.sha256("".join(characters).encode()).hexdigest()

    @classmethod
    def from_text(cls, text: str) -> "CharacterTokenizer":
        """Give every character that occurs in `text` an id, in the order of code points."""
        return cls(sorted(set(text)))

    def encode(self, text: str) -> list[int]:
        """See Tokenizer.encode."""
        try:
            return [self._ids[character] for character in text]
        except KeyError:
            place = next(i for i, character in enumerate(text) if character not in self._ids)
            raise _unknown_character(text[place], place, self.vocab_size, "characters") from None

    def token_bytes(self, token_id: int) -> bytes:
        """See Tokenizer.token_bytes."""
        if not 0 <= token_id < self.vocab_size:
            raise _unknown_id(token_id, self.vocab_size)
        return self._characters[token_id].encode()

    def decode(self, token_ids: Iterable[int]) -> str:
        """See Tokenizer.decode."""
        return b"".join(map(self.token_bytes, token_ids)).decode()

    def write(self, directory: Path) -> None:
        """See Tokenizer.write."""
        (directory / CHARACTERS_FILE).write_text(
            json.dumps(self._ids, ensure_ascii=False, indent=0) + "\n", encoding="utf-8"
        )


def load_tokenizer(directory: Path) -> Tokenizer:
    """Read the tokenizer that lies in a checkpoint directory; raises TokenizerError."""
    if not os.path.lexists(directory / CHARACTERS_FILE):
        return BytePairTokenizer(read_vocabulary(directory))
    ids = read_json(directory / CHARACTERS_FILE)
    if sorted(ids.values(), key=str) != sorted(range(len(ids)), key=str):
        raise TokenizerError(
            f"{directory / CHARACTERS_FILE} must number its {len(ids)} characters from 0 on, each "
            "number once."
        )
    try:
        return CharacterTokenizer(sorted(ids, key=ids.__getitem__))
    except TokenizerError as error:
        raise TokenizerError(f"{directory / CHARACTERS_FILE}: {error}") from error


def _check_unicode(text: str) -> None:
    """Refuse lone surrogates, which JSON can carry and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"The text has half of a surrogate pair (U+{ord(text[error.start]):04X}) at character "
            f"{error.start}: it is not valid Unicode."
        ) from None


def _unknown_character(character: str, place: int, size: int, unit: str) -> TokenizerError:
    return TokenizerError(
        f"The character {character!r} (U+{ord(character):04X}) at position {place} is not in this "
        f"model's vocabulary of {size} {unit}."
    )


def _unknown_id(token_id: int, vocab_size: int) -> TokenizerError:
    return TokenizerError(
        f"The token id {token_id} is not in this model's vocabulary of {vocab_size} ids."
    )
