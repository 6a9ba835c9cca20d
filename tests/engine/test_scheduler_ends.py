"""Sequences end by themselves or are aborted, and leave nothing behind."""

import pytest

from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from tests.engine.scheduling import endless, make_engine
from tests.engine.simulation import EOS

# By themselves


def finish_alone(params: SamplingParams, *, num_prompt_tokens: int = 5) -> Sequence:
    engine = make_engine()
    sequence = engine.add([1] * num_prompt_tokens, params=params)
    engine.run()
    engine.check_at_rest()
    return sequence


def test_a_completion_ends_at_max_tokens_with_length() -> None:
    sequence = finish_alone(endless(7))

    assert (sequence.finish_reason, sequence.num_completion_tokens) == ("length", 7)


def test_a_completion_ends_at_the_context_with_length() -> None:
    sequence = finish_alone(endless(60), num_prompt_tokens=61)

    assert (sequence.finish_reason, sequence.num_completion_tokens) == ("length", 3)


def test_without_max_tokens_the_prompt_is_computed_and_nothing_drawn() -> None:
    sequence = finish_alone(endless(0))

    assert (sequence.finish_reason, sequence.completion_ids) == ("length", [])
    assert sequence.num_computed_tokens == 5


def test_a_prompt_that_fills_the_context_is_computed_and_nothing_drawn() -> None:
    sequence = finish_alone(endless(9), num_prompt_tokens=64)

    assert (sequence.finish_reason, sequence.completion_ids) == ("length", [])
    assert sequence.num_computed_tokens == 64


@pytest.mark.parametrize(
    ("ignore_eos", "stop_token_ids", "token_id", "is_end"),
    [
        (False, (), EOS, True),
        (True, (), EOS, False),
        (True, (EOS,), EOS, True),
        (False, (3,), 3, True),
        (False, (3,), 2, False),
    ],
)
def test_eos_and_stop_tokens_end_a_completion_and_belong_to_it(
    ignore_eos: bool, stop_token_ids: tuple[int, ...], token_id: int, is_end: bool
) -> None:
    engine = make_engine()
    params = SamplingParams(max_tokens=9, ignore_eos=ignore_eos, stop_token_ids=stop_token_ids)
    sequence = engine.add([1, 2], params=params)

    batch = engine.schedule()
    (outcome,) = engine.scheduler.update(batch, [token_id])

    assert outcome == (0, sequence, token_id)
    assert sequence.completion_ids == [token_id]
    assert sequence.finish_reason == ("stop" if is_end else None)


def test_a_step_that_brings_too_few_or_too_many_draws_is_refused() -> None:
    for draws in ([], [1, 1]):
        engine = make_engine()
        engine.add([1])
        batch = engine.schedule()

        with pytest.raises(ValueError, match="zip"):
            engine.scheduler.update(batch, draws)


def test_a_stop_on_the_last_token_allowed_is_a_stop() -> None:
    engine = make_engine()
    sequence = engine.add([1], params=SamplingParams(max_tokens=1))

    engine.scheduler.update(engine.schedule(), [EOS])

    assert sequence.finish_reason == "stop"


def test_blocks_are_free_when_the_step_that_finishes_is_over() -> None:
    engine = make_engine()
    engine.add([1] * 6, params=endless(1))

    engine.step()

    assert engine.blocks.num_used_blocks == 0


# Aborted


def test_an_abort_frees_a_running_sequence_at_once() -> None:
    engine = make_engine()
    sequence = engine.add([1] * 9, params=endless())
    engine.step()

    assert engine.scheduler.abort(sequence.request_id) == 1

    assert (sequence.state, sequence.finish_reason) == ("finished", "abort")
    engine.check_at_rest()


def test_an_abort_finds_its_sequence_among_those_waiting() -> None:
    engine = make_engine(max_num_sequences=1)
    sequences = [engine.add([1], priority=number % 3) for number in range(30)]

    for sequence in sequences[::2]:
        assert engine.scheduler.abort(sequence.request_id) == 1

    assert engine.scheduler.num_waiting == 15
    engine.run()
    assert [s.finish_reason for s in sequences] == ["abort", "length"] * 15


def test_one_choice_can_be_aborted_alone() -> None:
    engine = make_engine()
    first, second = (engine.add([1], request_id="r", choice=choice) for choice in range(2))
    engine.step()

    assert engine.scheduler.abort("r", 1) == 1
    engine.run()

    assert (first.finish_reason, second.finish_reason) == ("length", "abort")


def test_an_abort_of_what_ended_or_never_was_does_nothing() -> None:
    engine = make_engine()
    sequence = engine.add([1], params=endless(1))
    engine.run()

    assert engine.scheduler.abort(sequence.request_id) == 0
    assert engine.scheduler.abort("never was") == 0
    assert sequence.finish_reason == "length"


def test_a_sequence_aborted_in_flight_keeps_its_blocks_until_the_step_is_over() -> None:
    engine = make_engine()
    aborted = engine.add([1] * 6, params=endless())
    other = engine.add([2] * 6, params=endless())
    batch = engine.schedule()
    engine.scheduler.abort(aborted.request_id)
    assert len(engine.blocks.block_table(aborted.seq_id)) == 2

    draws, _ = engine.machine.execute(batch)
    outcomes = engine.update(batch, draws)

    assert [outcome.sequence for outcome in outcomes] == [other]
    assert aborted.completion_ids == []
    assert engine.blocks.num_used_blocks == 2


def test_a_scoring_sequence_aborted_in_flight_ends_once() -> None:
    engine = make_engine()
    sequence = engine.add([1] * 6, params=endless(0))
    batch = engine.schedule()
    engine.scheduler.abort(sequence.request_id)

    assert engine.update(batch, []) == []
    assert sequence.finish_reason == "abort"


def test_the_machine_is_told_of_every_row_to_drop() -> None:
    engine = make_engine(num_blocks=17)
    engine.add([1] * 20, params=endless(1))
    aborted = engine.add([2] * 8, params=endless())
    never_ran = engine.add([3] * 60)
    engine.step()
    engine.scheduler.abort(aborted.request_id)
    engine.scheduler.abort(never_ran.request_id)
    engine.add([4])

    batch = engine.schedule()

    assert sorted(batch.released_seq_ids) == [0, 1]
    engine.finish(batch)
    assert engine.schedule().released_seq_ids == []
