import dataclasses
import re
from typing import Any

import pytest

from model.config import GPTConfig


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_layer", 0, "n_layer must be at least 1, got 0"),
        ("n_head", -1, "n_head must be at least 1, got -1"),
        ("n_embd", 0, "n_embd must be at least 1, got 0"),
        ("n_ctx", 0, "n_ctx must be at least 1, got 0"),
        ("vocab_size", 0, "vocab_size must be at least 1, got 0"),
        ("n_inner", 0, "n_inner must be at least 1, or absent for 4 * n_embd, got 0"),
        ("n_head", 7, "n_embd must be a multiple of n_head, got n_embd=768 and n_head=7"),
        ("activation", "silu", "activation must be one of gelu_new, gelu, relu, got 'silu'"),
        ("layer_norm_epsilon", 0.0, "layer_norm_epsilon must be positive, got 0.0"),
        ("layer_norm_epsilon", float("nan"), "layer_norm_epsilon must be positive, got nan"),
        ("dropout", 1.0, "dropout must be at least 0 and less than 1, got 1.0"),
        ("dropout", -0.1, "dropout must be at least 0 and less than 1, got -0.1"),
    ],
)
def test_an_impossible_value_is_refused_by_name(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(GPTConfig(), **{field: value})


@pytest.mark.parametrize(
    ("layers", "heads", "width", "millions"),
    [(12, 12, 768, 124), (24, 16, 1024, 355), (36, 20, 1280, 774), (48, 25, 1600, 1558)],
)
def test_the_four_sizes_of_gpt2_have_the_parameters_they_are_named_for(
    layers: int, heads: int, width: int, millions: int
) -> None:
    config = GPTConfig(n_layer=layers, n_head=heads, n_embd=width)

    assert round(config.num_parameters / 1e6) == millions


def test_scores_are_divided_by_the_root_of_the_head_size() -> None:
    config = GPTConfig(n_embd=64, n_head=4)

    assert [config.attention_scale(layer) for layer in (0, 3)] == [0.25, 0.25]


def test_inverse_layer_scaling_divides_by_the_number_of_the_layer_from_one() -> None:
    config = GPTConfig(n_embd=64, n_head=4, scale_attn_by_inverse_layer_idx=True)

    assert [config.attention_scale(layer) for layer in (0, 1, 3)] == [0.25, 0.125, 0.0625]
