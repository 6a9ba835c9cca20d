"""The scheduler's promises for a machine that runs ahead of it: steps before draws, and rounds."""

import pytest

from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledBatch
from engine.sequence import Sequence
from tests.engine.scheduling import BLOCK_SIZE, endless, make_engine
from tests.engine.simulation import EOS, SimulatedEngine

# A step ahead: what follows is drawn in full by tests/engine/test_cuda_graph.py


def decoding(
    *max_tokens: int, max_num_sequences: int = 4, num_blocks: int = 33, max_num_rounds: int = 1
) -> tuple[SimulatedEngine, list[Sequence], ScheduledBatch]:
    """An engine that shares no completions, and its first step that only decodes, in flight."""
    engine = make_engine(
        share_completion_blocks=False, max_num_sequences=max_num_sequences, num_blocks=num_blocks
    )
    sequences = [
        engine.add([index + 1] * 3, params=endless(count), max_num_rounds=max_num_rounds)
        for index, count in enumerate(max_tokens)
    ]
    engine.finish(engine.scheduler.schedule())
    return engine, sequences, engine.scheduler.schedule()


def test_a_step_ahead_has_the_rows_that_are_not_at_their_limit() -> None:
    engine, (first, _, third), batch = decoding(9, 2, 3)

    ahead = engine.scheduler.schedule_ahead()

    assert ahead is not None
    assert ahead.sequences == [first, third]
    assert ahead.num_scheduled_tokens == [1, 1]
    assert ahead.sampled_rows == [0, 1]
    assert ahead.is_decode
    engine.scheduler.update(batch, [1, 1, 1])
    engine.scheduler.update(ahead, [2, 2])
    assert first.completion_ids[1:] == [1, 2]
    assert third.completion_ids[1:] == [1, 2]


def test_a_step_ahead_has_room_for_the_token_it_computes() -> None:
    engine, (sequence,), _ = decoding(9)
    assert sequence.num_tokens == BLOCK_SIZE

    engine.scheduler.schedule_ahead()

    assert len(engine.blocks.block_table(sequence.seq_id)) == 2


@pytest.mark.parametrize(("places", "is_ahead"), [(1, True), (2, False)])
def test_no_step_is_ahead_of_a_sequence_that_could_come_in(places: int, is_ahead: bool) -> None:
    engine, _, _ = decoding(9, max_num_sequences=places)
    engine.add([5] * 3)

    assert (engine.scheduler.schedule_ahead() is not None) == is_ahead


def test_no_step_is_ahead_of_a_prompt_or_of_shared_completions_or_of_nobody() -> None:
    prefill = make_engine(share_completion_blocks=False)
    prefill.add([1] * 3)
    prefill.scheduler.schedule()
    sharing = make_engine(share_completion_blocks=True)
    sharing.add([1] * 3, params=endless())
    sharing.finish(sharing.scheduler.schedule())
    sharing.scheduler.schedule()
    ending, _, _ = decoding(2)

    for engine in (prefill, sharing, ending):
        assert engine.scheduler.schedule_ahead() is None


def test_no_step_is_ahead_where_a_sequence_would_have_to_give_way() -> None:
    engine, _, _ = decoding(60, 60, num_blocks=17)
    for _ in range(16 - engine.blocks.num_used_blocks):
        assert engine.blocks.allocate(99, BLOCK_SIZE * (1 + len(held(engine, 99))))

    assert engine.scheduler.schedule_ahead() is None


def test_no_step_is_ahead_where_a_block_must_be_cleared_first() -> None:
    engine = make_engine(share_completion_blocks=False)
    sequence, broken = (engine.add([1] * count, params=endless()) for count in (3, 2))
    batch = engine.schedule()
    (block,) = engine.blocks.block_table(broken.seq_id)
    engine.finish(batch, {1})
    current = engine.scheduler.schedule()
    assert sequence.num_tokens == BLOCK_SIZE

    assert engine.scheduler.schedule_ahead() is None
    assert engine.blocks.block_table(sequence.seq_id)[1] == block
    engine.finish(current)
    assert engine.scheduler.schedule().blocks_to_clear == [block]


def held(engine: SimulatedEngine, seq_id: int) -> list[int]:
    return engine.blocks.block_table(seq_id) if engine.blocks.holds(seq_id) else []


def test_a_row_that_ended_before_its_step_ahead_means_nothing() -> None:
    engine, (ended, other), batch = decoding(9, 9)
    ended.params = SamplingParams(max_tokens=9)
    ahead = engine.scheduler.schedule_ahead()
    assert ahead is not None

    (told, _) = engine.scheduler.update(batch, [EOS, 1])
    outcomes = engine.scheduler.update(ahead, [3, 3], failed_rows=[0])

    assert told.sequence.finish_reason == "stop"
    assert [outcome.sequence for outcome in outcomes] == [other]
    assert ended.completion_ids[1:] == [EOS]
    assert engine.scheduler.schedule().released_seq_ids == [ended.seq_id]


def test_a_step_and_the_one_ahead_of_it_can_be_taken_back() -> None:
    engine, (sequence,), batch = decoding(9)
    ahead = engine.scheduler.schedule_ahead()
    assert ahead is not None
    before = list(sequence.token_ids)

    engine.scheduler.fail(ahead)
    engine.scheduler.fail(batch)

    assert sequence.token_ids == before
    again = engine.scheduler.schedule()
    assert again.sequences == [sequence]
    assert again.num_ahead == 0


# Several rounds a step


