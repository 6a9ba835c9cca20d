"""The scheduler holds the budgets of a step, and shares one out between decoding and prompts."""

import pytest

from engine.errors import CacheTooSmall
from tests.engine.scheduling import endless, make_engine, scheduled


@pytest.mark.parametrize(("num_blocks", "is_enough"), [(16, False), (17, True)])
def test_a_cache_smaller_than_one_context_is_refused(num_blocks: int, is_enough: bool) -> None:
    if is_enough:
        make_engine(num_blocks=num_blocks, n_ctx=64)
    else:
        with pytest.raises(CacheTooSmall, match=r"room for 60 tokens, .* at least 17\."):
            make_engine(num_blocks=num_blocks, n_ctx=64)


def test_a_step_holds_the_token_budget_and_chunks_what_exceeds_it() -> None:
    engine = make_engine(max_num_scheduled_tokens=8)
    engine.add([1] * 20)

    chunks = []
    for _ in range(3):
        batch = engine.schedule()
        chunks.append((batch.num_tokens, batch.sampled_rows))
        engine.finish(batch)

    assert chunks == [(8, []), (8, []), (4, [0])]


def test_beside_a_sequence_that_decodes_prompts_get_part_of_a_step() -> None:
    engine = make_engine(max_num_scheduled_tokens=16)
    engine.add([1], params=endless())
    engine.add([2] * 40)

    batch = engine.schedule()
    chunks = [scheduled(batch)]
    engine.finish(batch)
    chunks.append(scheduled(engine.schedule()))

    assert chunks == [{0: 1, 1: 15}, {0: 1, 1: 11}]  # 1 and 5/8 of 16


@pytest.mark.parametrize(
    ("prompts", "chunks"),
    [((14,), [14]), ((6, 8), [6, 8]), ((15,), [15]), ((16,), [10]), ((6, 10), [6, 4])],
    ids=str,
)
def test_prompts_that_one_step_can_finish_are_not_cut(
    prompts: tuple[int, ...], chunks: list[int]
) -> None:
    engine = make_engine(max_num_scheduled_tokens=16)
    engine.add([1], params=endless())
    engine.step()

    for number, length in enumerate(prompts):
        engine.add([2 + number] * length)

    assert engine.schedule().num_scheduled_tokens == [1, *chunks]


def test_a_prompt_whose_rest_one_step_can_finish_is_not_cut_again() -> None:
    engine = make_engine(max_num_scheduled_tokens=16)
    engine.add([1], params=endless())
    engine.step()

    engine.add([2] * 25)
    chunks = []
    for _ in range(2):
        batch = engine.schedule()
        chunks.append(batch.num_scheduled_tokens)
        engine.finish(batch)

    assert chunks == [[1, 10], [1, 15]]


def test_a_step_holds_the_sequence_budget() -> None:
    engine = make_engine(max_num_sequences=2)
    for _ in range(3):
        engine.add([1])

    engine.step()

    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (2, 1)


def test_a_long_prompt_never_takes_a_decoding_sequence_its_token() -> None:
    engine = make_engine(max_num_scheduled_tokens=6)
    decoding = [engine.add([number], params=endless()) for number in (1, 2, 3)]
    engine.step()
    engine.add([9] * 40, priority=-1)  # ahead of them in every order

    batch = engine.schedule()

    assert scheduled(batch) == {0: 1, 1: 1, 2: 1, 3: 3}
    engine.finish(batch)
    batch = engine.schedule()
    assert scheduled(batch) == {3: 3, 0: 1, 1: 1, 2: 1}
    engine.finish(batch)
    assert [sequence.num_completion_tokens for sequence in decoding] == [3, 3, 3]


def test_a_step_without_work_is_empty_and_needs_no_update() -> None:
    engine = make_engine()

    assert engine.schedule().sequences == []
    assert engine.schedule().sequences == []
    assert engine.scheduler.is_idle
