"""Token shards on disk and the windows of them that a step sees; knows nothing of models.

A shard is a 64-byte header and then ids, little-endian:

    bytes  0-8   magic b"KVIKTOKS"
    bytes  8-12  version, 1
    bytes 12-16  bytes an id: 2 (uint16) or 4 (uint32)
    bytes 16-24  number of ids
    bytes 24-56  sha256 of the tokenizer that made them
    bytes 56-64  zero
"""

import functools
import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.tokenizer import Tokenizer, load_tokenizer
from model.vocabulary import TokenizerError
from training.errors import DataError
from training.randomness import mix, random_bits

DATA_FILE = "data.json"
SPLITS = ("train", "val")

_HEADER = struct.Struct("<8sIIQ32s8x")
_MAGIC = b"KVIKTOKS"
_VERSION = 1
_DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
_MAX_SHARD_TOKENS = 100_000_000


class TokenSplit:
    """One split's ids, memory-mapped: shards that read as one long sequence."""

    def __init__(self, paths: list[Path], tokenizer: Tokenizer, *, num_bytes: int) -> None:
        """Open shards in order; raises DataError, see `open_shard`."""
        self.num_bytes = num_bytes  # of the text the ids stand for
        self._paths = paths
        self._vocab_size = tokenizer.vocab_size
        self._shards = [open_shard(path, fingerprint=tokenizer.fingerprint) for path in paths]
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self._ends[-1])

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """Ids start to start + length - 1, (T,); raises DataError for an id out of range."""
        assert 0 <= start <= start + length <= len(self)
        ids = np.empty(length, dtype=np.int64)
        done = 0
        index = int(np.searchsorted(self._ends, start, side="right"))
        while done < length:
            shard = self._shards[index]
            first = start + done - (int(self._ends[index]) - len(shard))
            piece = shard[first : first + length - done]
            if piece.max() >= self._vocab_size:
                raise DataError(
                    f"{self._paths[index]} holds the id {piece.max()}; its tokenizer has ids up "
                    f"to {self._vocab_size - 1}. Prepare the data again."
                )
            ids[done : done + len(piece)] = piece
            done += len(piece)
            index += 1
        return ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A directory that `kvik prepare` made, opened."""

    directory: Path
    tokenizer: Tokenizer
    train: TokenSplit
    val: TokenSplit
    fingerprint: str  # sha256 of data.json, which names every shard's


def load_dataset(directory: Path) -> Dataset:
    """Open a prepared directory; raises DataError, naming the file, what was expected and found."""
    path = directory / DATA_FILE
    try:
        raw = path.read_bytes()
        document = json.loads(raw)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}. Make the directory with kvik prepare."
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from error
    try:
        tokenizer = load_tokenizer(directory)
    except TokenizerError as error:
        raise DataError(str(error)) from error
    splits = {}
    try:
        if document["tokenizer"]["sha256"] != tokenizer.fingerprint:
            raise DataError(
                f"{path} was written for the tokenizer {document['tokenizer']['sha256']}; the one "
                f"in {directory} is {tokenizer.fingerprint}. Prepare the data again."
            )
        for name in SPLITS:
            facts = document["splits"][name]
            paths = [directory / shard for shard in facts["shards"]]
            split = TokenSplit(paths, tokenizer, num_bytes=facts["bytes"])
            if len(split) != facts["tokens"]:
                raise DataError(
                    f"{path} counts {facts['tokens']} {name} tokens; its shards hold {len(split)}."
                )
            splits[name] = split
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path} is not built as expected: {error!r}.") from error
    return Dataset(
        directory=directory,
        tokenizer=tokenizer,
        train=splits["train"],
        val=splits["val"],
        fingerprint=hashlib.sha256(raw).hexdigest(),
    )


def open_shard(path: Path, *, fingerprint: str) -> NDArray[Any]:
    """Map a shard's ids, (N,) uint16 or uint32.

    Raises DataError, naming the file, what was expected and what was found, unless every fact of
    the header holds.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            header = stream.read(_HEADER.size)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    if len(header) < _HEADER.size:
        raise DataError(f"{path} has {size} bytes; a shard's header alone has {_HEADER.size}.")
    magic, version, id_bytes, count, digest = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise DataError(f"{path} is no token shard: expected it to start with {_MAGIC!r}, "
                        f"found {magic!r}.")  # fmt: skip
    if version != _VERSION:
        raise DataError(
            f"{path} has version {version} of the format; this Kvik reads {_VERSION}. Prepare the "
            "data again."
        )
    if id_bytes not in _DTYPES:
        raise DataError(f"{path} says that an id has {id_bytes} bytes; expected 2 or 4.")
    expected = _HEADER.size + count * id_bytes
    if size != expected:
        raise DataError(
            f"{path} has {size} bytes; expected {expected} for {count} tokens. Was it cut off?"
        )
    if digest.hex() != fingerprint:
        raise DataError(
            f"{path} was made by the tokenizer {digest.hex()}; expected {fingerprint}, the one "
            "beside it. Prepare the data again."
        )
    if count == 0:
        raise DataError(f"{path} holds no token.")
    ids: NDArray[Any] = np.memmap(
        path, dtype=_DTYPES[id_bytes], mode="r", offset=_HEADER.size, shape=(count,)
    )
    return ids


