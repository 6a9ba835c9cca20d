import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.json_documents import VALUES, mutations, nested, write_json
from tests.weights.damage import (
    CONFIG,
    edit_header,
    edit_json,
    many_examples,
    read_file,
    read_or_refuse,
    refusal,
    write_file,
)
from weights.layout import read_layout, stored_shapes

# Headers


def test_a_file_cut_anywhere_is_refused(directory: Path) -> None:
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    end_of_header = len(raw) - len(read_file(path)[1])
    lengths = {*range(0, len(raw), 13), *range(9), end_of_header - 1, end_of_header, len(raw) - 1}

    for length in sorted(lengths):
        path.write_bytes(raw[:length])

        message = refusal(directory)

        assert message.startswith(str(path)), length
        assert "cut off" in message, length


def test_bytes_behind_the_last_tensor_are_refused(directory: Path) -> None:
    path = directory / "model.safetensors"
    size = path.stat().st_size
    with path.open("ab") as stream:
        stream.write(b"x")

    assert refusal(directory) == (
        f"{path} has {size + 1} bytes; its header accounts for {size}. Was the copy cut off?"
    )


@pytest.mark.parametrize("length", [0, 1, 2**20 + 1, 2**32, 2**63, 2**64 - 1])
def test_a_header_of_an_impossible_length_is_refused(length: int, directory: Path) -> None:
    path = directory / "model.safetensors"
    raw = path.read_bytes() + bytes(2**20 + 1)
    path.write_bytes(struct.pack("<Q", length) + raw[8:])

    assert refusal(directory) == (
        f"{path} is no safetensors file, or cut off: it has {len(raw)} bytes and announces a "
        f"header of {length} (at most 1048576 are expected)."
    )


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[]", " has a header that is not a JSON object."),
        ('"ab"', " has a header that is not a JSON object."),
        ("{]", " has an unreadable header: Expecting property name"),
        (nested(100_000), " has an unreadable header: maximum recursion depth exceeded"),
        ('{"a": {}, "a": {}}', " has an unreadable header: a name occurs twice."),
        ('{"a": {"dtype": "F32", "dtype": "F16"}}',
         " has an unreadable header: a name occurs twice."),
        (json.dumps({f"t{i}": 0 for i in range(4097)}), " lists 4097 tensors; at most 4096."),
        ('{"a": 1}', " has an unreadable entry for tensor 'a'."),
    ],
)  # fmt: skip
def test_a_header_that_is_none_is_refused(header: str, message: str, directory: Path) -> None:
    path = directory / "model.safetensors"

    write_file(path, header, b"")

    assert refusal(directory).startswith(f"{path}{message}")


def test_a_header_that_is_no_text_is_refused(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 4) + b'{"\xff"')

    assert refusal(directory).startswith(f"{path} has an unreadable header: 'utf-8' codec")


KEY = "transformer.ln_f.bias"  # four values, the first or last of the file or somewhere between


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": 7}, " has an unreadable entry for tensor 'transformer.ln_f.bias'."),
        ({"shape": "4"}, " has an unreadable entry for tensor 'transformer.ln_f.bias'."),
        ({"shape": {}}, " has an unreadable entry for tensor 'transformer.ln_f.bias'."),
        ({"shape": [4.0]}, " has an unreadable entry for tensor 'transformer.ln_f.bias'."),
        ({"shape": [True, 4]}, " has an unreadable entry for tensor 'transformer.ln_f.bias'."),
        ({"shape": [-4]}, " has an unreadable entry for tensor 'transformer.ln_f.bias'."),
        ({"shape": [10**400]}, " has an unreadable entry for tensor 'transformer.ln_f.bias'."),
        ({"shape": [1] * 9}, " has an unreadable entry for tensor 'transformer.ln_f.bias'."),
        ({"data_offsets": [0]}, " has an unreadable entry for tensor 'transformer.ln_f.bias'."),
        ({"data_offsets": [16, 0]}, " has an unreadable entry for tensor 'transformer.ln_f.bias'."),
        ({"data_offsets": None}, " has an unreadable entry for tensor 'transformer.ln_f.bias'."),
        ({"shape": [5]}, ": tensor transformer.ln_f.bias has 16 bytes; expected 20 for F32 of "
                         "shape [5]."),
        ({"dtype": "F16"}, ": tensor transformer.ln_f.bias has 16 bytes; expected 8 for F16 of "
                           "shape [4]."),
        ({"dtype": "I32"}, ": tensor transformer.ln_f.bias has dtype 'I32'; supported are F32, "
                           "F16, BF16."),
        ({"shape": [2, 2]}, ": tensor transformer.ln_f.bias should have shape [4] by config.json, "
                            "found [2, 2]."),
    ],
)  # fmt: skip
def test_an_entry_that_does_not_fit_is_refused(
    entry: dict[str, Any], message: str, directory: Path
) -> None:
    path = directory / "model.safetensors"

    edit_header(path, lambda header: header[KEY].update(entry))

    assert refusal(directory) == f"{path}{message}"


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_an_entry_that_lacks_a_field_is_refused(field: str, directory: Path) -> None:
    path = directory / "model.safetensors"

    edit_header(path, lambda header: header[KEY].pop(field))

    assert refusal(directory) == f"{path} has an unreadable entry for tensor '{KEY}'."


