"""The GPU's layers against `model/gpt.py`: on a GPU, or else in Triton's interpreter."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.attention import CausalAttention
from model.config import Activation, GPTConfig
from model.gpt import ACTIVATIONS
from tests.tiny_models import gpt_with_outliers, random_tokens, tiny_gpt

pytest.importorskip("triton", reason="triton comes with torch on CUDA and with the test extra")

from engine.block_triton import TritonLayerNorm, fuse
from engine.linear_triton import LibraryLinear, TritonLinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# float32: sums in another order. bfloat16: one rounding, in the interpreter a cut.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE)


@pytest.mark.parametrize("product", [TritonLinear, LibraryLinear])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_linear_equals_the_plain_one_with_what_follows(
    activation: Activation | None,
    dtype: torch.dtype,
    product: type[TritonLinear] | type[LibraryLinear],
) -> None:
    torch.manual_seed(0)
    x, weight, bias, residual = (
        t.to(dtype) for t in (random(5, 48), random(70, 48) / 7, random(70), random(5, 70))
    )

    y = product(weight, bias, activation=activation)(x, residual)

    expected = F.linear(x.float(), weight.float(), bias.float())
    if activation is not None:
        expected = ACTIVATIONS[activation](expected)
    expected = expected + residual.float()
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("num_out", [1, 1024, 1100, 8200])
@pytest.mark.parametrize(("num_rows", "num_in"), [(1, 16), (3, 100), (67, 64)])
def test_linear_takes_any_shape(num_rows: int, num_in: int, num_out: int) -> None:
    torch.manual_seed(0)
    x, weight = random(num_rows, num_in), random(num_out, num_in) / num_in**0.5

    y = TritonLinear(weight, None)(x)

    torch.testing.assert_close(y, F.linear(x, weight), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("product", [TritonLinear, LibraryLinear])
def test_linear_gives_logits_in_float32_from_weights_in_bfloat16(
    product: type[TritonLinear] | type[LibraryLinear],
) -> None:
    torch.manual_seed(0)
    x, weight = random(3, 48).bfloat16(), random(90, 48).bfloat16()

    logits = product(weight, None, out_dtype=torch.float32)(x)

    expected = F.linear(x.float(), weight.float())
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)


def test_linear_lets_no_broken_row_pass_for_a_good_one() -> None:
    torch.manual_seed(0)
    x = random(3, 32)
    x[1, 5] = torch.nan

    y = TritonLinear(random(20, 32), None, activation="relu")(x)

    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="numpy's products promise no such thing")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_a_product_has_the_same_bytes_at_every_row_count(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = random(256, 768).to(dtype), random(2304, 768).to(dtype)
    linear = TritonLinear(weight, None)
    together = linear(x)

    for count in (1, 2, 3, 15, 16, 17, 63, 64, 65, 128):
        assert torch.equal(linear(x[:count]), together[:count])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_layer_norm_equals_torch_s(has_bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(48, eps=1e-5, bias=has_bias).to(DEVICE)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=1.0)
    x = (random(4, 48) * 3 + 5).to(dtype)

    y = TritonLayerNorm(norm.to(dtype))(x)

    expected = norm.float()(x.float())
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("same_bytes", [True, False])
def test_a_fused_model_equals_the_plain_one(
    activation: Activation, bias: bool, same_bytes: bool
) -> None:
    config = GPTConfig(
        n_layer=2, n_head=2, n_embd=32, n_ctx=16, vocab_size=97, activation=activation, bias=bias
    )
    plain = tiny_gpt(config).to(DEVICE)
    fused = copy.deepcopy(plain)
    head = fuse(fused, 95, same_bytes=same_bytes)
    tokens = random_tokens(config, 7).to(DEVICE)
    positions = torch.arange(7, device=DEVICE)
    attend = CausalAttention(config)

    with torch.inference_mode():
        logits = head(fused(tokens, positions, attend))

        expected = plain.logits(plain(tokens, positions, attend))[:, :95]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_fused_model_in_bfloat16_is_no_further_off_than_the_plain_one() -> None:
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=16, vocab_size=97)
    exact = gpt_with_outliers(config).to(DEVICE)
    plain = copy.deepcopy(exact).bfloat16()
    fused = copy.deepcopy(plain)
    head = fuse(fused, 97)
    tokens = random_tokens(config, 7).to(DEVICE)
    positions = torch.arange(7, device=DEVICE)
    attend = CausalAttention(config)

    with torch.inference_mode():
        logits = head(fused(tokens, positions, attend))

        theirs = plain.logits(plain(tokens, positions, attend))
        expected = exact.logits(exact(tokens, positions, attend))
    # The interpreter cuts off where a GPU rounds: twice as far off each time, and always down.
    allowed = 1.5 if DEVICE == "cuda" else 4
    assert (logits - expected).abs().max() <= allowed * (theirs - expected).abs().max()
