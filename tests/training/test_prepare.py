import hashlib
import importlib.abc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from kvik.command_line import app
from model.tokenizer import BytePairTokenizer, load_tokenizer
from tests.training.tiny import text
from training.data import Dataset, TokenSplit, load_dataset
from training.errors import DataError
from training.prepare import PrepareConfig, cut_pieces, prepare


def write(directory: Path, **documents: str) -> list[Path]:
    paths = []
    for name, content in documents.items():
        paths.append(directory / f"{name}.txt")
        paths[-1].write_text(content, encoding="utf-8")
    return paths


def prepared(out: Path, files: Sequence[Path], **options: object) -> Dataset:
    prepare(PrepareConfig(files=tuple(files), **options), out)  # type: ignore[arg-type]
    return load_dataset(out)


def all_of(split: TokenSplit) -> list[int]:
    ids: list[int] = split.read(0, len(split)).tolist()
    return ids


def kvik_prepare(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "400"}).invoke(app, ["prepare", *map(str, arguments)])


@pytest.fixture(scope="session")
def bpe_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BytePairTokenizer:
    # With runs of white space, so that tokens are learned that a cut could break.
    directory = tmp_path_factory.mktemp("bpe")
    files = write(
        directory, book=text(5000).replace("hill\n", "hill\n\n\n  ").replace("\n", "\n\n")
    )
    dataset = prepared(directory / "data", files, tokenizer="bpe:280")
    assert isinstance(dataset.tokenizer, BytePairTokenizer)
    assert len(dataset.tokenizer.encode("\n\n\n")) < 3
    return dataset.tokenizer


def test_characters_are_split_at_a_line_break_and_nothing_is_lost(tmp_path: Path) -> None:
    files = write(tmp_path, a="one\ntwo\nthree\n", b="four\nfive\nsix\nseven\n")

    dataset = prepared(tmp_path / "out", files, tokenizer="char", val_fraction=0.4)

    train, val = (dataset.tokenizer.decode(all_of(s)) for s in (dataset.train, dataset.val))
    assert train == "one\ntwo\nthree\nfour\n"
    assert val == "five\nsix\nseven\n"
    assert (dataset.train.num_bytes, dataset.val.num_bytes) == (len(train), len(val))


def test_documents_start_after_the_end_of_text_but_a_cut_one_does_not(tmp_path: Path) -> None:
    files = write(tmp_path, a=text(3000, seed=1), b=text(3000, seed=2), c=text(3000, seed=3))

    dataset = prepared(tmp_path / "out", files, tokenizer="bpe:280")

    eos = dataset.tokenizer.eos_token_id
    train, val = all_of(dataset.train), all_of(dataset.val)
    assert eos == 279
    assert train[0] == eos
    assert (train.count(eos), val.count(eos)) == (3, 0)
    whole = dataset.tokenizer.decode([token for token in train + val if token != eos])
    assert whole == "".join(path.read_text() for path in files)


def test_held_out_files_go_whole_into_validation(tmp_path: Path) -> None:
    a, b, c = write(tmp_path, a=text(2000, seed=1), b="the dragon\n", c="a hill")

    dataset = prepared(tmp_path / "out", [a], val_files=(b, c), tokenizer="bpe:280")

    eos = dataset.tokenizer.eos_token_id
    assert all_of(dataset.val).count(eos or 0) == 2
    decoded = dataset.tokenizer.decode(i for i in all_of(dataset.val) if i != eos)
    assert decoded == "the dragon\na hill"
    assert dataset.val.num_bytes == len(decoded)
    assert all_of(dataset.train)[0] == eos


def test_facts_name_the_sources_by_what_is_in_them(tmp_path: Path) -> None:
    (source,) = write(tmp_path, poem=text(500))

    prepared(tmp_path / "out", [source], tokenizer="char")

    document = json.loads((tmp_path / "out" / "data.json").read_text())
    raw = source.read_bytes()
    assert document["sources"] == [
        {
            "file": "poem.txt",
            "bytes": len(raw),
            "sha256": hashlib.sha256(raw).hexdigest(),
            "held_out": False,
        }
    ]
    assert document["splits"]["train"]["bytes"] + document["splits"]["val"]["bytes"] == len(raw)


def test_the_same_text_makes_the_same_bytes(tmp_path: Path) -> None:
    files = write(tmp_path, a=text(3000))

    for out in ("one", "two"):
        prepared(tmp_path / out, files, tokenizer="bpe:270")

    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_learned_vocabulary_has_exactly_n_ids_and_every_byte(
    bpe_tokenizer: BytePairTokenizer,
) -> None:
    assert bpe_tokenizer.vocab_size == 280
    assert bpe_tokenizer.eos_token_id == 279
    assert {bytes([b]) for b in range(256)} <= {bpe_tokenizer.token_bytes(i) for i in range(279)}


