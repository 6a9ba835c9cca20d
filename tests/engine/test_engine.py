"""What the engine computes, against decoding without a cache; what it refuses, and what it ends."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention import PagedAttention
from engine.batch import ModelInput
from engine.errors import CacheTooSmall, PromptTooLong, TokenOutOfRange
from engine.kv_cache import KVCache
from engine.messages import Abort, Choice, Submit, TopLogprobs
from engine.sampling_params import SamplingParams
from model.attention import CausalAttention
from model.config import GPTConfig
from model.generate import generate
from model.gpt import GPT
from tests.engine.engines import (
    CONFIG,
    PRECISIONS,
    Request,
    Result,
    make_engine,
    random_prompt,
    run,
    sampled,
)
from tests.tiny_models import gpt_with_outliers, tiny_config, tiny_gpt
from weights.checkpoint import load_layout
from weights.layout import read_layout


@pytest.mark.parametrize("attention", [None, PagedAttention])
@pytest.mark.parametrize("seed", range(5))
def test_greedy_decoding_equals_decoding_without_a_cache(seed: int, attention: object) -> None:
    model = tiny_gpt(CONFIG, seed=seed)
    prompts = [random_prompt(length, seed=seed + length) for length in (1, 7, 30)]
    params = SamplingParams(max_tokens=30, temperature=0)

    results = run(
        make_engine(model, attention=attention), [Request(prompt, params) for prompt in prompts]
    )

    expected = [list(generate(model, prompt, 30, vocab_size=95)) for prompt in prompts]
    assert [result[0].token_ids for result in results] == expected


def reference_logprobs(model: GPT, tokens: list[int], vocab_size: int) -> Tensor:
    """Compute log p(next token | tokens so far) over the known ids, (T, V), in float64."""
    model = copy.deepcopy(model).double()
    x = torch.tensor(tokens)
    hidden = model(x, torch.arange(len(tokens)), CausalAttention(model.config))
    logits = hidden @ model.wte.weight.T
    logprobs: Tensor = logits[:, :vocab_size].log_softmax(-1)
    return logprobs


def test_logprobs_equal_those_of_the_model_in_float64() -> None:
    model = tiny_gpt(CONFIG)
    prompt = random_prompt(11, seed=1)

    ((result,),) = run(
        make_engine(model), [Request(prompt, sampled(20, prompt_logprobs=4, seed=5))]
    )

    with torch.no_grad():
        expected = reference_logprobs(model, prompt + result.token_ids, 95)
    assert len(result.prompt_logprobs) == len(prompt) - 1
    assert len(result.logprobs) == len(result.token_ids) == 20
    tokens = prompt[1:] + result.token_ids
    for place, (token, found) in enumerate(
        zip(tokens, result.prompt_logprobs + result.logprobs, strict=True)
    ):
        k = 4 if place < len(prompt) - 1 else 3
        top = expected[place].topk(k)
        assert found.logprob == pytest.approx(float(expected[place, token]), abs=1e-4)
        assert found.token_ids == top.indices.tolist()
        assert found.logprobs == pytest.approx(top.values.tolist(), abs=1e-4)


def test_tokens_of_the_engine_are_distributed_as_the_model_in_float64_says() -> None:
    num_choices = 2000
    model = tiny_gpt(CONFIG)
    prompt = random_prompt(9, seed=4)
    params = SamplingParams(max_tokens=2, temperature=1.5, seed=11, ignore_eos=True)
    engine = make_engine(model, max_num_sequences=64)

    (results,) = run(engine, [Request(prompt, params, num_choices=num_choices)])

    with torch.no_grad():
        logits = reference_logprobs(model, prompt, 95)[-1] / params.temperature
    expected = num_choices * logits.softmax(-1)
    counts = torch.tensor([result.token_ids[0] for result in results]).bincount(minlength=95)
    # Tokens expected less than ten times share a bin.
    common = expected >= 10
    hoped = torch.cat((expected[common], expected[~common].sum()[None]))
    observed = torch.cat((counts[common], counts[~common].sum()[None]))
    chi_square = float(((observed - hoped) ** 2 / hoped).sum())
    degrees = len(hoped) - 1
    assert degrees > 10
    assert chi_square < degrees + 4.5 * (2 * degrees) ** 0.5


# Rounded logits around -100 would be off by a quarter on average; bfloat16 hidden states, with
# three loud channels in them, by less than that. 8 bits, whose range these channels would take up
# if they were left in the inputs, by little more.
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        (PRECISIONS["float32"], 1e-3),
        (PRECISIONS["bfloat16"], 0.05),
        (PRECISIONS["int8"], 0.15),
        (PRECISIONS["int8, cache int8"], 0.15),
        # As on CUDA, whose cache is read by other code and holds the same.
        (
            {
                "dtype": torch.bfloat16, "kv_cache_dtype": torch.float8_e4m3fn,
                "attention": PagedAttention,
            },
            0.15,
        ),
    ],
    ids=["float32", "bfloat16", "int8", "int8, cache int8", "bfloat16, cache float8"],
)  # fmt: skip
def test_outliers_and_an_offset_do_not_decide_the_draw(
    settings: dict[str, Any], tolerance: float
) -> None:
    model = gpt_with_outliers(tiny_config(n_ctx=64))
    prompt = random_prompt(9, seed=3, vocab_size=270)
    engine = make_engine(model, **settings, vocab_size=270)

    ((result,),) = run(engine, [Request(prompt, sampled(12, prompt_logprobs=0))])

    with torch.no_grad():
        reference = copy.deepcopy(model).to(settings.get("dtype", torch.float32)).float()
        expected = reference_logprobs(reference, prompt + result.token_ids, 270)
    tokens = prompt[1:] + result.token_ids
    found = [t.logprob for t in result.prompt_logprobs + result.logprobs]
    wanted = [float(expected[place, token]) for place, token in enumerate(tokens)]
    assert found == pytest.approx(wanted, abs=tolerance)


def test_padded_ids_are_never_drawn() -> None:
    model = tiny_gpt(CONFIG)
    with torch.no_grad():
        model.wte.weight[95:] = 5 * model.wte.weight[:2]  # the padding would like to win
        model.wte.weight[95:] += model.ln_f.bias

    results = run(make_engine(model), [Request([1], sampled(40, seed=seed)) for seed in range(10)])

    assert max(max(result[0].token_ids) for result in results) < 95
    assert all(max(t.token_ids) < 95 for r in results for t in r[0].logprobs)


def test_decoding_ends_at_the_context() -> None:
    prompt = random_prompt(60, seed=2)

    ((result,),) = run(make_engine(), [Request(prompt, sampled(40))])

    assert len(result.token_ids) == 4
    assert result.finish_reason == "length"


def test_eos_stops_and_ignored_eos_does_not() -> None:
    prompt = random_prompt(5, seed=2)
    ((free,),) = run(make_engine(), [Request(prompt, sampled(30, seed=4))])
    eos = free.token_ids[7]
    first = free.token_ids.index(eos)

    ((stopped,),) = run(make_engine(eos_token_ids=(eos,)), [Request(prompt, sampled(30, seed=4))])
    ((ignored,),) = run(
        make_engine(eos_token_ids=(eos,)),
        [Request(prompt, sampled(30, seed=4, ignore_eos=True))],
    )

    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.finish_reason == "stop"
    assert ignored.token_ids == free.token_ids


def test_an_aborted_request_frees_its_blocks_and_the_others_do_not_notice() -> None:
    engine = make_engine()
    prompts = [random_prompt(9, seed=1), random_prompt(30, seed=2)]
    expected = run(make_engine(), [Request(prompts[0], sampled(20))])
    for index, prompt in enumerate(prompts):
        engine.add(
            Submit(
                request_id=f"request-{index}",
                prompt_ids=prompt,
                choices=[Choice(seq_id=index, index=0)],
                params=sampled(20),
            )
        )
    kept = Result()

    for step in range(20):
        if step == 3:
            engine.abort(Abort(request_id="request-1"))
        output = engine.step()
        assert output is not None
        for token in output.outputs:
            if token.seq_id == 0:
                kept.add(token)
            else:
                assert step < 3

    assert kept.drawn == expected[0][0].drawn
    assert output is not None
    assert output.stats.num_used_blocks == 0
    assert engine.step() is None


def test_requests_beyond_the_model_are_refused() -> None:
    engine = make_engine()

    with pytest.raises(PromptTooLong, match="65 tokens; this model's context is 64"):
        run(engine, [Request([1] * 65, sampled(1))])
    with pytest.raises(TokenOutOfRange, match="token id 95; this model's ids go from 0 to 94"):
        run(engine, [Request([95], sampled(1))])
    with pytest.raises(TokenOutOfRange, match="logit_bias"):
        run(engine, [Request([1], sampled(1, logit_bias={-1: 1.0}))])


def test_a_cache_smaller_than_a_context_is_refused() -> None:
    with pytest.raises(CacheTooSmall, match="at least 17"):
        make_engine(num_blocks=16)


def test_warming_up_runs_a_prompt_beside_a_row_that_decodes_and_leaves_nothing() -> None:
    kinds: list[set[bool]] = []

    class Watched(PagedAttention):
        """Notes of each step whether it has rows of prompts, and rows past them."""

        def __init__(self, config: GPTConfig, cache: KVCache, batch: ModelInput) -> None:
            super().__init__(config, cache, batch)
            kinds.append({span.start < span.num_prompt_tokens for span in batch.spans} or {False})

    engine = make_engine(attention=Watched)

    engine.warm_up()

    assert {True, False} in kinds, "its kernels are compiled before anyone waits for them"
    assert {False} in kinds
    assert engine.is_idle
    stats = engine.counts().stats
    assert (stats.num_prefix_query_tokens, stats.num_prefix_hit_tokens) == (0, 0)


def test_a_cache_of_8_bits_predicts_the_storyteller_s_text_as_well() -> None:
    layout = read_layout(Path(__file__).parents[2] / "weights" / "storyteller")
    model = load_layout(layout, device=torch.device("cpu"), dtype=torch.float32)
    text = random_prompt(1, seed=3)
    writer = make_engine(model, vocab_size=layout.config.vocab_size, num_blocks=300)
    drawn = writer.generate(text, SamplingParams(max_tokens=250, temperature=0.8, seed=2))
    text += [output.token_id for _, output in drawn if output.token_id is not None]

    def score(kv_cache_dtype: torch.dtype) -> list[TopLogprobs]:
        engine = make_engine(
            model,
            vocab_size=layout.config.vocab_size,
            num_blocks=300,
            attention=PagedAttention,
            kv_cache_dtype=kv_cache_dtype,
        )
        request = Request(text, SamplingParams(max_tokens=1, prompt_logprobs=1))
        return run(engine, [request])[0][0].prompt_logprobs

    exact, rounded = score(torch.float32), score(torch.float8_e4m3fn)

    loss, found = (-sum(one.logprob for one in some) / len(some) for some in (exact, rounded))
    assert math.exp(abs(found - loss)) < 1.01  # perplexity within a percent
    agree = sum(a.token_ids[0] == b.token_ids[0] for a, b in zip(exact, rounded, strict=True))
    assert agree > 0.9 * len(exact)
    assert found != loss
