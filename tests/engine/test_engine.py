"""The engine against decoding without a cache, and against itself under every disturbance."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention import PagedAttention
from engine.batch import ModelInput
from engine.errors import CacheTooSmall, DoesNotFit, PromptTooLong, TokenOutOfRange
from engine.kv_cache import KVCache
from engine.messages import Abort, Choice, Submit, TopLogprobs
from engine.sampling_params import SamplingParams
from model.attention import CausalAttention
from model.config import GPTConfig
from model.generate import generate
from model.gpt import GPT
from tests.engine.engines import CONFIG, Request, Result, make_engine, random_prompt, run
from tests.tiny_models import gpt_with_outliers, tiny_config, tiny_gpt
from weights.checkpoint import load_layout
from weights.layout import read_layout

DTYPES = [torch.float32, torch.bfloat16]


def sampled(max_tokens: int, **options: Any) -> SamplingParams:
    """Params whose results show every bit: draws at a high temperature, and logprobs."""
    return SamplingParams(**{"temperature": 2.0, "logprobs": 3, **options}, max_tokens=max_tokens)


def workload() -> list[Request]:
    """A dozen requests of all lengths, some with a common beginning."""
    common = random_prompt(21, seed=100)
    prompts = [random_prompt(length, seed=length) for length in (1, 2, 3, 8, 17, 40)]
    prompts += [common + random_prompt(length, seed=50 + length) for length in (1, 5, 9)]
    prompts += [common[:12] + random_prompt(20, seed=77), common, common]
    return [
        Request(prompt, sampled(10 + 3 * index % 14, seed=index))
        for index, prompt in enumerate(prompts)
    ]


def alone(requests: list[Request], *, dtype: torch.dtype) -> list[Result]:
    """Each request by itself in an engine of its own, the prompt in one piece."""
    engine_of_its_own = [
        run(make_engine(dtype=dtype, enable_prefix_cache=False), [request]) for request in requests
    ]
    return [results[0][0] for results in engine_of_its_own]


@pytest.fixture(scope="module", params=DTYPES, ids=["float32", "bfloat16"])
def undisturbed(request: pytest.FixtureRequest) -> tuple[torch.dtype, list[Result]]:
    return request.param, alone(workload(), dtype=request.param)


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


@pytest.mark.parametrize("has_onednn", [True, False])
def test_processors_without_our_kernels_decode_the_same(
    monkeypatch: pytest.MonkeyPatch, has_onednn: bool
) -> None:
    monkeypatch.setattr("engine.linear.has_avx512", lambda kind: False)
    if not has_onednn:
        monkeypatch.setattr("engine.linear.can_pack", lambda device, dtype: False)
    model = gpt_with_outliers(CONFIG)
    prompts = [random_prompt(length, seed=length) for length in (1, 7, 30)]
    params = SamplingParams(max_tokens=30, temperature=0)

    results = run(make_engine(model), [Request(prompt, params) for prompt in prompts])

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


@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers_and_an_offset_do_not_decide_the_draw(dtype: torch.dtype) -> None:
    model = gpt_with_outliers(tiny_config(n_ctx=64))
    prompt = random_prompt(9, seed=3, vocab_size=270)
    engine = make_engine(model, dtype=dtype, vocab_size=270)

    ((result,),) = run(engine, [Request(prompt, sampled(12, prompt_logprobs=0))])

    with torch.no_grad():
        reference = copy.deepcopy(model).to(dtype).float()
        expected = reference_logprobs(reference, prompt + result.token_ids, 270)
    tokens = prompt[1:] + result.token_ids
    found = [t.logprob for t in result.prompt_logprobs + result.logprobs]
    wanted = [float(expected[place, token]) for place, token in enumerate(tokens)]
    # Rounded logits around -100 would be off by a quarter on average; bfloat16 hidden states,
    # with three loud channels in them, by less than that.
    assert found == pytest.approx(wanted, abs=1e-3 if dtype == torch.float32 else 0.2)


def test_batched_equals_alone(undisturbed: tuple[torch.dtype, list[Result]]) -> None:
    dtype, expected = undisturbed

    results = run(make_engine(dtype=dtype, enable_prefix_cache=False), workload())

    assert [r[0].drawn for r in results] == [r.drawn for r in expected]


@pytest.mark.parametrize("budget", [16, 17, 23, 50, 128])
def test_any_chunking_equals_one_piece(
    undisturbed: tuple[torch.dtype, list[Result]], budget: int
) -> None:
    dtype, expected = undisturbed

    results = run(make_engine(dtype=dtype, max_num_scheduled_tokens=budget), workload())

    assert [r[0].drawn for r in results] == [r.drawn for r in expected]


@pytest.mark.parametrize("dtype", DTYPES)
def test_prompts_of_all_sorts_of_lengths_end_as_the_longest_says(
    dtype: torch.dtype,
) -> None:
    """Layers of the storyteller's width: the last row needs all K and V of the second.

    Products and attention are looked at for every count by themselves; this is what lies between.
    """
    config = tiny_config(n_layer=2, n_head=4, n_embd=256, n_ctx=512, vocab_size=300)
    engine = make_engine(
        tiny_gpt(config),
        dtype=dtype,
        vocab_size=300,
        block_size=16,
        max_num_scheduled_tokens=512,
        enable_prefix_cache=False,
    )
    prompt = random_prompt(512, seed=9, vocab_size=300)
    scored = SamplingParams(max_tokens=0, prompt_logprobs=5)
    ((whole,),) = run(engine, [Request(prompt, scored)])
    drawn = SamplingParams(max_tokens=1, temperature=0, logprobs=5)

    different = []
    for length in [1, 2, 3, *range(4, 512, 9)]:
        ((result,),) = run(engine, [Request(prompt[:length], drawn)])
        found, expected = result.logprobs[0], whole.prompt_logprobs[length - 1]
        if (found.token_ids, found.logprobs) != (expected.token_ids, expected.logprobs):
            different.append(length)

    assert different == []


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_any_block_size_gives_the_same(
    undisturbed: tuple[torch.dtype, list[Result]], block_size: int
) -> None:
    dtype, expected = undisturbed

    results = run(make_engine(dtype=dtype, block_size=block_size, num_blocks=900), workload())

    assert [r[0].drawn for r in results] == [r.drawn for r in expected]


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_arrival_gives_the_same(
    undisturbed: tuple[torch.dtype, list[Result]], seed: int
) -> None:
    dtype, expected = undisturbed
    arrivals = torch.randint(30, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
    requests = [
        Request(request.prompt_ids, request.params, arrives=arrives)
        for request, arrives in zip(workload(), arrivals, strict=True)
    ]

    results = run(make_engine(dtype=dtype), requests)

    assert [r[0].drawn for r in results] == [r.drawn for r in expected]


def test_preempted_equals_undisturbed(undisturbed: tuple[torch.dtype, list[Result]]) -> None:
    dtype, expected = undisturbed

    results = run(make_engine(dtype=dtype, num_blocks=26), workload())

    assert sum(r[0].num_preemptions for r in results) > 0
    assert [r[0].drawn for r in results] == [r.drawn for r in expected]


def test_memory_got_while_idle_disturbs_nothing_that_is_kept() -> None:
    prompt = random_prompt(30, seed=4)
    request = Request(prompt, SamplingParams(max_tokens=9, seed=2, ignore_eos=True))
    engine = make_engine()
    first = run(engine, [request])[0][0]

    assert engine.prepare_memory()
    while engine.prepare_memory():
        pass

    second = run(engine, [Request([1], request.params), request])[1][0]  # under another id
    assert second.num_cached_tokens == 28
    assert second.drawn == first.drawn


def test_a_prefix_hit_equals_undisturbed(undisturbed: tuple[torch.dtype, list[Result]]) -> None:
    dtype, expected = undisturbed
    engine = make_engine(dtype=dtype)

    run(engine, workload())
    results = run(engine, workload())

    assert sum(r[0].num_cached_tokens for r in results) > 80
    assert [r[0].drawn for r in results] == [r.drawn for r in expected]


@pytest.mark.parametrize("num_delivered", [1, 4, 9])
def test_a_resubmitted_request_continues_as_it_would_have(
    undisturbed: tuple[torch.dtype, list[Result]], num_delivered: int
) -> None:
    dtype, expected = undisturbed
    requests = [
        Request(request.prompt_ids, request.params, completion_ids=result.token_ids[:num_delivered])
        for request, result in zip(workload(), expected, strict=True)
    ]

    results = run(make_engine(dtype=dtype), requests)

    for (result,), whole in zip(results, expected, strict=True):
        assert result.token_ids == whole.token_ids[num_delivered:]
        assert result.logprobs == whole.logprobs[num_delivered:]
        assert result.finish_reason == whole.finish_reason


@pytest.mark.parametrize("dtype", DTYPES)
def test_choices_differ_and_each_equals_itself_alone(dtype: torch.dtype) -> None:
    prompt = random_prompt(30, seed=8)

    (together,) = run(make_engine(dtype=dtype), [Request(prompt, sampled(12), num_choices=5)])

    assert len({tuple(result.token_ids) for result in together}) == 5
    first = run(make_engine(dtype=dtype), [Request(prompt, sampled(12))])
    assert first[0][0].drawn == together[0].drawn
    assert sum(result.num_cached_tokens for result in together) == 0  # siblings do not count


def test_echoing_a_cached_prompt_scores_it_all_the_same() -> None:
    engine = make_engine()
    prompt = random_prompt(40, seed=6)
    request = Request(prompt, SamplingParams(max_tokens=0, prompt_logprobs=2))

    ((first,),) = run(engine, [request])
    ((second,),) = run(engine, [request])
    small = make_engine(max_num_scheduled_tokens=16)
    ((chunked,),) = run(small, [request])

    assert first.finish_reason == "length"
    assert first.token_ids == []
    assert len(first.prompt_logprobs) == 39
    assert second.prompt_logprobs == chunked.prompt_logprobs == first.prompt_logprobs


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


def test_a_broken_row_fails_alone_and_leaves_nothing_behind() -> None:
    model = tiny_gpt(CONFIG)
    with torch.no_grad():
        model.wte.weight[90] = torch.nan  # whoever reads this token is broken
        model.wte.weight[90, :] = torch.nan
    good = [Request(random_prompt(9, seed=s, vocab_size=80), sampled(8, seed=s)) for s in range(4)]
    bad = Request([1, 2, 90, 4, 5, 6, 7, 8, 9], sampled(8))
    # The head would see the broken row from everywhere: keep it out of the known ids.
    expected = run(make_engine(model, vocab_size=80), good)

    engine = make_engine(model, vocab_size=80)
    engine.vocab_size = 95  # let the broken id in
    results = run(engine, [good[0], bad, *good[1:], bad])

    assert results[1][0].finish_reason == results[5][0].finish_reason == "error"
    assert results[1][0].token_ids == []
    kept = [results[0], *results[2:5]]
    assert [r[0].drawn for r in kept] == [r[0].drawn for r in expected]
    again = run(engine, good)
    assert [r[0].drawn for r in again] == [r[0].drawn for r in expected]


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


def test_a_step_that_raises_can_be_tried_again() -> None:
    calls = 0

    class Flaky(PagedAttention):
        def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls % 7 == 0:
                raise MemoryError
            return super().__call__(layer, q, k, v)

    engine = make_engine(attention=Flaky)
    # `run` knows no failures: step over them here.
    plain_step = engine.step

    def stubborn_step() -> object:
        while True:
            try:
                return plain_step()
            except MemoryError:
                continue

    engine.step = stubborn_step  # type: ignore[assignment, method-assign]
    results = run(engine, workload())

    assert calls > 20
    expected = run(make_engine(attention=PagedAttention), workload())
    assert [r[0].token_ids for r in results] == [r[0].token_ids for r in expected]


def attention_for(num_rows: int) -> type[PagedAttention]:
    """An attention with the memory for so many rows, that finds out in the last layer."""

    class SmallAttention(PagedAttention):
        def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if len(q) > num_rows and layer == CONFIG.n_layer - 1:
                raise torch.OutOfMemoryError("Tried to allocate more than there is.")
            return super().__call__(layer, q, k, v)

    return SmallAttention


@pytest.mark.parametrize("num_rows", [3, 20, 41, 47])
@pytest.mark.parametrize("enable_prefix_cache", [False, True])
def test_a_step_too_large_for_the_memory_fails_few_and_leaves_the_others_as_they_were(
    undisturbed: tuple[torch.dtype, list[Result]], num_rows: int, enable_prefix_cache: bool
) -> None:
    dtype, _ = undisturbed
    # Every other one comes when the first are well under way.
    requests = [
        Request(request.prompt_ids, request.params, arrives=index % 2 * 7)
        for index, request in enumerate(workload())
    ]
    plain = make_engine(dtype=dtype, attention=PagedAttention, enable_prefix_cache=False)
    expected = run(plain, requests)
    engine = make_engine(
        dtype=dtype,
        attention=attention_for(num_rows),
        enable_prefix_cache=enable_prefix_cache,
        num_blocks=60,  # which makes for preemptions too
    )

    results = run(engine, requests)

    failed = [result.finish_reason == "error" for (result,) in results]
    assert 0 < sum(failed) < len(requests)
    for (result,), (whole,), has_failed in zip(results, expected, failed, strict=True):
        if has_failed:  # and until then it got what it would have got
            assert result.token_ids == whole.token_ids[: len(result.token_ids)]
            assert result.error_code == "out_of_memory"
        else:
            assert result.drawn == whole.drawn
    # What failed is gone, and those that come now are served as on the first day.
    again = run(engine, [Request([1], sampled(10, seed=0))])
    assert again[0][0].drawn == run(plain, [Request([1], sampled(10, seed=0))])[0][0].drawn
    assert engine.counts().stats.num_used_blocks == 0


def test_a_sequence_that_is_too_large_by_itself_fails_and_the_engine_goes_on() -> None:
    engine = make_engine(attention=attention_for(8))

    results = run(
        engine,
        [Request([1] * 9, sampled(3)), Request([2] * 8, sampled(3), arrives=1, num_choices=2)],
    )

    (large,), (first, second) = results
    assert (large.finish_reason, large.token_ids) == ("error", [])
    assert large.error is not None
    assert "ran out of memory in a step of 1 sequences and 9 tokens" in large.error
    assert "--max-num-sequences" in large.error
    assert first.finish_reason == "length"
    # The second shares the first one's blocks, but must compute the last token of its prompt too.
    assert second.finish_reason == "error"


def test_an_engine_without_memory_for_a_step_says_so_at_start() -> None:
    with pytest.raises(DoesNotFit, match="lower kv_cache_bytes"):
        make_engine(attention=attention_for(1)).warm_up()


def test_this_machine_computes_a_row_alike_in_any_batch() -> None:
    for dtype in DTYPES:
        assert make_engine(dtype=dtype).is_batch_invariant()


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
