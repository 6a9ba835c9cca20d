"""A request's tokens and logprobs are the same bits, whatever else the engine does."""

from typing import Any

import pytest
import torch

from engine.sampling_params import SamplingParams
from tests.engine.engines import (
    PRECISIONS,
    Request,
    Result,
    make_engine,
    random_prompt,
    run,
    sampled,
    workload,
)
from tests.tiny_models import tiny_config, tiny_gpt

Precision = dict[str, Any]  # for `make_engine`
in_every_precision = pytest.mark.parametrize(
    "precision", list(PRECISIONS.values()), ids=list(PRECISIONS)
)


def alone(requests: list[Request], precision: Precision) -> list[Result]:
    """Each request by itself in an engine of its own, the prompt in one piece."""
    engine_of_its_own = [
        run(make_engine(**precision, enable_prefix_cache=False), [request]) for request in requests
    ]
    return [results[0][0] for results in engine_of_its_own]


@pytest.fixture(scope="module", params=list(PRECISIONS.values()), ids=list(PRECISIONS))
def undisturbed(request: pytest.FixtureRequest) -> tuple[Precision, list[Result]]:
    return request.param, alone(workload(), request.param)


def test_batched_equals_alone(undisturbed: tuple[Precision, list[Result]]) -> None:
    precision, expected = undisturbed

    results = run(make_engine(**precision, enable_prefix_cache=False), workload())

    assert [r[0].drawn for r in results] == [r.drawn for r in expected]


@pytest.mark.parametrize("budget", [16, 17, 23, 50, 128])
def test_any_chunking_equals_one_piece(
    undisturbed: tuple[Precision, list[Result]], budget: int
) -> None:
    precision, expected = undisturbed

    results = run(make_engine(**precision, max_num_scheduled_tokens=budget), workload())

    assert [r[0].drawn for r in results] == [r.drawn for r in expected]


@in_every_precision
def test_prompts_of_all_sorts_of_lengths_end_as_the_longest_says(
    precision: Precision,
) -> None:
    """Layers of the storyteller's width: the last row needs all K and V of the second.

    Products and attention are looked at for every count by themselves; this is what lies between.
    """
    config = tiny_config(n_layer=2, n_head=4, n_embd=256, n_ctx=512, vocab_size=300)
    engine = make_engine(
        tiny_gpt(config),
        **precision,
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
    undisturbed: tuple[Precision, list[Result]], block_size: int
) -> None:
    precision, expected = undisturbed

    results = run(make_engine(**precision, block_size=block_size, num_blocks=900), workload())

    assert [r[0].drawn for r in results] == [r.drawn for r in expected]


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_arrival_gives_the_same(
    undisturbed: tuple[Precision, list[Result]], seed: int
) -> None:
    precision, expected = undisturbed
    arrivals = torch.randint(30, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
    requests = [
        Request(request.prompt_ids, request.params, arrives=arrives)
        for request, arrives in zip(workload(), arrivals, strict=True)
    ]

    results = run(make_engine(**precision), requests)

    assert [r[0].drawn for r in results] == [r.drawn for r in expected]


def test_preempted_equals_undisturbed(undisturbed: tuple[Precision, list[Result]]) -> None:
    precision, expected = undisturbed

    results = run(make_engine(**precision, num_blocks=26), workload())

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


def test_a_prefix_hit_equals_undisturbed(undisturbed: tuple[Precision, list[Result]]) -> None:
    precision, expected = undisturbed
    engine = make_engine(**precision)

    run(engine, workload())
    results = run(engine, workload())

    assert sum(r[0].num_cached_tokens for r in results) > 80
    assert [r[0].drawn for r in results] == [r.drawn for r in expected]


@pytest.mark.parametrize("num_delivered", [1, 4, 9])
def test_a_resubmitted_request_continues_as_it_would_have(
    undisturbed: tuple[Precision, list[Result]], num_delivered: int
) -> None:
    precision, expected = undisturbed
    requests = [
        Request(request.prompt_ids, request.params, completion_ids=result.token_ids[:num_delivered])
        for request, result in zip(workload(), expected, strict=True)
    ]

    results = run(make_engine(**precision), requests)

    for (result,), whole in zip(results, expected, strict=True):
        assert result.token_ids == whole.token_ids[num_delivered:]
        assert result.logprobs == whole.logprobs[num_delivered:]
        assert result.finish_reason == whole.finish_reason


@in_every_precision
def test_choices_differ_and_each_equals_itself_alone(precision: Precision) -> None:
    prompt = random_prompt(30, seed=8)

    (together,) = run(make_engine(**precision), [Request(prompt, sampled(12), num_choices=5)])

    assert len({tuple(result.token_ids) for result in together}) == 5
    first = run(make_engine(**precision), [Request(prompt, sampled(12))])
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


@in_every_precision
def test_this_machine_computes_a_row_alike_in_any_batch(precision: Precision) -> None:
    assert make_engine(**precision).is_batch_invariant()
