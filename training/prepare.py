"""Text files to a data directory: a tokenizer, token shards of two splits, and their facts."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.tokenizer import BytePairTokenizer, CharacterTokenizer, Tokenizer, load_tokenizer
from model.vocabulary import END_OF_TEXT, TokenizerError
from training.data import DATA_FILE, write_shards
from training.errors import DataError
from weights.errors import CheckpointError
from weights.new_directory import new_directory

_PIECE_CHARACTERS = 1_000_000  # encoded at a time, so that memory does not grow with the text
_GPT2_VOCAB_SIZE = 50257

Advance = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareConfig:
    """What to make of which files. Raises ValueError, naming field, value and remedy."""

    files: tuple[Path, ...]  # a document each
    val_files: tuple[Path, ...] = ()  # held out whole
    val_fraction: float = 0.1  # of the characters, from the end; unused with val_files
    tokenizer: str | None = None  # gpt2, bpe:N or char; None takes what lies in tokenizer_dir
    tokenizer_dir: Path | None = None  # any directory with a tokenizer's files

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("files must name at least one text file, got none")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {self.val_fraction}")
        seen: set[Path] = set()
        for path in (*self.files, *self.val_files):
            if path.resolve() in seen:
                raise ValueError(f"files and val_files must name each file once, got {path} twice")
            seen.add(path.resolve())
        if self.tokenizer in ("gpt2", None):
            if self.tokenizer_dir is None:
                raise ValueError(
                    "tokenizer_dir must name a directory with GPT-2's vocabulary (vocab.json and "
                    "merges.txt, or encoder.json and vocab.bpe): nothing is downloaded unasked"
                    if self.tokenizer
                    else "tokenizer must be gpt2, char or bpe:N such as bpe:2048, got nothing"
                )
        elif self.tokenizer_dir is not None:
            raise ValueError(
                f"tokenizer_dir goes with tokenizer gpt2 or none, got tokenizer {self.tokenizer}"
            )
        elif self.tokenizer != "char":
            _bpe_size(self.tokenizer)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitFacts:
    """What was written of one split."""

    num_tokens: int
    num_bytes: int  # of the text, in UTF-8
    shards: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    text: str
    starts_document: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    path: Path
    text: str
    sha256: str
    num_bytes: int
    is_held_out: bool


def prepare(
    config: PrepareConfig, out: Path, *, advance: Advance = lambda stage, fraction: None
) -> tuple[Tokenizer, dict[str, SplitFacts]]:
    """Write a data directory: there as a whole or not at all.

    Where the tokenizer has an eos, every document (a file) starts after one: it separates them,
    and an empty prompt starts from it. The part of a document that the cut between the splits
    leaves without its beginning has none.

    Args:
        config: what to make of what.
        out: a directory that does not exist yet.
        advance: hears what is being done and how far it is, from 0 to 1.

    Returns:
        The tokenizer and the facts of each split.

    Raises:
        DataError: naming the file.
    """
    if out.exists():
        raise DataError(f"{out} exists already; name another place or remove it first.")
    sources = [
        *(_read(path, is_held_out=False) for path in config.files),
        *(_read(path, is_held_out=True) for path in config.val_files),
    ]
    splits = _split(sources, config.val_fraction)
    advance("vocabulary", 0)
    tokenizer = _make_tokenizer(config, splits)
    advance("vocabulary", 1)
    facts: dict[str, SplitFacts] = {}
    try:
        with new_directory(out) as partial:
            for split, texts in splits.items():
                shards, num_tokens = write_shards(
                    _encode(texts, tokenizer, split, advance), partial, split, tokenizer=tokenizer
                )
                facts[split] = SplitFacts(
                    num_tokens=num_tokens,
                    num_bytes=sum(len(text.text.encode()) for text in texts),
                    shards=tuple(path.name for path in shards),
                )
            tokenizer.write(partial)
            document = _describe(sources, tokenizer, facts, partial)
            (partial / DATA_FILE).write_text(
                json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
    except (CheckpointError, TokenizerError) as error:
        raise DataError(str(error)) from error
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror}.") from error
    return tokenizer, facts


def cut_pieces(text: str, size: int) -> Iterator[str]:
    """Cut a text into pieces of about `size` characters that encode as the whole does.

    GPT-2's rule for splitting text never joins a character that is no white space with white
    space after it, whatever follows: so cuts fall before a line break that ends a word.
    """
    start = 0
    while start < len(text):
        end = start + size
        while (end := text.find("\n", end)) > 0 and text[end - 1].isspace():
            end += 1
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end


def _read(path: Path, *, is_held_out: bool) -> _Source:
    try:
        raw = path.read_bytes()
        text = raw.decode()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: byte {raw[error.start]:#04x} at offset {error.start} does "
            "not fit. Convert it first, for example with iconv."
        ) from error
    if not text.strip():
        raise DataError(f"{path} has no text in it.")
    return _Source(
        path=path,
        text=text,
        sha256=hashlib.sha256(raw).hexdigest(),
        num_bytes=len(raw),
        is_held_out=is_held_out,
    )


def _split(sources: list[_Source], val_fraction: float) -> dict[str, list[_Text]]:
    """Part the documents: those held out, or else the end of them all from a line break on."""
    train = [_Text(text=s.text, starts_document=True) for s in sources if not s.is_held_out]
    val = [_Text(text=s.text, starts_document=True) for s in sources if s.is_held_out]
    if not val:
        num_characters = sum(len(text.text) for text in train)
        room = int(num_characters * (1 - val_fraction))
        index = 0
        while room >= len(train[index].text):
            room -= len(train[index].text)
            index += 1
        whole = train[index].text
        cut = whole.rfind("\n", 0, room) + 1
        if cut == 0 and index == 0:  # no line break to be had, nor a document to spare
            cut = room
        train, val = train[:index], train[index + 1 :]
        val.insert(0, _Text(text=whole[cut:], starts_document=cut == 0))
        if cut:
            train.append(_Text(text=whole[:cut], starts_document=True))
        if not train or not val[0].text:
            raise DataError(
                f"A text of {num_characters} characters is too short to hold out "
                f"{val_fraction:.0%} of it; give more text, or name held-out files."
            )
    return {"train": train, "val": val}


def _make_tokenizer(config: PrepareConfig, splits: Mapping[str, list[_Text]]) -> Tokenizer:
    if config.tokenizer == "char":
        # Of both splits: a character seen in validation alone would otherwise have no id at all.
        return CharacterTokenizer.from_text(
            "".join({character for texts in splits.values() for t in texts for character in t.text})
        )
    if config.tokenizer_dir is None:
        assert config.tokenizer is not None
        return _train_bpe([text.text for text in splits["train"]], _bpe_size(config.tokenizer))
    try:
        tokenizer = load_tokenizer(config.tokenizer_dir)
    except TokenizerError as error:
        raise DataError(str(error)) from error
    if config.tokenizer == "gpt2" and tokenizer.vocab_size != _GPT2_VOCAB_SIZE:
        raise DataError(
            f"{config.tokenizer_dir} holds a tokenizer of {tokenizer.vocab_size} ids; GPT-2's has "
            f"{_GPT2_VOCAB_SIZE}. To use it as it is, leave out the name gpt2."
        )
    return tokenizer


def _bpe_size(name: str) -> int:
    """The N of bpe:N; raises ValueError."""
    kind, _, number = name.partition(":")
    if kind != "bpe" or not number.isdecimal():
        raise ValueError(f"tokenizer must be gpt2, char or bpe:N such as bpe:2048, got {name!r}")
    if not 257 <= int(number) <= 2**20:
        raise ValueError(
            f"tokenizer bpe:N takes N from 257 (256 bytes and {END_OF_TEXT}) to {2**20}, "
            f"got {number}"
        )
    return int(number)


def _train_bpe(texts: list[str], size: int) -> BytePairTokenizer:
    """Learn a byte-level BPE of exactly `size` ids, the last of them the end of text.

    Byte-pair encoding after Sennrich et al., 2016, arXiv:1508.07909, on bytes as in GPT-2.
    """
    try:
        from tokenizers import Tokenizer as Trainee
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel
        from tokenizers.trainers import BpeTrainer
    except ImportError as error:
        raise DataError(
            "Training a BPE needs the package tokenizers: pip install 'kvik[train]'."
        ) from error
    trainee = Trainee(BPE())
    trainee.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = BpeTrainer(
        vocab_size=size - 1, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    pieces = (piece for text in texts for piece in cut_pieces(text, _PIECE_CHARACTERS))
    trainee.train_from_iterator(pieces, trainer)
    learned = json.loads(trainee.to_str())["model"]
    vocab: dict[str, int] = learned["vocab"]
    if len(vocab) != size - 1:
        raise DataError(
            f"The text is too short for a vocabulary of {size}: it has pairs for "
            f"{len(vocab) + 1}. Give more text, or ask for bpe:{len(vocab) + 1}."
        )
    merges = [(str(left), str(right)) for left, right in learned["merges"]]
    try:
        return BytePairTokenizer.from_merges(vocab, merges, {END_OF_TEXT: size - 1})
    except TokenizerError as error:
        raise DataError(f"The learned vocabulary cannot be used. {error}") from error


def _encode(
    texts: list[_Text], tokenizer: Tokenizer, split: str, advance: Advance
) -> Iterator[NDArray[np.int64]]:
    total = sum(len(text.text) for text in texts)
    done = 0
    for text in texts:
        if text.starts_document and tokenizer.eos_token_id is not None:
            yield np.array([tokenizer.eos_token_id])
        for piece in cut_pieces(text.text, _PIECE_CHARACTERS):
            yield np.array(tokenizer.encode(piece), dtype=np.int64)
            done += len(piece)
            advance(split, done / total)


def _describe(
    sources: list[_Source],
    tokenizer: Tokenizer,
    facts: Mapping[str, SplitFacts],
    directory: Path,
) -> dict[str, Any]:
    """What `data.json` says; no path in it, so that equal data make equal files."""
    return {
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "sha256": tokenizer.fingerprint,
        },
        "splits": {
            split: {
                "tokens": fact.num_tokens,
                "bytes": fact.num_bytes,
                "shards": list(fact.shards),
                "sha256": [_sha256(directory / name) for name in fact.shards],
            }
            for split, fact in facts.items()
        },
        "sources": [
            {
                "file": source.path.name,
                "bytes": source.num_bytes,
                "sha256": source.sha256,
                "held_out": source.is_held_out,
            }
            for source in sources
        ],
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
