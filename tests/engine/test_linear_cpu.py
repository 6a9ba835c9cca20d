"""Our own products: equal to torch's, a row's bytes the same in any company, 8 bits enough."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.batch import NetworkOutput, Rows, Span
from engine.config import EngineConfig, LaunchConfig
from engine.kv_cache import KVCache
from engine.linear_cpu import FusedLinear
from engine.loading import load_engine
from engine.messages import TopLogprobs
from engine.network_cpu import FusedNetwork
from engine.sampling_params import SamplingParams
from engine.tile_cpu import BFLOAT16, arithmetic
from model.attention import CausalAttention
from model.config import Activation, GPTConfig
from model.gpt import ACTIVATIONS
from tests.tiny_models import gpt_with_outliers, tiny_config, tiny_gpt

BUDGET = EngineConfig().step_tokens
PRECISIONS = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
IDS = ["float32", "bfloat16", "int8"]
in_every_precision = pytest.mark.parametrize(("dtype", "quantizes"), PRECISIONS, ids=IDS)


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
# Without instructions for it, bfloat16 is that of the weights alone, and nothing is rounded.
ROUNDS_INPUTS = arithmetic(BFLOAT16).input_type != np.float32
TOLERANCE = {"float32": 1e-6, "bfloat16": 4e-3 if ROUNDS_INPUTS else 1e-6, "int8": 2e-2}


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
    config = GPTConfig(n_layer=1, n_head=2, n_embd=256, n_ctx=32, vocab_size=2048)
    network = fused_network(config, dtype, quantizes=quantizes, vocab_size=2048)
    x = torch.randn(BUDGET, 256)

    together = network.logits(x).clone()

    counts = range(1, BUDGET)
    assert [n for n in counts if not torch.equal(network.logits(x[-n:]), together[-n:])] == []


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


PROMPT = 20


def rows_of_a_prompt(first: int = 0, end: int = PROMPT) -> Rows:
    positions = np.arange(first, end)
    return Rows(
        tokens=positions % 10, positions=positions, row_sequences=np.zeros(end - first, np.int64),
        block_tables=np.array([[3, 1, 5, 2, 4]], np.int32), spans=(Span(0, first, end, PROMPT),),
    )  # fmt: skip


def fused_network(
    config: GPTConfig, dtype: torch.dtype, *, quantizes: bool, vocab_size: int = 10
) -> FusedNetwork:
    model = tiny_gpt(config).to(dtype).requires_grad_(False)
    cache = KVCache(config, num_blocks=6, block_size=4, dtype=dtype, device="cpu")
    return FusedNetwork(model, cache, vocab_size, quantizes=quantizes)


def copies(output: NetworkOutput) -> tuple[Tensor, Tensor]:
    """What a network computed, for longer than until its next call."""
    return output.hidden.clone(), output.logits.clone()


@in_every_precision
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_fused_network_equals_the_model(
    activation: Activation, bias: bool, dtype: torch.dtype, quantizes: bool
) -> None:
    config = GPTConfig(
        n_layer=3, n_head=2, n_embd=48, n_ctx=32, vocab_size=13, activation=activation, bias=bias
    )
    rows = rows_of_a_prompt()

    hidden, logits = copies(fused_network(config, dtype, quantizes=quantizes).run(rows))

    model = tiny_gpt(config).to(dtype).requires_grad_(False).double()
    tokens, positions = torch.from_numpy(rows.tokens), torch.from_numpy(rows.positions)
    norm, model.ln_f = model.ln_f, nn.Identity()  # type: ignore[assignment]
    expected = model(tokens[None], positions, CausalAttention(config))[0]
    limit = 4e-2 if quantizes else 1e-6 if dtype == torch.float32 else 1e-2
    assert relative_error(hidden, expected) < limit
    expected = norm(expected) @ model.wte.weight[:10].T
    assert logits.shape == (PROMPT, 10)
    assert relative_error(logits, expected) < limit


@in_every_precision
def test_logits_are_the_same_of_all_rows_of_some_and_of_hidden_states(
    dtype: torch.dtype, quantizes: bool
) -> None:
    config = GPTConfig(n_layer=2, n_head=2, n_embd=48, n_ctx=32, vocab_size=10)
    network, rows = fused_network(config, dtype, quantizes=quantizes), rows_of_a_prompt()
    hidden, logits = copies(network.run(rows))

    chosen = np.array([19, 3, 4, 0, 11])
    found, of_some, *_ = network.run(rows, chosen)
    assert torch.equal(found, hidden)
    assert torch.equal(of_some, logits[chosen])
    assert torch.equal(network.logits(found[6:13]), logits[6:13])
    assert network.run(rows, chosen[:0]).logits.shape == (0, 10)


@in_every_precision
def test_the_best_tokens_are_the_first_of_the_highest_logits(
    dtype: torch.dtype, quantizes: bool
) -> None:
    config = GPTConfig(n_layer=2, n_head=2, n_embd=48, n_ctx=32, vocab_size=200)
    model = tiny_gpt(config).to(dtype).requires_grad_(False)
    model.wte.weight[100:] = model.wte.weight[:100]  # each logit twice
    model.wpe.weight[7] = math.nan
    cache = KVCache(config, num_blocks=6, block_size=4, dtype=dtype, device="cpu")
    network = FusedNetwork(model, cache, 200, quantizes=quantizes)

    output = network.run(rows_of_a_prompt(), np.arange(5, 9), wants_best=True)

    assert output.best is not None
    assert output.is_finite is not None
    assert output.is_finite.tolist() == [True, True, False, False]  # later rows see the seventh
    assert output.best[:2].tolist() == output.logits[:2, :100].argmax(1).tolist()
    assert output.best[2:].tolist() == [0, 0]


@in_every_precision
def test_a_prompt_in_chunks_gives_the_same_bytes(dtype: torch.dtype, quantizes: bool) -> None:
    config = GPTConfig(n_layer=2, n_head=2, n_embd=48, n_ctx=32, vocab_size=10)
    whole = copies(fused_network(config, dtype, quantizes=quantizes).run(rows_of_a_prompt()))
    network = fused_network(config, dtype, quantizes=quantizes)

    for first, end in ((0, 1), (1, 10), (10, 19), (19, 20)):
        found = copies(network.run(rows_of_a_prompt(first, end)))
        for ours, expected in zip(found, whole, strict=True):
            assert torch.equal(ours, expected[first:end])


@in_every_precision
def test_several_threads_give_what_one_gives(dtype: torch.dtype, quantizes: bool) -> None:
    # Of a width and a head size that no vector, no pair and no four of inputs fits.
    config = GPTConfig(n_layer=3, n_head=3, n_embd=99, n_ctx=32, vocab_size=10)
    network, rows = fused_network(config, dtype, quantizes=quantizes), rows_of_a_prompt()
    alone = copies(network.run(rows))
    before = torch.get_num_threads()

    found = []
    for num_threads in (2, 3) * 20:
        torch.set_num_threads(num_threads)
        found.append(copies(network.run(rows)))
    torch.set_num_threads(before)

    assert all(values.isfinite().all() for values in alone)
    assert all(torch.equal(*pair) for values in found for pair in zip(values, alone, strict=True))


def test_eight_bits_bear_an_offset_and_loud_channels() -> None:
    config = tiny_config(n_ctx=64)
    model = gpt_with_outliers(config).bfloat16().requires_grad_(False)
    hidden, norm = model.wte.weight[:40].float(), copy.deepcopy(model.ln_f).double()
    cache = KVCache(config, num_blocks=6, block_size=4, dtype=torch.bfloat16, device="cpu")

    logits = FusedNetwork(model, cache, 270, quantizes=True).logits(hidden)

    expected = norm(hidden.double()) @ model.wte.weight[:270].double().T
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
    # In a mean errors cancel. Token by token 8 bits are off by 0.018 here, 6 bits by 0.044.
    off = [abs(a.logprob - b.logprob) for a, b in zip(exact, rounded, strict=True)]
    assert sum(off) / len(off) < 0.03
    agree = sum(a.token_ids[0] == b.token_ids[0] for a, b in zip(exact, rounded, strict=True))
    assert agree > 0.93 * len(exact)
