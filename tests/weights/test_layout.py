import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from model.tokenizer import CharacterTokenizer
from model.vocabulary import TokenizerError
from tests.byte_pairs import byte_pair_tokenizer
from tests.json_documents import VALUES, mutations, nested, write_json
from tests.tiny_models import tiny_checkpoint, tiny_config, tiny_gpt
from weights.checkpoint import load, save
from weights.layout import (
    CheckpointError,
    format_config,
    new_directory,
    parse_config,
    read_layout,
    read_tokenizer,
    stored_shapes,
)

CONFIG = tiny_config(n_layer=1, n_head=1, n_embd=4, n_ctx=4, vocab_size=7, n_inner=3)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint of one layer, four wide, seven ids and no tokenizer, to do harm to."""
    save(tiny_gpt(CONFIG), tmp_path / "tiny", tokenizer=None)
    return tmp_path / "tiny"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The same in several files with an index."""
    save(tiny_gpt(CONFIG), tmp_path / "shards", tokenizer=None, max_shard_bytes=100)
    return tmp_path / "shards"


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_layout(directory)
    return str(caught.value)


def read_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and what follows it."""
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_file(path: Path, header: Any, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    header, data = read_file(path)
    change(header)
    write_file(path, header, data)


def edit_json(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, document | changes)


# What a good directory says


def test_a_checkpoint_says_what_it_holds(directory: Path) -> None:
    layout = read_layout(directory)

    assert layout.config == CONFIG
    assert {name: tensor.shape for name, tensor in layout.tensors.items()} == stored_shapes(CONFIG)
    assert layout.dtypes == ["F32"]
    assert layout.files == [directory / "model.safetensors"]


def test_shards_hold_the_same_tensors_as_one_file(directory: Path, shards: Path) -> None:
    whole, parts = read_layout(directory), read_layout(shards)

    assert list(parts.tensors) == list(whole.tensors)
    assert len(parts.files) > 2


def test_a_config_without_fields_is_gpt2() -> None:
    config = parse_config({}, Path("config.json"))

    assert (config.n_layer, config.n_embd, config.vocab_size, config.n_ctx) == (
        12,
        768,
        50257,
        1024,
    )


def test_a_config_survives_being_written_and_read() -> None:
    config = tiny_config(
        activation="relu", n_inner=5, bias=False, dropout=0.5, layer_norm_epsilon=1e-6,
        scale_attn_by_inverse_layer_idx=True,
    )  # fmt: skip

    document = format_config(config, dtype="float32", bos_token_id=1, eos_token_id=2)

    assert parse_config(json.loads(json.dumps(document)), Path("config.json")) == config


def test_names_that_transformers_knows_as_well_are_read() -> None:
    theirs = GPT2Config(n_layer=3, n_head=2, n_embd=8, n_positions=5)
    document = {
        "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 8,
        "max_position_embeddings": 5,
    }  # fmt: skip

    config = parse_config(document, Path("config.json"))

    assert GPT2Config(**document).to_dict() == theirs.to_dict()
    assert (config.n_layer, config.n_head, config.n_embd, config.n_ctx) == (3, 2, 8, 5)


# bos and eos


def test_generation_config_has_the_last_word_on_bos_and_eos(directory: Path) -> None:
    edit_json(directory / "config.json", bos_token_id=1, eos_token_id=2)
    write_json(directory / "generation_config.json", {"eos_token_id": [3, 4]})

    layout = read_layout(directory)

    assert (layout.bos_token_id, layout.eos_token_ids) == (1, (3, 4))


@pytest.mark.parametrize("vocab_size", [7, 50256, 50257])
def test_what_transformers_names_bos_and_eos_counts_where_the_vocabulary_has_it(
    vocab_size: int, tmp_path: Path
) -> None:
    reference = GPT2Config(n_layer=1, n_head=1, n_embd=2, n_positions=2, vocab_size=vocab_size)
    GPT2LMHeadModel(reference).save_pretrained(tmp_path)

    layout = read_layout(tmp_path)

    has_end_of_text = vocab_size == 50257
    assert layout.bos_token_id == (50256 if has_end_of_text else None)
    assert layout.eos_token_ids == ((50256,) if has_end_of_text else ())


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("field", ["bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [7, -1, True, 1.0, "1", [1, 7], [[1]], {}])
def test_a_bos_or_eos_that_the_model_has_not_is_refused(
    file: str, field: str, value: Any, directory: Path
) -> None:
    (directory / "generation_config.json").write_text("{}")
    edit_json(directory / file, **{field: value})

    expected = f"{directory} names {field} {value!r}; ids of this model are 0 to 6."
    assert refusal(directory) == expected


# What in config.json is refused


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "gpt_neo", "has model_type 'gpt_neo'; only 'gpt2' is supported."),
        ("scale_attn_weights", False, "has scale_attn_weights False; only True is supported."),
        ("add_cross_attention", True, "has add_cross_attention True; only False is supported."),
        ("tie_word_embeddings", False, "has tie_word_embeddings False; only True is supported."),
        ("quantization_config", {"bits": 4},
         "has a quantization_config, which is not supported."),
        ("pruned_heads", {"0": [1]}, "has a pruned_heads, which is not supported."),
        ("activation_function", "silu", "has activation_function 'silu'; supported are gelu_new, "
                                        "gelu, relu, gelu_pytorch_tanh."),
        ("activation_function", ["gelu"], "has activation_function ['gelu']; supported are "
                                          "gelu_new, gelu, relu, gelu_pytorch_tanh."),
        ("kvik", 3, 'has an unreadable "kvik" entry: 3.'),
        ("kvik", {"bias": 0}, "has an unreadable \"kvik\" entry: {'bias': 0}."),
        ("scale_attn_by_inverse_layer_idx", 1,
         "has scale_attn_by_inverse_layer_idx 1; expected true or false."),
        ("n_layer", 321, "has n_layer 321; expected a whole number from 1 to 320."),
        ("n_layer", 0, "has n_layer 0; expected a whole number from 1 to 320."),
        ("n_layer", True, "has n_layer True; expected a whole number from 1 to 320."),
        ("n_head", None, "has n_head None; expected a whole number from 1 to 2147483647."),
        ("n_head", 3, ": n_embd must be a multiple of n_head, got n_embd=4 and n_head=3."),
        ("n_embd", 4.0, "has n_embd 4.0; expected a whole number from 1 to 2147483647."),
        ("n_positions", "4", "has n_positions '4'; expected a whole number from 1 to 2147483647."),
        ("vocab_size", 2**31,
         "has vocab_size 2147483648; expected a whole number from 1 to 2147483647."),
        ("n_inner", 0, "has n_inner 0; expected a whole number from 1 to 2147483647."),
        ("layer_norm_epsilon", float("nan"),
         "has layer_norm_epsilon nan; expected a number from 0 to 1."),
        ("layer_norm_epsilon", float("inf"),
         "has layer_norm_epsilon inf; expected a number from 0 to 1."),
        ("layer_norm_epsilon", 10**400,
         f"has layer_norm_epsilon {'1' + '0' * 57}...{'0' * 59}; expected a number from 0 to 1."),
        ("layer_norm_epsilon", 0, ": layer_norm_epsilon must be positive, got 0.0."),
        ("layer_norm_epsilon", "1e-5",
         "has layer_norm_epsilon '1e-5'; expected a number from 0 to 1."),
        ("resid_pdrop", 1, ": dropout must be at least 0 and less than 1, got 1.0."),
        ("resid_pdrop", -0.1, "has resid_pdrop -0.1; expected a number from 0 to 1."),
        ("num_hidden_layers", 2, "has n_layer 1 and num_hidden_layers 2, two names of one thing."),
    ],
)  # fmt: skip
def test_a_config_that_asks_for_something_else_is_refused_by_name(
    field: str, value: Any, message: str, directory: Path
) -> None:
    edit_json(directory / "config.json", **{field: value})

    path = directory / "config.json"
    assert refusal(directory) == f"{path}{'' if message.startswith(':') else ' '}{message}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_cache", False),
        ("attn_pdrop", 0.3),
        ("summary_type", "first"),
        ("reorder_and_upcast_attn", True),
        ("is_decoder", True),
        ("scale_attn_weights", 1),
        ("task_specific_params", {"text-generation": {}}),
    ],
)
def test_fields_that_change_nothing_pass(field: str, value: Any, directory: Path) -> None:
    edit_json(directory / "config.json", **{field: value})

    assert read_layout(directory).config == CONFIG


# Files that are none


def test_a_path_that_is_no_directory_is_refused(directory: Path) -> None:
    path = directory / "config.json"

    assert refusal(path) == (
        f"{path} is not a directory; a checkpoint is a directory with config.json and "
        "model.safetensors."
    )


@pytest.mark.parametrize("name", ["nowhere", "a\0b", "a\udcff", "x" * 300])
def test_a_name_of_no_directory_is_refused(name: str, tmp_path: Path) -> None:
    assert "is not a directory" in refusal(tmp_path / name)


FILES = ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_checkpoint_without_a_file_is_refused(name: str, directory: Path) -> None:
    (directory / name).unlink()

    assert refusal(directory) in (
        f"{directory / 'config.json'} is missing (No such file or directory).",
        f"{directory} has neither model.safetensors nor model.safetensors.index.json.",
    )


def test_weights_in_another_format_are_named_with_the_remedy(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "ckpt.pt", "notes.txt"):
        (directory / name).touch()

    assert refusal(directory) == (
        f"{directory} has neither model.safetensors nor model.safetensors.index.json. It has "
        "ckpt.pt, pytorch_model.bin: bring it in with kvik convert."
    )


@pytest.mark.parametrize("name", FILES)
def test_a_dangling_link_is_refused(name: str, directory: Path) -> None:
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to("nowhere")

    assert refusal(directory) == f"{directory / name} is a dangling link."


@pytest.mark.parametrize("name", FILES)
def test_links_in_a_circle_are_refused(name: str, directory: Path) -> None:
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(name)

    assert refusal(directory) == f"{directory / name} is a dangling link."


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_is_refused_and_not_opened(name: str, directory: Path) -> None:
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)

    assert refusal(directory) == f"{directory / name} is not a regular file."


@pytest.mark.parametrize("name", FILES)
def test_a_directory_in_place_of_a_file_is_refused(name: str, directory: Path) -> None:
    (directory / name).unlink(missing_ok=True)
    (directory / name).mkdir()

    assert refusal(directory) == f"{directory / name} is not a regular file."


@pytest.mark.parametrize("name", FILES)
def test_a_device_is_refused(name: str, directory: Path) -> None:
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to("/dev/zero")

    assert refusal(directory) == f"{directory / name} is not a regular file."


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="/proc/self/mem is Linux's")
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_refused(name: str, directory: Path) -> None:
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to("/proc/self/mem")  # a regular file whose first byte is unreadable

    assert refusal(directory) == f"{directory / name} cannot be read: Input/output error."


def test_a_cache_of_links_to_blobs_is_read_as_it_lies(directory: Path, tmp_path: Path) -> None:
    # The layout of Hugging Face's cache: snapshots/<revision>/<name> -> ../../blobs/<hash>
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        shutil.copy(file, blobs / f"hash{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash{number}")

    model = load(snapshot)

    assert torch.equal(model.wte.weight, load(directory).wte.weight)


def test_a_directory_behind_a_link_is_read(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(directory)

    assert read_layout(tmp_path / "link").config == CONFIG


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not valid JSON: Expecting value"),
        ("{'a': 1}", "is not valid JSON: Expecting property name"),
        (nested(100_000), "is not valid JSON: maximum recursion depth exceeded"),
        ("1" * 5000, "is not valid JSON: Exceeds the limit"),
        ("[]", "must hold a JSON object, found list."),
        ("7", "must hold a JSON object, found int."),
        (" " * (2**22 + 1), "has 4194305 bytes; at most 4194304 are expected."),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(
    name: str, text: str, reason: str, directory: Path
) -> None:
    (directory / name).write_text(text)

    assert refusal(directory).startswith(f"{directory / name} {reason}")


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


# The tokenizer beside the weights


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(directory: Path) -> None:
    CharacterTokenizer.from_text("12345678").write(directory)

    with pytest.raises(CheckpointError) as caught:
        read_tokenizer(read_layout(directory))

    assert str(caught.value) == (
        f"{directory}: the tokenizer has 8 ids and the model only 7; they do not belong together."
    )


def test_a_tokenizer_with_fewer_ids_leaves_padding(tmp_path: Path) -> None:
    layout = read_layout(tiny_checkpoint(tmp_path / "tiny"))

    tokenizer = read_tokenizer(layout)

    assert tokenizer.vocab_size == byte_pair_tokenizer().vocab_size < layout.config.vocab_size


def test_a_directory_without_a_tokenizer_still_has_a_layout(directory: Path) -> None:
    layout = read_layout(directory)

    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        read_tokenizer(layout)


# Anything at all


def read_or_refuse(directory: Path) -> None:
    """Read the layout: no error but CheckpointError may come out, with a message to print."""
    message = ""
    try:
        read_layout(directory)
    except CheckpointError as error:
        message = str(error)
    assert len(message.encode()) < 2000


many_examples = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@many_examples
@given(data=st.data())
def test_any_config_is_read_or_refused(data: st.DataObject, directory: Path) -> None:
    document = format_config(CONFIG, dtype="float32", bos_token_id=0, eos_token_id=0)
    document |= {"kvik": {"bias": True}, "pruned_heads": {}, "num_hidden_layers": 1}
    write_json(directory / "config.json", data.draw(mutations(document) | VALUES))

    read_or_refuse(directory)


@many_examples
@given(document=mutations({"bos_token_id": 0, "eos_token_id": [0, 1]}) | VALUES)
def test_any_generation_config_is_read_or_refused(document: Any, directory: Path) -> None:
    write_json(directory / "generation_config.json", document)

    read_or_refuse(directory)


@many_examples
@given(data=st.data())
def test_any_header_is_read_or_refused(data: st.DataObject, directory: Path) -> None:
    path = directory / "model.safetensors"
    if not (saved := path.with_suffix(".good")).exists():
        shutil.copy(path, saved)
    header, values = read_file(saved)
    write_file(path, data.draw(mutations(header) | VALUES), values)

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


# A new directory


def test_a_new_directory_appears_when_its_writer_is_done(tmp_path: Path) -> None:
    with new_directory(tmp_path / "a" / "b") as partial:
        (partial / "x").write_text("1")
        during = (tmp_path / "a" / "b").exists()

    assert not during
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def write_and_fail() -> None:
        with new_directory(tmp_path / "b") as partial:
            (partial / "x").write_text("1")
            raise KeyError

    with pytest.raises(KeyError):
        write_and_fail()

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_a_path_that_exists_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "b")

    with pytest.raises(CheckpointError) as caught, new_directory(tmp_path / "b"):
        pass

    expected = f"{tmp_path / 'b'} exists already; name another place or remove it first."
    assert str(caught.value) == expected


def test_a_directory_made_meanwhile_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught, new_directory(tmp_path / "b"):
        (tmp_path / "b").mkdir()

    assert str(caught.value) == f"{tmp_path / 'b'} was made by someone else meanwhile."
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_place_where_nothing_can_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(CheckpointError) as caught, new_directory(tmp_path / "file" / "b"):
        pass

    assert str(caught.value) == f"{tmp_path / 'file' / 'b'} cannot be made: File exists."


def test_what_a_killed_process_with_our_id_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f".b.partial-{os.getpid()}"
    left.mkdir()
    (left / "old").touch()

    with new_directory(tmp_path / "b"):
        pass

    assert list(tmp_path.rglob("*")) == [tmp_path / "b"]
