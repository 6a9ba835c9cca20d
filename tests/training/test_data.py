import json
import shutil
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.tokenizer import CharacterTokenizer
from training.data import (
    TokenSplit,
    load_dataset,
    num_windows,
    open_shard,
    window_starts,
    write_shards,
)
from training.errors import DataError
from training.randomness import random_bits

TOKENIZER = CharacterTokenizer("abcdefgh")


def shard(directory: Path, ids: list[int]) -> Path:
    paths, _ = write_shards([np.array(ids)], directory, "train", tokenizer=TOKENIZER)
    return paths[0]


def test_shards_read_as_one_sequence(tmp_path: Path) -> None:
    ids = np.random.default_rng(1).integers(0, 8, 1000)
    pieces = np.split(ids, [3, 3, 250, 251])

    paths, num_tokens = write_shards(
        pieces, tmp_path, "train", tokenizer=TOKENIZER, max_shard_tokens=99
    )
    split = TokenSplit(paths, TOKENIZER, num_bytes=1000)

    assert num_tokens == len(split) == 1000
    assert [path.name for path in paths[:2]] == ["train-00000.bin", "train-00001.bin"]
    assert len(paths) == 11
    for start, length in ((0, 1000), (0, 99), (98, 2), (99, 99), (500, 400), (999, 1), (5, 0)):
        assert split.read(start, length).tolist() == ids[start : start + length].tolist()


def test_large_vocabularies_take_four_bytes_an_id(tmp_path: Path) -> None:
    large = CharacterTokenizer([chr(0x20000 + i) for i in range(2**16 + 1)])
    ids = np.array([0, 2**16, 77])

    (path,), _ = write_shards([ids], tmp_path, "val", tokenizer=large)

    assert path.stat().st_size == 64 + 3 * 4
    assert TokenSplit([path], large, num_bytes=12).read(0, 3).tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("offset", "replacement", "message"),
    [
        (0, b"KVIKTOKX", r"is no token shard: expected .*KVIKTOKS.*, found b'KVIKTOKX'"),
        (8, struct.pack("<I", 2), r"has version 2 of the format; this Kvik reads 1"),
        (12, struct.pack("<I", 3), r"says that an id has 3 bytes; expected 2 or 4"),
        (12, struct.pack("<I", 4), r"has 76 bytes; expected 88 for 6 tokens"),
        (16, struct.pack("<Q", 7), r"has 76 bytes; expected 78 for 7 tokens. Was it cut off\?"),
        (24, bytes(32), rf"made by the tokenizer 0000.*; expected {TOKENIZER.fingerprint}"),
    ],
    ids=["magic", "version", "unknown dtype", "other dtype", "count", "tokenizer"],
)
def test_false_header_is_refused_by_file_expected_and_found(
    tmp_path: Path, offset: int, replacement: bytes, message: str
) -> None:
    path = shard(tmp_path, [1, 2, 3, 4, 5, 6])
    raw = path.read_bytes()
    path.write_bytes(raw[:offset] + replacement + raw[offset + len(replacement) :])

    with pytest.raises(DataError, match=rf"train-00000\.bin .*{message}"):
        open_shard(path, fingerprint=TOKENIZER.fingerprint)


@pytest.mark.parametrize(
    ("size", "message"),
    [(75, "has 75 bytes; expected 76"), (10, "has 10 bytes; a shard's header alone has 64")],
)
def test_cut_off_shard_is_refused(tmp_path: Path, size: int, message: str) -> None:
    path = shard(tmp_path, [1, 2, 3, 4, 5, 6])
    path.write_bytes(path.read_bytes()[:size])

    with pytest.raises(DataError, match=message):
        open_shard(path, fingerprint=TOKENIZER.fingerprint)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.bin cannot be read: No such file"):
        open_shard(tmp_path / "gone.bin", fingerprint=TOKENIZER.fingerprint)


