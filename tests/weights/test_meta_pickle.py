import codecs
import contextlib
import os
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.weights.nanogpt_model import write_meta
from weights.convert.meta_pickle import parse_plain_pickle, read_characters
from weights.errors import CheckpointError

HERE = Path("meta.pkl")
CHARACTERS = "\n !abcäß→😀"

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
plain = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@given(value=plain, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_data_reads_as_python_wrote_it(value: Any, protocol: int) -> None:
    assert parse_plain_pickle(pickle.dumps(value, protocol), HERE) == value


@given(value=st.lists(st.text(min_size=1), min_size=1))
def test_shared_objects_stay_shared(value: list[str]) -> None:
    read = parse_plain_pickle(pickle.dumps({"once": value, "again": value}), HERE)

    assert read["once"] == value
    assert read["once"] is read["again"]


@given(content=st.binary(max_size=200))
def test_random_bytes_are_refused_or_read_but_never_anything_else(content: bytes) -> None:
    try:
        parse_plain_pickle(content, HERE)
    except CheckpointError as error:
        assert "meta.pkl" in str(error)  # noqa: PT017


@given(value=plain, data=st.data())
def test_cut_off_pickle_is_refused(value: Any, data: st.DataObject) -> None:
    content = pickle.dumps(value)
    cut = data.draw(st.integers(0, len(content) - 1))

    with pytest.raises(CheckpointError, match=r"meta\.pkl is not a whole pickle"):
        parse_plain_pickle(content[:cut], HERE)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_characters_survive_every_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    write_meta(tmp_path / "meta.pkl", CHARACTERS, protocol)

    tokenizer = read_characters(tmp_path / "meta.pkl")

    assert tokenizer.decode(range(tokenizer.vocab_size)) == CHARACTERS


def test_ids_need_not_follow_the_code_points(tmp_path: Path) -> None:
    write_meta(tmp_path / "meta.pkl", "zebra")

    assert read_characters(tmp_path / "meta.pkl").encode("bar") == [2, 4, 3]


class Calling:
    """Calls something when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_that_would_run_code_is_refused_unrun(tmp_path: Path, protocol: int) -> None:
    canary = tmp_path / "canary"
    saboteur = Calling(os.system, f"touch '{canary}'")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": saboteur}, protocol))

    with pytest.raises(CheckpointError, match=r"GLOBAL, which asks for \w+\.system\. It was not"):
        read_characters(tmp_path / "meta.pkl")

    assert not canary.exists()


@pytest.mark.parametrize(
    ("content", "instruction"),
    [
        (b"(S'touch canary'\nios\nsystem\n.", "STRING"),
        (b"(ios\nsystem\n.", "INST, which asks for os.system"),
        (b"\x82\x01.", "EXT1"),
        (b"Pid\n.", "PERSID"),
        (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".", None),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (pickle.dumps({1, 2}), "EMPTY_SET"),
        (pickle.dumps((1,)), "TUPLE1"),
        (pickle.dumps(b"bytes"), "SHORT_BINBYTES"),
        (pickle.dumps(codecs.encode), "STACK_GLOBAL, which asks for _codecs.encode"),
    ],
)
def test_instruction_beyond_plain_data_is_named(content: bytes, instruction: str | None) -> None:
    expected = f"instruction {instruction}" if instruction else "not a whole pickle"

    with pytest.raises(CheckpointError, match=expected):
        parse_plain_pickle(content, HERE)


@pytest.mark.parametrize("key", [b"N", b"]", b"}", b"G" + bytes(8)])
def test_key_that_is_neither_string_nor_number_is_refused(key: bytes) -> None:
    with pytest.raises(CheckpointError, match="key is neither a string nor a number"):
        parse_plain_pickle(b"}" + key + b"Ns.", HERE)


@pytest.mark.parametrize(
    "content",
    [
        b"Nr" + struct.pack("<I", 2**32 - 1) + b".",  # a memo index that would reserve gigabytes
        b"\x80\x04X" + struct.pack("<I", 2**32 - 1) + b".",  # a string of four gigabytes
        b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b".",
        b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b".",
        b"I" + b"9" * 100_000 + b"\n.",
        b"]" * 20_000 + b"a" * 19_999 + b".",  # twenty thousand lists, one in the other
    ],
)
def test_small_file_cannot_claim_much_memory(content: bytes) -> None:
    tracemalloc.start()

    with contextlib.suppress(CheckpointError):
        parse_plain_pickle(content, HERE)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak_bytes < 1_000_000 + 400 * len(content)


def entry(characters: str = CHARACTERS, **changes: Any) -> dict[str, Any]:
    meta = {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: i for i, character in enumerate(characters)},
    }
    return {**meta, **changes}


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ([1, 2], "holds a list; a meta.pkl holds a dict"),
        ({"stoi": {}}, "lacks itos, vocab_size"),
        (entry(vocab_size=7), "contradicts itself: vocab_size 7, 10 entries in stoi, 10 in itos"),
        (entry(vocab_size=2**70_000), "contradicts itself: vocab_size a int"),
        (entry(stoi=[1]), "stoi and itos must be dicts"),
        (entry("ab", stoi={"a": 1, "b": 0}), r"itos\[0\] is 'a', and stoi has 1 for it"),
        (entry("ab", stoi={"a": 0, "c": 1}), r"itos\[1\] is 'b', and stoi has None for it"),
        (entry("ab", stoi={"a": 0, "b": True}), "stoi has True"),
        (entry("ab", itos={0: "a", 2: "b"}), "itos has None for 1"),
        (entry("ab", itos={0: "a", 1: []}), "itos has a list for 1"),
        ({"vocab_size": 1, "itos": {0: "the"}, "stoi": {"the": 0}}, "'the' .* is no character"),
        ({"vocab_size": 1, "itos": {0: "\ud800"}, "stoi": {"\ud800": 0}}, "surrogate"),
        (entry(""), "at least one character"),
    ],
)
def test_vocabulary_that_contradicts_itself_is_refused(
    tmp_path: Path, meta: Any, message: str
) -> None:
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(meta))

    with pytest.raises(CheckpointError, match=message) as refusal:
        read_characters(path)

    assert str(refusal.value).startswith(str(path))


def test_characters_as_a_list_are_understood(tmp_path: Path) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(entry("abc", itos=["a", "b", "c"])))

    assert read_characters(tmp_path / "meta.pkl").decode([2, 0]) == "ca"


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "directory.pkl").mkdir()

    with pytest.raises(CheckpointError, match="no file"):
        read_characters(tmp_path / "directory.pkl")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_characters(tmp_path / "absent.pkl")