@pytest.mark.parametrize("name", ["a\nb", "\ud800", "\x1b[31m"])
def test_a_name_that_cannot_be_printed_is_shown_in_escapes(name: str, directory: Path) -> None:
    path = directory / "model.safetensors"

    edit_header(path, lambda header: header.update({name: header.pop(KEY)}))

    assert refusal(directory) == f"{path} has an unreadable entry for tensor {name!r}."


def last_tensor(header: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return max(
        ((key, entry) for key, entry in header.items() if key != "__metadata__"),
        key=lambda item: item[1]["data_offsets"],
    )


@pytest.mark.parametrize("shift", [-4, 4])
def test_tensors_that_overlap_or_leave_a_gap_are_refused(shift: int, directory: Path) -> None:
    path = directory / "model.safetensors"
    header, data = read_file(path)
    key, entry = last_tensor(header)
    place = entry["data_offsets"][0]
    entry["data_offsets"] = [offset + shift for offset in entry["data_offsets"]]

    write_file(path, header, data + bytes(max(0, shift)))

    expected = 8 + len(json.dumps(header)) + place
    assert refusal(directory) == (
        f"{path}: tensor {key} starts at byte {expected + shift}; expected {expected}, where the "
        "one before it ends."
    )


def test_two_tensors_in_one_place_are_refused(directory: Path) -> None:
    path = directory / "model.safetensors"

    def put_one_on_the_other(header: dict[str, Any]) -> None:
        for name in ("ln_1", "ln_2"):
            header[f"transformer.h.0.{name}.bias"] = header["transformer.h.0.ln_1.bias"]

    edit_header(path, put_one_on_the_other)

    assert "where the one before it ends." in refusal(directory)


def test_an_unknown_type_cannot_hide_a_tensor_that_runs_backwards(directory: Path) -> None:
    path = directory / "model.safetensors"
    header, data = read_file(path)
    header["h.0.attn.bias"] = {
        "dtype": "U8", "shape": [1], "data_offsets": [len(data), len(data) - 16],
    }  # fmt: skip

    write_file(path, header, data[:-16])

    assert refusal(directory) == f"{path} has an unreadable entry for tensor 'h.0.attn.bias'."


# Tensors


def test_a_missing_tensor_is_named_with_its_shape(directory: Path) -> None:
    path = directory / "model.safetensors"

    edit_header(path, lambda header: header.update({"h.7.attn.bias": header.pop(KEY)}))

    assert refusal(directory) == f"{path} lacks the tensor ln_f.bias, shape [4]."


@pytest.mark.parametrize("name", ["h.1.ln_1.weight", "score.weight", "transformer.wte.bias"])
def test_a_tensor_too_many_is_named(name: str, directory: Path) -> None:
    path = directory / "model.safetensors"
    header, data = read_file(path)
    header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}

    write_file(path, header, data + bytes(4))

    assert refusal(directory) == (
        f"{path} holds the tensor {name}, which a GPT-2 of 1 layers does not have."
    )


def test_a_tensor_under_two_names_is_refused(directory: Path) -> None:
    path = directory / "model.safetensors"
    header, data = read_file(path)
    header["ln_f.bias"] = {
        "dtype": "F32",
        "shape": [4],
        "data_offsets": [len(data), len(data) + 16],
    }

    write_file(path, header, data + bytes(16))

    assert refusal(directory) in (
        f"{path} stores ln_f.bias a second time, as {second}; first in {path} as {first}."
        for first, second in [(KEY, "ln_f.bias"), ("ln_f.bias", KEY)]
    )


def test_a_shape_that_the_config_does_not_say_is_refused(directory: Path) -> None:
    edit_json(directory / "config.json", n_positions=5)

    assert refusal(directory) == (
        f"{directory / 'model.safetensors'}: tensor transformer.wpe.weight should have shape "
        "[5, 4] by config.json, found [4, 4]."
    )


def test_an_output_head_of_another_shape_is_refused(directory: Path) -> None:
    path = directory / "model.safetensors"
    header, data = read_file(path)
    header["lm_head.weight"] = {
        "dtype": "F32", "shape": [6, 4], "data_offsets": [len(data), len(data) + 96],
    }  # fmt: skip

    write_file(path, header, data + bytes(96))

    assert refusal(directory) == (
        f"{path}: tensor lm_head.weight should have shape [7, 4] by config.json, found [6, 4]."
    )