def write_shards(
    pieces: Iterable[NDArray[np.int64]],
    directory: Path,
    split: str,
    *,
    tokenizer: Tokenizer,
    max_shard_tokens: int = _MAX_SHARD_TOKENS,
) -> tuple[list[Path], int]:
    """Write ids as `split-00000.bin` and so on; returns the files and the number of ids.

    Ids take two bytes where the vocabulary allows.
    """
    dtype = _DTYPES[2 if tokenizer.vocab_size <= 2**16 else 4]
    digest = bytes.fromhex(tokenizer.fingerprint)
    paths: list[Path] = []
    room = num_tokens = 0
    for piece in pieces:
        rest = piece
        num_tokens += len(piece)
        while len(rest):
            if room == 0:
                paths.append(directory / f"{split}-{len(paths):05}.bin")
                paths[-1].write_bytes(bytes(_HEADER.size))
                room = max_shard_tokens
            with paths[-1].open("ab") as stream:
                stream.write(rest[:room].astype(dtype).tobytes())
            written = min(room, len(rest))
            room -= written
            rest = rest[written:]
    for path in paths:
        count = (path.stat().st_size - _HEADER.size) // dtype.itemsize
        with path.open("r+b") as stream:
            stream.write(_HEADER.pack(_MAGIC, _VERSION, dtype.itemsize, count, digest))
    return paths, num_tokens


def num_windows(num_tokens: int, n_ctx: int) -> int:
    """Windows of n_ctx inputs, with a target each, in an epoch over `num_tokens` tokens.

    A little less than fit, so that the whole grid of windows can be shifted by an offset.
    """
    return max(1, (num_tokens - n_ctx) // n_ctx)


def window_starts(first: int, count: int, *, num_tokens: int, n_ctx: int, seed: int) -> list[int]:
    """Where the windows number `first` to `first + count - 1` of a run start.

    A pure function, so that a run needs no loader state to resume. An epoch is a permutation of
    windows of n_ctx + 1 tokens that overlap by one, all shifted by the epoch's own offset below
    n_ctx: each token is a target at most once an epoch, and seldom twice at the same place.
    Expects num_tokens > n_ctx.
    """
    total = num_windows(num_tokens, n_ctx)
    starts = []
    for number in range(first, first + count):
        epoch, place = divmod(number, total)
        offset = random_bits(seed, epoch) % min(n_ctx, num_tokens - total * n_ctx)
        starts.append(int(_permutation(total, seed, epoch)[place]) * n_ctx + offset)
    return starts


# Two, for the batches where one epoch passes into the next.
@functools.lru_cache(maxsize=2)
def _permutation(total: int, seed: int, epoch: int) -> NDArray[np.int64]:
    # Sorted by hash rather than shuffled by numpy, whose streams may change between versions.
    key = np.uint64(random_bits(seed, epoch, 1))
    return np.argsort(mix(np.arange(total, dtype=np.uint64) + key), kind="stable")