@pytest.mark.parametrize(
    ("max_tokens", "max_num_rounds", "num_rounds"),
    [
        ((60,), 8, 8),  # as many as the sequence allows
        ((60,), 1, 1),
        ((60, 5), 8, 4),  # the first token came with the prompt
        ((3,), 8, 2),
    ],
)
def test_a_step_has_rounds_up_to_the_nearest_limit(
    max_tokens: tuple[int, ...], max_num_rounds: int, num_rounds: int
) -> None:
    engine, sequences, batch = decoding(*max_tokens, max_num_rounds=max_num_rounds)

    assert batch.num_rounds == num_rounds
    assert batch.num_tokens == num_rounds * len(sequences)
    engine.finish(batch)
    assert [s.num_completion_tokens for s in sequences] == [1 + num_rounds] * len(sequences)


def test_the_sequence_that_allows_fewest_rounds_decides() -> None:
    engine = make_engine(share_completion_blocks=False)
    for max_num_rounds in (8, 3, 5):
        engine.add([1], params=endless(), max_num_rounds=max_num_rounds)
    engine.step()

    assert engine.schedule().num_rounds == 3


@pytest.mark.parametrize(("num_sequences", "num_rounds"), [(8, 8), (20, 3), (32, 2), (33, 1)])
def test_more_rows_have_fewer_rounds(num_sequences: int, num_rounds: int) -> None:
    engine = make_engine(
        share_completion_blocks=False,
        max_num_sequences=64,
        max_num_scheduled_tokens=64,
        num_blocks=200,
    )
    for _ in range(num_sequences):
        engine.add([1], params=endless(), max_num_rounds=8)
    engine.step()

    assert engine.schedule().num_rounds == num_rounds


def test_a_step_has_one_round_while_anybody_waits() -> None:
    engine, _, batch = decoding(60, max_num_sequences=1, max_num_rounds=8)
    engine.add([5] * 3)
    assert batch.num_rounds == 8

    ahead = engine.scheduler.schedule_ahead()

    assert ahead is not None
    assert ahead.num_rounds == 1


def test_a_step_with_a_prompt_or_with_shared_completions_has_one_round() -> None:
    prefill = make_engine(share_completion_blocks=False)
    prefill.add([1] * 3, max_num_rounds=8)
    sharing = make_engine(share_completion_blocks=True)
    sharing.add([1] * 3, params=endless(), max_num_rounds=8)
    sharing.step()

    assert prefill.schedule().num_rounds == 1
    assert sharing.schedule().num_rounds == 1


@pytest.mark.parametrize(("num_left", "num_rounds"), [(1, 1), (2, 8)])
def test_a_step_has_one_round_where_blocks_are_few(num_left: int, num_rounds: int) -> None:
    engine = make_engine(share_completion_blocks=False)
    sequence = engine.add([1] * 3, params=endless(), max_num_rounds=8)
    engine.step()
    num_others = engine.blocks.num_blocks - 2 - num_left
    assert engine.blocks.allocate(99, BLOCK_SIZE * num_others)

    batch = engine.scheduler.schedule()

    assert batch.num_rounds == num_rounds
    assert len(held(engine, sequence.seq_id)) == -(-(4 + num_rounds - 1) // BLOCK_SIZE)


def test_a_step_ahead_begins_where_the_rounds_before_it_end() -> None:
    engine, (sequence, ending), batch = decoding(14, 9, max_num_rounds=8)
    assert batch.num_rounds == 8

    ahead = engine.scheduler.schedule_ahead()

    assert ahead is not None
    assert ahead.sequences == [sequence], "the other is at its limit by then"
    assert (ahead.num_ahead, ahead.num_rounds) == (8, 5)
    assert len(held(engine, sequence.seq_id)) * BLOCK_SIZE == 3 + 1 + 8 + 5 - 1
    engine.finish(batch)
    assert ending.is_finished
    assert sequence.num_tokens == 3 + 1 + 8
    for token_id in (0, 1, 2, 3, 1):
        engine.scheduler.update(ahead, [token_id])
    assert sequence.completion_ids[-5:] == [0, 1, 2, 3, 1]
    assert sequence.finish_reason == "length"


def test_what_is_drawn_behind_an_end_is_dropped_and_its_blocks_wait_for_the_last_round() -> None:
    engine, (ended, other), batch = decoding(60, 60, max_num_rounds=3)
    ended.params = SamplingParams(max_tokens=60)
    update = engine.scheduler.update

    outcomes = [update(batch, draws) for draws in ([1, 1], [EOS, 2])]
    num_held = engine.blocks.num_used_blocks
    outcomes.append(update(batch, [3, 3]))

    told = [[(outcome.row, outcome.token_id) for outcome in some] for some in outcomes]
    assert told == [[(0, 1), (1, 1)], [(0, EOS), (1, 2)], [(1, 3)]]
    assert ended.completion_ids[1:] == [1, EOS]
    assert other.completion_ids[1:] == [1, 2, 3]
    assert num_held == 4
    assert engine.blocks.num_used_blocks == 2


def test_a_row_that_fails_in_a_later_round_keeps_what_came_before() -> None:
    engine, (broken, other), batch = decoding(60, 60, max_num_rounds=4)
    update = engine.scheduler.update

    update(batch, [1, 1])
    (told, _) = update(batch, [-1, 2], failed_rows=[0])
    update(batch, [-1, 3], failed_rows=[0])
    update(batch, [2, 3])

    assert (told.sequence, told.token_id) == (broken, None)
    assert broken.finish_reason == "error"
    assert broken.completion_ids[1:] == [1]
    assert other.completion_ids[1:] == [1, 2, 3, 3]


def test_a_step_of_several_rounds_can_be_taken_back() -> None:
    engine, (sequence,), batch = decoding(60, max_num_rounds=8)
    before = list(sequence.token_ids)

    engine.scheduler.fail(batch)
    engine.check()
    again = engine.schedule()

    assert sequence.token_ids == before
    assert again.num_rounds == 8
    engine.finish(again)
    engine.run()
    engine.check_at_rest()
