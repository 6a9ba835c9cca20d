"""Packed products: equal to the plain ones, and the same bytes for a row in any company."""

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
import torch.nn.functional as F

from engine.config import EngineConfig
from engine.linear import Head, PackedLinear, PackedMLP, can_pack
from model.config import Activation, GPTConfig
from model.gpt import ACTIVATIONS, MLP

BUDGET = EngineConfig().step_tokens
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


# The products of GPT-2 124M and of the storyteller: every count of rows that a step can have, as
# the claim is. A product of n rows is compared whole, so each of its places is looked at as well.
SHAPES: list[tuple[int, int, Activation | None]] = [
    (768, 2304, None),  # c_attn
    (768, 768, None),  # c_proj
    (768, 3072, "gelu_new"),  # c_fc
    (3072, 768, None),  # c_proj of the MLP
    (256, 768, None),
    (256, 256, None),
    (256, 1024, "gelu_new"),
    (1024, 256, None),
]


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Where a product is cut depends on how many share it; who serves has more than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def differing_counts(
    product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, counts: Iterable[int]
) -> list[int]:
    """The counts n for which the last n rows of x do not come out as they do among all."""
    together = product(x)
    return [n for n in counts if not torch.equal(product(x[-n:]), together[-n:])]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_in", "num_out", "activation"), SHAPES)
def test_a_row_has_the_same_bytes_at_every_row_count_of_a_step(
    num_in: int, num_out: int, activation: Activation | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    packed, _, _ = make_linear(num_in, num_out, dtype, activation)
    x = torch.randn(BUDGET, num_in).to(dtype)

    assert differing_counts(packed, x, range(1, BUDGET)) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_in", "num_out", "activation"),
    [*SHAPES[::4], (100, 300, "gelu")],  # what goes into the cache; no whole vector registers
)
def test_one_thread_alone_gives_a_row_the_same_bytes_too(
    num_in: int, num_out: int, activation: Activation | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    packed, _, _ = make_linear(num_in, num_out, dtype, activation)
    x = torch.randn(BUDGET, num_in).to(dtype)

    assert differing_counts(packed, x, range(1, BUDGET)) == []


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("num_in", "vocab_size"), [(768, 50257), (256, 2048)])
def test_head_gives_a_row_the_same_bytes_at_every_row_count(num_in: int, vocab_size: int) -> None:
    torch.manual_seed(0)
    head = Head(torch.randn(vocab_size, num_in) * 0.02, vocab_size)
    hidden = torch.randn(BUDGET, num_in)
    # A step asks for a row a sequence; more, as scoring might, are sampled: the whole of it would
    # take a minute.
    most = EngineConfig().max_num_sequences
    counts = [*range(1, most + 1), *range(most + 1, BUDGET, 31)]

    assert differing_counts(head, hidden, counts) == []


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
