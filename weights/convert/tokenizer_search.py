"""The tokenizer that belongs to a foreign checkpoint: named by the user, or found near it."""

from dataclasses import dataclass, field
from pathlib import Path

from model.tokenizer import Tokenizer, load_tokenizer
from model.vocabulary import TokenizerError
from weights.convert.foreign import ForeignCheckpoint
from weights.convert.llm_c import TOKENIZER_FILE, read_llm_c_tokenizer
from weights.convert.meta_pickle import read_characters
from weights.errors import CheckpointError
from weights.hub import TOKENIZER_FILES

_GPT2_VOCAB_SIZE = 50257


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundTokenizer:
    """A tokenizer, or none, and where it comes from."""

    tokenizer: Tokenizer | None
    origin: Path | None = None  # a directory, meta.pkl, or llm.c's file
    passed_over: list[str] = field(default_factory=list)  # a line about each that did not fit


def find_tokenizer(
    foreign: ForeignCheckpoint,
    *,
    directory: Path | None,
    meta: Path | None,
    without: bool,
) -> FoundTokenizer:
    """Take the tokenizer that the user names, or look for one where it would lie.

    Nothing is downloaded. Raises CheckpointError if a named one does not fit the vocabulary, and
    if none is found and the user has not said that none is wanted.
    """
    if (directory is not None) + (meta is not None) + without > 1:
        raise CheckpointError(
            "Name one tokenizer at most: --tokenizer-dir, --meta or --no-tokenizer."
        )
    if without:
        return FoundTokenizer(tokenizer=None)
    rows = foreign.config.vocab_size
    if directory is not None or meta is not None:
        origin, tokenizer = _read_named(directory, meta)
        if not _fits(tokenizer, rows):
            raise CheckpointError(
                f"{origin} has {tokenizer.vocab_size} ids and {foreign.path} has {rows} rows in "
                "its vocabulary; they do not belong together."
            )
        return FoundTokenizer(tokenizer=tokenizer, origin=origin)
    passed_over: list[str] = []
    for place in [*foreign.meta_files, *foreign.tokenizer_places]:
        found = _read_place(place)
        if found is None:
            continue
        if _fits(found, rows) or (place == foreign.huggingface and found.vocab_size <= rows):
            return FoundTokenizer(tokenizer=found, origin=place, passed_over=passed_over)
        passed_over.append(
            f"passed over {place}: it has {found.vocab_size} ids, and the model's vocabulary {rows}"
            " rows"
        )
    raise CheckpointError(_advice(foreign, passed_over))


def is_padded(rows: int, num_ids: int) -> bool:
    """Whether a vocabulary of `rows` is one of `num_ids`, padded to a multiple of 64 or 128.

    Any other difference is more likely somebody else's tokenizer than padding.
    """
    return rows % 64 == 0 and 0 < rows - num_ids < 128


def _fits(tokenizer: Tokenizer, rows: int) -> bool:
    return rows == tokenizer.vocab_size or is_padded(rows, tokenizer.vocab_size)


def _read_named(directory: Path | None, meta: Path | None) -> tuple[Path, Tokenizer]:
    if meta is not None:
        return meta, read_characters(meta)
    assert directory is not None
    for place in (directory, directory / TOKENIZER_FILE):
        tokenizer = _read_place(place)
        if tokenizer is not None:
            return place, tokenizer
    raise CheckpointError(
        f"{directory} holds no tokenizer. Expected vocab.json with merges.txt, tokenizer.json, or "
        f"llm.c's {TOKENIZER_FILE}."
    )


def _read_place(place: Path) -> Tokenizer | None:
    """Read whatever kind of tokenizer lies at `place`, if any does."""
    if place.suffix == ".pkl":
        return read_characters(place) if place.exists() else None
    if place.name == TOKENIZER_FILE:
        return read_llm_c_tokenizer(place) if place.is_file() else None
    if not any((place / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return load_tokenizer(place)
    except TokenizerError as error:
        raise CheckpointError(
            f"{error} Name another tokenizer with --tokenizer-dir, or convert with --no-tokenizer."
        ) from error


def _advice(foreign: ForeignCheckpoint, passed_over: list[str]) -> str:
    """What to do where no tokenizer was found: in one sentence why, in the next how."""
    rows = foreign.config.vocab_size
    places = ", ".join(str(place) for place in [*foreign.meta_files, *foreign.tokenizer_places])
    looked = f"No tokenizer was found for {foreign.path}. Looked at {places}."
    if passed_over:
        looked += f" {'; '.join(passed_over).capitalize()}."
    if rows == _GPT2_VOCAB_SIZE or is_padded(rows, _GPT2_VOCAB_SIZE):
        remedy = (
            "Its vocabulary is GPT-2's: pass --tokenizer-dir with a directory that has GPT-2's "
            "vocab.json and merges.txt, such as one made by: hf download openai-community/gpt2 "
            "vocab.json merges.txt --local-dir gpt2"
        )
    elif foreign.meta_files:
        trained = f" on {foreign.dataset!r}" if foreign.dataset else ""
        remedy = (
            f"It was trained{trained} with {rows} ids, which is not GPT-2's vocabulary. If they "
            "are characters, pass the meta.pkl that nanoGPT's prepare.py wrote beside train.bin: "
            "--meta data/NAME/meta.pkl. Otherwise pass --tokenizer-dir"
        )
    else:
        remedy = f"Pass --tokenizer-dir with a directory that has the tokenizer of its {rows} ids"
    return f"{looked} {remedy}. To convert the weights alone: --no-tokenizer."
