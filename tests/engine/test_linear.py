"""Packed products: equal to the plain ones, and the same bytes for a row in any company."""

import pytest
import torch
import torch.nn.functional as F

from engine.config import EngineConfig
from engine.linear import Head, PackedLinear, PackedMLP, can_pack
from model.config import Activation, GPTConfig
from model.gpt import ACTIVATIONS, MLP

BUDGET = EngineConfig().max_num_scheduled_tokens
DTYPES = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.skipif(
    not all(can_pack(torch.device("cpu"), dtype) for dtype in DTYPES),
    reason="this processor has no packed products in float32 and bfloat16",
)


def make_linear(
    num_in: int, num_out: int, dtype: torch.dtype, activation: Activation | None = None
) -> tuple[PackedLinear, torch.Tensor, torch.Tensor]:
    weight = (torch.randn(num_out, num_in) * num_in**-0.5).to(dtype)
    bias = torch.randn(num_out).to(dtype)
    return PackedLinear(weight, bias, activation), weight, bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize(("num_in", "num_out"), [(768, 96), (33, 77), (1, 5)])
def test_packed_product_equals_the_plain_one(
    num_in: int, num_out: int, activation: Activation | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    packed, weight, bias = make_linear(num_in, num_out, dtype, activation)
    x = torch.randn(9, num_in).to(dtype)

    y = packed(x)

    expected = F.linear(x.float(), weight.float(), bias.float())
    if activation is not None:
        expected = ACTIVATIONS[activation](expected)
    assert y.dtype == dtype
    # float32: the order of 768 additions; bfloat16: one rounding of the result, 2^-8 of it.
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_in", "num_out", "activation", "stride"),
    [
        (768, 2304, None, 1),  # c_attn of GPT-2 124M: what goes into the cache, every count
        (256, 768, None, 1),  # the storyteller's
        (768, 768, None, 11),
        (768, 3072, "gelu_new", 11),
        (3072, 768, None, 11),
        (1024, 256, None, 11),
        (100, 300, "gelu", 11),  # widths that fill no vector register
    ],
)
def test_a_row_has_the_same_bytes_at_every_row_count_of_a_step(
    num_in: int, num_out: int, activation: Activation | None, stride: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    packed, _, _ = make_linear(num_in, num_out, dtype, activation)
    x = torch.randn(BUDGET, num_in).to(dtype)
    together = packed(x)

    different = [
        count
        for count in range(1, BUDGET, stride)
        if not torch.equal(packed(x[BUDGET - count :]), together[BUDGET - count :])
    ]

    assert different == []


def test_head_gives_a_row_the_same_bytes_at_every_row_count() -> None:
    torch.manual_seed(0)
    head = Head(torch.randn(1031, 768), 1031)
    hidden = torch.randn(256, 768)
    together = head(hidden)

    different = [n for n in range(1, 256) if not torch.equal(head(hidden[:n]), together[:n])]

    assert different == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_gives_float32_logits_without_the_padding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, hidden = torch.randn(20, 16).to(dtype), torch.randn(3, 16).to(dtype)

    logits = Head(weight, 17)(hidden)

    assert logits.dtype == torch.float32
    expected = (hidden.double() @ weight.double().T)[:, :17].float()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_packed_mlp_equals_the_model_s(activation: Activation, bias: bool) -> None:
    torch.manual_seed(0)
    config = GPTConfig(n_embd=48, n_inner=100, activation=activation, bias=bias)
    plain = MLP(config)
    x = torch.randn(7, 48)

    y = PackedMLP(plain.c_fc, plain.c_proj, activation)(x)

    torch.testing.assert_close(y, plain(x), rtol=1e-5, atol=1e-5)