@pytest.mark.parametrize("dtype", ["F32", "BOOL", "U8", "something else"])
def test_mask_buffers_of_older_checkpoints_are_skipped(dtype: str, directory: Path) -> None:
    path = directory / "model.safetensors"
    header, data = read_file(path)
    for name in ("h.0.attn.bias", "transformer.h.0.attn.masked_bias"):
        header[name] = {"dtype": dtype, "shape": [1], "data_offsets": [len(data), len(data) + 4]}
        data += bytes(4)

    write_file(path, header, data)

    assert len(read_layout(directory).tensors) == len(stored_shapes(CONFIG))


# The index of shards


@pytest.mark.parametrize("value", [None, [], {}, "model.safetensors", 3])
def test_an_index_without_a_map_is_refused(value: Any, shards: Path) -> None:
    path = shards / "model.safetensors.index.json"
    edit_json(path, weight_map=value)

    assert refusal(shards) == f"{path} has no weight_map."


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "", ".", "..", "x/", 5, None, ["x"], "a" * 200 + "/"]
)
def test_an_index_that_points_elsewhere_is_refused(name: Any, shards: Path) -> None:
    path = shards / "model.safetensors.index.json"
    edit_json(path, weight_map={"wte.weight": name})

    message = refusal(shards)

    assert message.startswith(f"{path} places 'wte.weight' in ")
    assert message.endswith(", which is no file beside it.")


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_an_index_with_a_name_that_no_file_can_have_is_refused(name: str, shards: Path) -> None:
    edit_json(shards / "model.safetensors.index.json", weight_map={"wte.weight": name})

    assert refusal(shards) == f"{str(shards / name)!r} cannot be the name of a file."


def test_a_missing_shard_is_named(shards: Path) -> None:
    shard = sorted(shards.glob("model-*.safetensors"))[1]
    shard.unlink()

    assert refusal(shards) == f"{shard} is missing (No such file or directory)."


def test_a_shard_cut_short_is_named(shards: Path) -> None:
    shard = sorted(shards.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])

    assert refusal(shards).startswith(f"{shard} has {shard.stat().st_size} bytes; its header")


def test_an_index_that_places_a_tensor_in_another_shard_is_refused(shards: Path) -> None:
    path = shards / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    first, *_, last = sorted(set(places.values()))
    key = next(key for key, name in places.items() if name == last)
    edit_json(path, weight_map=places | {key: first})

    assert refusal(shards) == f"{path} and {shards / first} disagree about {key!r}."


def test_an_index_that_forgets_a_tensor_is_refused(shards: Path) -> None:
    path = shards / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    name = places.pop(KEY)
    edit_json(path, weight_map=places)

    assert refusal(shards) == f"{path} and {shards / name} disagree about {KEY!r}."


def test_a_tensor_that_no_shard_holds_is_missed_in_the_index(shards: Path) -> None:
    path = shards / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    shard = shards / places[KEY]
    edit_header(shard, lambda header: header.update({"h.0.attn.bias": header.pop(KEY)}))
    places["h.0.attn.bias"] = places.pop(KEY)
    edit_json(path, weight_map=places)

    assert refusal(shards) == f"{path} lacks the tensor ln_f.bias, shape [4]."


def test_one_file_goes_before_an_index_as_it_does_in_transformers(
    directory: Path, shards: Path
) -> None:
    shutil.copy(directory / "model.safetensors", shards)

    assert read_layout(shards).files == [shards / "model.safetensors"]


# Anything at all


@many_examples
@given(data=st.data())
def test_any_header_is_read_or_refused(data: st.DataObject, directory: Path) -> None:
    path = directory / "model.safetensors"
    if not (saved := path.with_suffix(".good")).exists():
        shutil.copy(path, saved)
    header, values = read_file(saved)
    write_file(path, json.dumps(data.draw(mutations(header) | VALUES)), values)

    read_or_refuse(directory)


@many_examples
@given(document=mutations({"weight_map": {"wte.weight": "model.safetensors"}}) | VALUES)
def test_any_index_is_read_or_refused(document: Any, directory: Path) -> None:
    if (path := directory / "model.safetensors").exists():
        path.rename(directory / "weights.safetensors")
    write_json(directory / "model.safetensors.index.json", document)

    read_or_refuse(directory)


@many_examples
@given(place=st.integers(min_value=0), value=st.integers(min_value=0, max_value=255))
def test_any_byte_changed_is_read_or_refused(place: int, value: int, directory: Path) -> None:
    path = directory / "model.safetensors"
    if not (saved := path.with_suffix(".good")).exists():
        shutil.copy(path, saved)
    raw = bytearray(saved.read_bytes())
    raw[place % len(raw)] = value
    path.write_bytes(raw)

    read_or_refuse(directory)
