"""Our own products: equal to torch's, a row's bytes the same in any company, 8 bits enough."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine.attention_cpu import CPUPagedAttention
from engine.batch import ModelInput
from engine.config import EngineConfig, LaunchConfig
from engine.kv_cache import KVCache
from engine.layers_avx512 import FusedLayers
from engine.linear import Head, can_fuse
from engine.linear_avx512 import FusedLinear
from engine.loading import load_engine
from engine.messages import TopLogprobs
from engine.sampling_params import SamplingParams
from model.attention import CausalAttention
from model.config import Activation, GPTConfig
from model.gpt import ACTIVATIONS
from tests.tiny_models import gpt_with_outliers, tiny_config, tiny_gpt

BUDGET = EngineConfig().step_tokens
CPU = torch.device("cpu")
PRECISIONS = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
IDS = ["float32", "bfloat16", "int8"]
in_every_precision = pytest.mark.parametrize(("dtype", "quantizes"), PRECISIONS, ids=IDS)

pytestmark = pytest.mark.skipif(
    not all(can_fuse(CPU, dtype, quantizes=quantizes) for dtype, quantizes in PRECISIONS),
    reason="this processor has no AVX-512 with bfloat16 and VNNI",
)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Where a product is cut depends on how many share it; who serves has more than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def layer_norm(size: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(size)
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias, 0, 0.3)
    return norm.requires_grad_(False)


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


# Of a product's root mean square: the order of sums; a rounding or two of inputs and output (2^-9
# each at most); steps of a 255th of a row's range, and of a 127th of an output's largest weight.
TOLERANCE = {"float32": 1e-6, "bfloat16": 4e-3, "int8": 2e-2}


@in_every_precision
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("surroundings", ["none", "bias", "norm", "residual", "all"])
@pytest.mark.parametrize(("num_rows", "num_in", "num_out"), [(9, 96, 100), (70, 33, 48), (1, 3, 7)])
def test_fused_product_equals_its_parts(
    num_rows: int, num_in: int, num_out: int, surroundings: str, activation: Activation | None,
    dtype: torch.dtype, quantizes: bool,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    weight = (torch.randn(num_out, num_in) * num_in**-0.5).to(dtype)
    x = torch.randn(num_rows, num_in).to(dtype)
    has = {"bias", "norm", "residual"} if surroundings == "all" else {surroundings}
    bias = torch.randn(num_out).to(dtype) if "bias" in has else None
    norm = layer_norm(num_in) if "norm" in has else None
    residual = torch.randn(num_rows, num_out).to(dtype) if "residual" in has else None

    fused = FusedLinear(weight, bias, norm=norm, activation=activation, quantizes=quantizes)
    y = fused(x, residual)

    expected = x.double() if norm is None else copy.deepcopy(norm).double()(x.double())
    expected = expected @ weight.double().T
    if bias is not None:
        expected += bias.double()
    if activation is not None:
        expected = ACTIVATIONS[activation](expected)
    if residual is not None:
        expected += residual.double()
    assert y.dtype == torch.float32
    assert y.shape == (num_rows, num_out)
    name = IDS[PRECISIONS.index((dtype, quantizes))]
    assert relative_error(y, expected) < TOLERANCE[name] * (2 if num_in == 3 else 1)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_activations_keep_their_precision_far_out(activation: Activation) -> None:
    x = torch.cat((torch.linspace(-30, 30, 4001), torch.tensor([-1e30, 1e30, 0.0])))[:, None]

    y = FusedLinear(torch.ones(1, 1), activation=activation)(x)

    expected = ACTIVATIONS[activation](x.double())
    torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=5e-7)


# The products of GPT-2 124M and of the storyteller, each at every count of rows a step can have.
SHAPES: list[tuple[int, int, Activation | None]] = [
    (768, 2304, None), (768, 768, None), (768, 3072, "gelu_new"), (3072, 768, None),
    (256, 768, None), (256, 256, None), (256, 1024, "gelu_new"), (1024, 256, None),
]  # fmt: skip


@pytest.mark.usefixtures("two_threads")
@in_every_precision
@pytest.mark.parametrize(("num_in", "num_out", "activation"), SHAPES)
def test_a_row_has_the_same_bytes_at_every_row_count_of_a_step(
    num_in: int, num_out: int, activation: Activation | None, dtype: torch.dtype, quantizes: bool
) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(num_out, num_in) * num_in**-0.5).to(dtype)
    product = FusedLinear(
        weight, torch.randn(num_out), norm=layer_norm(num_in), activation=activation,
        quantizes=quantizes,
    )  # fmt: skip
    x = torch.randn(BUDGET, num_in).to(dtype)

    together = product(x)

    counts = range(1, BUDGET)
    assert [n for n in counts if not torch.equal(product(x[-n:]), together[-n:])] == []


@pytest.mark.usefixtures("two_threads")
@in_every_precision
def test_a_row_of_the_head_has_the_same_bytes_at_every_row_count(
    dtype: torch.dtype, quantizes: bool
) -> None:
    torch.manual_seed(0)
    head = Head((torch.randn(2048, 256) * 0.02).to(dtype), 2048, quantizes=quantizes)
    x = torch.randn(BUDGET, 256).to(dtype)

    together = head(x)

    counts = range(1, BUDGET)
    assert [n for n in counts if not torch.equal(head(x[-n:]), together[-n:])] == []


@in_every_precision
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_so_and_alone(
    value: float, dtype: torch.dtype, quantizes: bool
) -> None:
    torch.manual_seed(0)
    fused = FusedLinear(torch.randn(50, 20).to(dtype), norm=layer_norm(20), quantizes=quantizes)
    x = torch.randn(11, 20).to(dtype)
    expected = fused(x)
    x[4, 7] = value

    y = fused(x)

    assert not y[4].isfinite().any()
    others = [row for row in range(11) if row != 4]
    assert torch.equal(y[others], expected[others])


def prompt_of_20() -> ModelInput:
    positions = torch.arange(20)
    tables = torch.tensor([[3, 1, 5, 2, 4]], dtype=torch.int32)
    return ModelInput(
        tokens=positions % 10, positions=positions,
        row_sequences=torch.zeros(20, dtype=torch.int64), block_tables=tables,
        slot_blocks=tables[0, positions // 4].long(), slot_offsets=positions % 4,
    )  # fmt: skip


def attention(config: GPTConfig, dtype: torch.dtype, batch: ModelInput) -> CPUPagedAttention:
    cache = KVCache(config, num_blocks=6, block_size=4, dtype=dtype, device="cpu")
    return CPUPagedAttention(config, cache, batch)


@in_every_precision
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_fused_layers_equal_the_model_s(
    activation: Activation, bias: bool, dtype: torch.dtype, quantizes: bool
) -> None:
    config = GPTConfig(
        n_layer=3, n_head=2, n_embd=48, n_ctx=32, vocab_size=10, activation=activation, bias=bias
    )
    model = tiny_gpt(config).to(dtype).requires_grad_(False)
    batch = prompt_of_20()
    x = model.wte(batch.tokens) + model.wpe(batch.positions)

    fused = FusedLayers(copy.deepcopy(model), quantizes=quantizes)
    y = fused(x, attention(config, dtype, batch))

    model.double()
    expected, attend = x.double()[None], CausalAttention(config)
    for block in model.h:
        expected = block(expected, attend)
    limit = 4e-2 if quantizes else 1e-6 if dtype == torch.float32 else 1e-2
    assert relative_error(y, expected[0]) < limit


@in_every_precision
def test_several_threads_give_what_one_gives(dtype: torch.dtype, quantizes: bool) -> None:
    # Of a width and a head size that no vector, no pair and no four of inputs fits.
    config = GPTConfig(n_layer=3, n_head=3, n_embd=99, n_ctx=32, vocab_size=10)
    model = tiny_gpt(config).to(dtype).requires_grad_(False)
    layers, batch = FusedLayers(model, quantizes=quantizes), prompt_of_20()
    x = model.wte(batch.tokens) + model.wpe(batch.positions)
    alone = layers(x, attention(config, dtype, batch))
    before = torch.get_num_threads()

    found = []
    for num_threads in (2, 3) * 20:
        torch.set_num_threads(num_threads)
        found.append(layers(x, attention(config, dtype, batch)))
    torch.set_num_threads(before)

    assert alone.isfinite().all()
    assert all(torch.equal(y, alone) for y in found)


def test_eight_bits_bear_an_offset_and_loud_channels() -> None:
    model = gpt_with_outliers(tiny_config(n_ctx=64))
    x = model.wte.weight[:40].detach().bfloat16()
    norm = model.ln_f.requires_grad_(False)
    weight = model.wte.weight.detach().bfloat16()

    logits = Head(weight, 270, norm=norm, quantizes=True)(x)

    expected = copy.deepcopy(norm).double()(x.double()) @ weight[:270].double().T
    assert expected.mean() < -50
    centred = expected - expected.mean(-1, keepdim=True)
    error = logits.double() - logits.double().mean(-1, keepdim=True) - centred
    assert float(error.norm() / centred.norm()) < 2e-2


def test_eight_bits_predict_the_storyteller_s_text_as_well() -> None:
    storyteller = str(Path(__file__).parents[2] / "weights" / "storyteller")
    settings = EngineConfig(max_num_sequences=4, share_completion_blocks=True)

    def scores(dtype: str, texts: list[list[int]]) -> tuple[list[list[int]], list[TopLogprobs]]:
        """Each text continued to 400 tokens, and what the model says of those given."""
        engine, _ = load_engine(LaunchConfig(model=storyteller, dtype=dtype, engine=settings))
        found: list[TopLogprobs] = []
        continued = []
        for seed, text in enumerate(texts):
            length = max(1, 400 - len(text))
            params = SamplingParams(
                max_tokens=length, ignore_eos=True, prompt_logprobs=1, seed=seed, temperature=0.8
            )
            drawn = []
            for _, output in engine.generate(text, params):
                found += output.prompt_logprobs or []
                drawn.append(output.token_id)
            continued.append([*text, *(token for token in drawn if token is not None)])
        return continued, found

    texts, _ = scores("float32", [[0, 5], [0, 900]])
    _, exact = scores("float32", texts)
    _, rounded = scores("int8", texts)

    assert len(exact) == len(rounded) == 2 * 399
    loss, found = (-sum(one.logprob for one in some) / len(some) for some in (exact, rounded))
    assert math.exp(abs(found - loss)) < 1.005  # perplexity within half a percent
    agree = sum(a.token_ids[0] == b.token_ids[0] for a, b in zip(exact, rounded, strict=True))
    assert agree > 0.93 * len(exact)
