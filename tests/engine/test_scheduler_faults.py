"""Rows that fail, steps that fail, and what comes after an engine that died."""

import pytest

from tests.engine.scheduling import endless, make_engine, scheduled

# Faults


def test_a_row_that_fails_ends_its_own_sequence_and_no_other() -> None:
    engine = make_engine()
    sequences = [engine.add([number] * 9, params=endless(5)) for number in range(4)]

    engine.finish(engine.schedule(), {2})
    engine.run()

    assert [s.finish_reason for s in sequences] == ["length", "length", "error", "length"]
    assert sequences[2].completion_ids == []
    engine.check_at_rest()


def test_blocks_of_a_failed_row_are_not_shared_and_are_cleared_for_their_next_holder() -> None:
    engine = make_engine(num_blocks=17)
    engine.add([1] * 12, params=endless(5))
    batch = engine.schedule()
    table = set(engine.blocks.block_table(0))
    engine.finish(batch, {0})
    again = engine.add([1] * 60, params=endless(1))

    batch = engine.schedule()

    assert again.num_computed_tokens == 0
    assert set(batch.blocks_to_clear) == table
    engine.finish(batch)
    engine.run()
    assert again.finish_reason == "length"


def test_a_failed_row_of_an_aborted_sequence_is_withdrawn_too() -> None:
    engine = make_engine()
    sequence = engine.add([1] * 12)
    batch = engine.schedule()
    engine.scheduler.abort(sequence.request_id)
    engine.finish(batch, {0})

    assert sequence.finish_reason == "abort"
    assert engine.blocks.num_cached_blocks == 0


def test_a_step_that_raises_can_be_scheduled_again() -> None:
    engine = make_engine()
    first = engine.add([1] * 9, params=endless(5))
    engine.step()
    siblings = [engine.add([2] * 9, request_id="r", choice=choice) for choice in range(2)]
    before = engine.schedule()
    engine.scheduler.fail(before)
    engine.check()

    assert engine.blocks.num_cached_blocks == 0, "nothing of a failed step is known"
    assert first.num_computed_tokens == 9
    assert [s.num_computed_tokens for s in siblings] == [0, 0]
    after = engine.schedule()
    assert scheduled(after) == scheduled(before)
    engine.finish(after)
    engine.run()
    engine.check_at_rest()


def test_a_block_that_a_failed_step_was_to_fill_is_not_shared() -> None:
    engine = make_engine()
    sequence = engine.add([1] * 7, params=endless(5))
    engine.step()
    engine.scheduler.fail(engine.schedule())
    engine.scheduler.abort(sequence.request_id)

    resumed = engine.add([1] * 7, completion_ids=sequence.completion_ids * 2, params=endless(5))
    engine.schedule()

    assert resumed.num_computed_tokens == 4


def test_a_failed_step_leaves_its_orders_to_the_next() -> None:
    engine = make_engine(num_blocks=17)
    engine.add([1] * 32, params=endless(5))
    engine.finish(engine.schedule(), {0})
    engine.add([2] * 3)
    lost = engine.schedule()
    released_seq_ids, blocks_to_clear = lost.released_seq_ids[:], lost.blocks_to_clear[:]
    assert (len(released_seq_ids), len(blocks_to_clear)) == (1, 1)

    engine.scheduler.fail(lost)
    batch = engine.schedule()

    assert set(released_seq_ids) <= set(batch.released_seq_ids)
    assert set(blocks_to_clear) <= set(batch.blocks_to_clear)


def test_a_sequence_aborted_during_a_step_that_raises_does_not_come_back() -> None:
    engine = make_engine()
    running = engine.add([1] * 5, params=endless())
    engine.step()
    admitted = engine.add([2] * 5)
    batch = engine.schedule()
    engine.scheduler.abort(running.request_id)
    engine.scheduler.abort(admitted.request_id)

    engine.scheduler.fail(batch)

    engine.check_at_rest()


def test_a_step_too_large_for_the_memory_is_tried_again_without_its_youngest() -> None:
    engine = make_engine()
    oldest = engine.add([1] * 5, params=endless())
    engine.step()
    important = engine.add([3] * 5, params=endless(), priority=-1)
    engine.step()
    newcomer = engine.add([2] * 5)

    victims = [engine.give_up_youngest(engine.schedule()) for _ in range(2)]
    batch = engine.schedule()

    assert victims == [newcomer, oldest]  # one was admitted by the step, one ran before it
    assert newcomer.finish_reason == oldest.finish_reason == "error"
    assert scheduled(batch) == {important.seq_id: 1}
    engine.finish(batch)
    engine.run()
    engine.check_at_rest()


def test_nobody_is_given_up_where_all_were_aborted_meanwhile() -> None:
    engine = make_engine()
    sequence = engine.add([1] * 5)
    batch = engine.schedule()
    engine.scheduler.abort(sequence.request_id)

    assert engine.give_up_youngest(batch) is None
    engine.check_at_rest()


# Resubmission


@pytest.mark.parametrize("num_delivered", range(1, 8))
def test_a_resubmitted_sequence_goes_on_where_it_was(num_delivered: int) -> None:
    engine, other = make_engine(), make_engine()
    whole = engine.add([1] * 5, params=endless(8))
    engine.run()

    resumed = other.add(
        [1] * 5, completion_ids=whole.completion_ids[:num_delivered], params=endless(8)
    )
    other.run()

    assert resumed.completion_ids == whole.completion_ids
    assert resumed.num_prompt_tokens == 5
