"""Rows, steps and memory that fail: few are lost, and the others do not notice."""

import pytest
import torch
from torch import Tensor

from engine.attention import PagedAttention
from engine.errors import DoesNotFit
from tests.engine.engines import (
    CONFIG,
    DTYPES,
    Request,
    make_engine,
    random_prompt,
    run,
    sampled,
    workload,
)
from tests.tiny_models import tiny_gpt


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [3, 20, 41, 47])
@pytest.mark.parametrize("enable_prefix_cache", [False, True])
def test_a_step_too_large_for_the_memory_fails_few_and_leaves_the_others_as_they_were(
    dtype: torch.dtype, num_rows: int, enable_prefix_cache: bool
) -> None:
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