def test_learned_vocabulary_encodes_as_transformers_does(
    bpe_tokenizer: BytePairTokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    bpe_tokenizer.write(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    sample = text(2000, seed=8) + "  Tabs\t\tand\n\n\nlines, naïve 1234 “quotes” 🐉"

    assert bpe_tokenizer.encode(sample) == theirs.encode(sample)
    assert theirs.eos_token_id == 279


def test_learned_tokens_shorten_the_text(bpe_tokenizer: BytePairTokenizer) -> None:
    sample = text(2000, seed=8)

    assert len(bpe_tokenizer.encode(sample)) < 0.5 * len(sample.encode())


CHUNKS = [
    *("a", "bé", "the", "'s", "'", "12", "."),
    *(" ", "  ", "\n", "\n\n", "\n\n\n", "\t", "\r", "\x0b", "\u00a0", "\u2028"),
]


@given(st.lists(st.sampled_from(CHUNKS), max_size=30).map("".join), st.integers(1, 9))
def test_pieces_encode_as_the_whole(
    bpe_tokenizer: BytePairTokenizer, whole: str, size: int
) -> None:
    pieces = list(cut_pieces(whole, size))

    assert "".join(pieces) == whole
    ids = [i for piece in pieces for i in bpe_tokenizer.encode(piece)]
    assert ids == bpe_tokenizer.encode(whole)


def test_pieces_are_about_as_long_as_asked() -> None:
    pieces = list(cut_pieces(text(5000), 100))

    assert len(pieces) > 30
    assert max(map(len, pieces)) < 200


def test_a_checkpoints_tokenizer_is_taken_as_it_is(
    bpe_tokenizer: BytePairTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint").mkdir()
    bpe_tokenizer.write(tmp_path / "checkpoint")
    files = write(tmp_path, a=text(500))

    dataset = prepared(tmp_path / "out", files, tokenizer_dir=tmp_path / "checkpoint")

    assert dataset.tokenizer.fingerprint == bpe_tokenizer.fingerprint
    assert load_tokenizer(tmp_path / "out").fingerprint == bpe_tokenizer.fingerprint


def test_some_other_bpe_is_not_taken_for_gpt2s(
    bpe_tokenizer: BytePairTokenizer, tmp_path: Path
) -> None:
    bpe_tokenizer.write(tmp_path)
    files = write(tmp_path, a=text(500))

    with pytest.raises(DataError, match="holds a tokenizer of 280 ids; GPT-2's has 50257"):
        prepared(tmp_path / "out", files, tokenizer="gpt2", tokenizer_dir=tmp_path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "has no text in it"),
        (b" \n\n", "has no text in it"),
        (b"good\xffbad", "is not UTF-8 text: byte 0xff at offset 4 does not fit"),
        (b"x", "too short to hold out 10%"),
    ],
    ids=["empty", "blank", "not UTF-8", "short"],
)
def test_unusable_text_is_named_and_leaves_nothing(
    tmp_path: Path, raw: bytes, message: str
) -> None:
    (tmp_path / "odd.txt").write_bytes(raw)

    result = kvik_prepare(tmp_path / "odd.txt", "--tokenizer", "char", "--out", tmp_path / "out")

    assert result.exit_code == 1
    assert message in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["odd.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizer", "gpt2"], "--tokenizer-dir must name a directory with GPT-2's vocabulary"),
        ([], "tokenizer must be gpt2, char or bpe:N such as bpe:2048, got nothing"),
        (["--tokenizer", "bpe"], "tokenizer must be gpt2, char or bpe:N such as bpe:2048"),
        (["--tokenizer", "bpe:256"], "takes N from 257 (256 bytes and <|endoftext|>)"),
        (["--tokenizer", "bpe:5000"], "too short for a vocabulary of 5000"),
        (["--tokenizer", "char", "--tokenizer-dir", "x"], "goes with tokenizer gpt2 or none"),
        (["--tokenizer", "char", "--val-fraction", "1"], "must lie between 0 and 1, got 1.0"),
        (["--tokenizer-dir", "gone"], "gone holds no tokenizer"),
    ],
)
def test_wrong_options_are_refused_with_their_remedy(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    (source,) = write(tmp_path, a=text(500))

    result = kvik_prepare(source, *arguments, "--out", tmp_path / "out")

    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_file_named_twice_is_refused(tmp_path: Path) -> None:
    (source,) = write(tmp_path, a=text(500))

    result = kvik_prepare(
        source, "--val-file", source, "--tokenizer", "char", "--out", tmp_path / "out"
    )

    assert result.exit_code == 1
    assert "a.txt twice" in result.output


def test_missing_file_is_named(tmp_path: Path) -> None:
    result = kvik_prepare(tmp_path / "gone", "--tokenizer", "char", "--out", tmp_path / "out")

    assert result.exit_code == 1
    assert "gone cannot be read: No such file or directory" in result.output


def test_existing_directory_is_left_alone(tmp_path: Path) -> None:
    (source,) = write(tmp_path, a=text(500))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")

    result = kvik_prepare(source, "--tokenizer", "char", "--out", tmp_path / "out")

    assert result.exit_code == 1
    assert "out exists already" in result.output
    assert (tmp_path / "out" / "mine").read_text() == "keep"


class Absent(importlib.abc.MetaPathFinder):
    """Stands before the real finders and does not find `tokenizers`."""

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> None:
        if name.partition(".")[0] == "tokenizers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_missing_package_for_learning_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source,) = write(tmp_path, a=text(500))
    for name in [name for name in sys.modules if name.partition(".")[0] == "tokenizers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])

    result = kvik_prepare(source, "--tokenizer", "bpe:280", "--out", tmp_path / "out")

    assert result.exit_code == 1
    assert "pip install 'kvik[train]'" in result.output
