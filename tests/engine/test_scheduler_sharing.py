"""Prompts are computed once for all who share a beginning, and counted honestly."""

from tests.engine.scheduling import (
    BLOCK_SIZE,
    endless,
    fill_until_preemption,
    make_engine,
    scheduled,
)


def test_choices_of_one_request_share_their_prompt_in_the_same_step() -> None:
    engine = make_engine()
    choices = [
        engine.add([1, 2, 3] * 3, request_id="r", choice=choice, params=endless(seed=choice))
        for choice in range(3)
    ]

    batch = engine.schedule()

    assert scheduled(batch) == {0: 9, 1: 1, 2: 1}
    assert [s.num_cached_tokens for s in choices] == [0, 0, 0], "sharing among siblings"
    assert engine.blocks.num_used_blocks == 2 + 3
    engine.finish(batch)
    assert engine.scheduler.num_prefix_hit_tokens == 0


def test_a_prompt_in_chunks_is_computed_once_for_all_its_choices() -> None:
    engine = make_engine(max_num_scheduled_tokens=8)
    choices = [engine.add([1] * 29, request_id="r", choice=choice) for choice in range(3)]

    num_prompt_tokens = 0
    while engine.scheduler.num_waiting:
        batch = engine.schedule()
        num_prompt_tokens += sum(
            count
            for sequence, count in zip(batch.sequences, batch.num_scheduled_tokens, strict=True)
            if sequence.num_computed_tokens < 29
        )
        engine.finish(batch)

    assert num_prompt_tokens == 29 + 1 + 1
    assert [s.num_cached_tokens for s in choices] == [0, 0, 0]


def test_a_hit_from_another_request_counts_as_cached_for_every_choice() -> None:
    engine = make_engine()
    engine.add([1] * 8, params=endless(1))
    engine.run()

    choices = [engine.add([1] * 14, request_id="r", choice=choice) for choice in range(2)]
    engine.step()

    assert [s.num_cached_tokens for s in choices] == [8, 8]
    assert engine.scheduler.num_prefix_query_tokens == 8 + 14 + 14
    assert engine.scheduler.num_prefix_hit_tokens == 8 + 8


def test_a_preempted_sequence_finds_its_own_blocks_and_counts_none_as_cached() -> None:
    engine = make_engine(num_blocks=17)
    engine.add([1] * 36, params=endless(28))
    young = engine.add([2] * 16, params=endless(28))
    fill_until_preemption(engine)
    queried = engine.scheduler.num_prefix_query_tokens
    assert young.state == "waiting"

    engine.scheduler.abort("request-0")
    batch = engine.schedule()

    assert batch.sequences == [young]
    assert batch.num_tokens < BLOCK_SIZE + 1
    assert young.num_cached_tokens == 0
    assert engine.scheduler.num_prefix_query_tokens == queried


def test_cached_tokens_are_prompt_tokens_even_if_a_completion_hits() -> None:
    engine = make_engine()
    engine.add([1] * 16, params=endless(1))
    engine.run()

    resumed = engine.add([1] * 6, completion_ids=[1] * 9, params=endless())
    engine.schedule()

    assert resumed.num_computed_tokens == 12
    assert resumed.num_cached_tokens == 6


def test_prompt_logprobs_look_nothing_up_but_let_the_siblings() -> None:
    engine = make_engine()
    engine.add([1] * 9, params=endless(1))
    engine.run()

    params = endless(4, prompt_logprobs=0)
    choices = [
        engine.add([1] * 9, request_id="r", choice=choice, params=params) for choice in range(2)
    ]
    batch = engine.schedule()

    assert scheduled(batch) == {1: 9, 2: 1}
    assert [s.num_cached_tokens for s in choices] == [0, 8]


def test_with_salts_apart_nothing_is_shared() -> None:
    engine = make_engine()
    for salt in (b"a", b"b"):
        engine.add([1] * 9, salt=salt)

    assert scheduled(engine.schedule()) == {0: 9, 1: 9}
