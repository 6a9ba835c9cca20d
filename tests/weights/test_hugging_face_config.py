import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from tests.json_documents import VALUES, mutations, write_json
from tests.tiny_models import tiny_config
from tests.weights.damage import CONFIG, edit_json, many_examples, read_or_refuse, refusal
from weights.hugging_face_config import format_config, parse_config
from weights.layout import read_layout


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


# Anything at all


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