def test_id_beyond_the_vocabulary_is_named_when_read(tmp_path: Path) -> None:
    split = TokenSplit([shard(tmp_path, [1, 2, 8, 4])], TOKENIZER, num_bytes=4)

    assert split.read(0, 2).tolist() == [1, 2]
    with pytest.raises(DataError, match=r"train-00000\.bin holds the id 8; .* ids up to 7"):
        split.read(1, 3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"tokens": ', '"tokens": 1', r"data\.json counts \d+ train tokens; its shards hold"),
        ('"splits"', '"spilt"', r"data\.json is not built as expected: KeyError\('splits'\)"),
        ("train-00000.bin", "train-00009.bin", r"train-00009\.bin cannot be read"),
        ("{", "", r"data\.json is not valid JSON"),
    ],
)
def test_false_facts_are_refused(
    data: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    copy = shutil.copytree(data, tmp_path / "copy")
    document = (copy / "data.json").read_text()
    (copy / "data.json").write_text(document.replace(old, new, 1))

    with pytest.raises(DataError, match=message):
        load_dataset(copy)


def test_another_tokenizer_beside_the_shards_is_refused(data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "copy")
    characters = json.loads((copy / "characters.json").read_text())
    shift = {character: (i + 1) % len(characters) for character, i in characters.items()}
    (copy / "characters.json").write_text(json.dumps(shift))

    with pytest.raises(DataError, match=r"was written for the tokenizer .* Prepare the data again"):
        load_dataset(copy)


def test_directory_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.json cannot be read.*kvik prepare"):
        load_dataset(tmp_path)


@given(
    num_tokens=st.integers(2, 500),
    n_ctx=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 3),
)
@settings(deadline=None)
def test_epoch_covers_every_window_of_its_grid_once(
    num_tokens: int, n_ctx: int, seed: int, epoch: int
) -> None:
    if num_tokens <= n_ctx:
        return
    total = num_windows(num_tokens, n_ctx)

    starts = window_starts(epoch * total, total, num_tokens=num_tokens, n_ctx=n_ctx, seed=seed)

    offset = min(starts)
    assert sorted(starts) == [offset + i * n_ctx for i in range(total)]
    assert 0 <= offset < n_ctx
    assert max(starts) + n_ctx + 1 <= num_tokens
    # What an epoch leaves out is less than a window at either end.
    assert offset + total * n_ctx > num_tokens - 1 - 2 * n_ctx


def test_windows_do_not_depend_on_how_they_are_asked_for() -> None:
    place = {"num_tokens": 1000, "n_ctx": 16, "seed": 3}
    together = window_starts(0, 300, **place)

    apart = [start for first in range(0, 300, 7) for start in window_starts(first, 7, **place)]
    backwards = [window_starts(number, 1, **place)[0] for number in reversed(range(300))]

    assert apart[:300] == together
    assert backwards[::-1] == together


def test_epochs_and_seeds_differ_in_order_and_offset() -> None:
    total = num_windows(10_000, 64)
    orders = [
        window_starts(epoch * total, total, num_tokens=10_000, n_ctx=64, seed=seed)
        for seed in (1, 2)
        for epoch in (0, 1, 2)
    ]

    assert len({tuple(order) for order in orders}) == 6
    assert len({min(order) for order in orders}) >= 4


def test_each_window_is_as_likely_at_each_place() -> None:
    # 600 epochs of 10 windows: 60 expected in each of 100 cells. 150 is far beyond the 99.99th
    # percentile of chi-squared with 81 degrees of freedom (about 135).
    total = 10
    assert num_windows(44, 4) == total
    cells: Counter[tuple[int, int]] = Counter()
    for epoch in range(600):
        starts = window_starts(epoch * total, total, num_tokens=44, n_ctx=4, seed=9)
        cells.update(((start - min(starts)) // 4, place) for place, start in enumerate(starts))

    chi_squared = sum((cells[window, place] - 60) ** 2 / 60
                      for window in range(total) for place in range(total))  # fmt: skip
    assert chi_squared < 150


def test_random_bits_are_the_same_everywhere() -> None:
    # Fixed forever: another value would make resumed runs see other data.
    assert random_bits(1337, 0) == 1783029923428753473
    assert random_bits(1337, 1) == 7308977853313091202
    assert len({random_bits(seed, word) for seed in range(50) for word in range(50)}) == 2500
