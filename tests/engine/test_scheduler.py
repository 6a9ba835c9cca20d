"""The scheduler's promises, one at a time; `test_policy_state_machine.py` has them all at once."""

import random

import pytest

from engine.config import EngineConfig
from engine.errors import CacheTooSmall
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledBatch
from engine.sequence import Sequence
from tests.engine.simulation import EOS, SimulatedEngine

BLOCK_SIZE = 4


def make_engine(
    *,
    num_blocks: int = 33,
    max_num_sequences: int = 4,
    max_num_scheduled_tokens: int = 32,
    share_completion_blocks: bool = True,
    n_ctx: int = 64,
) -> SimulatedEngine:
    return SimulatedEngine(
        EngineConfig(
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            max_num_sequences=max_num_sequences,
            max_num_scheduled_tokens=max_num_scheduled_tokens,
            share_completion_blocks=share_completion_blocks,
        ),
        n_ctx=n_ctx,
    )


def endless(
    max_tokens: int = 60, *, seed: int = 0, prompt_logprobs: int | None = None
) -> SamplingParams:
    """Parameters of a sequence that ends by length only."""
    return SamplingParams(
        max_tokens=max_tokens, ignore_eos=True, seed=seed, prompt_logprobs=prompt_logprobs
    )


def execute(engine: SimulatedEngine, batch: ScheduledBatch, faulty_rows: set[int]) -> None:
    engine.finish(batch, faulty_rows)


def scheduled(batch: ScheduledBatch) -> dict[int, int]:
    """Tokens of a batch by seq_id."""
    seq_ids = [sequence.seq_id for sequence in batch.sequences]
    return dict(zip(seq_ids, batch.num_scheduled_tokens, strict=True))


# Limits


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
        execute(engine, batch, set())

    assert chunks == [(8, []), (8, []), (4, [0])]


def test_beside_a_sequence_that_decodes_prompts_get_part_of_a_step() -> None:
    engine = make_engine(max_num_scheduled_tokens=16)
    engine.add([1], params=endless())
    engine.add([2] * 40)

    batch = engine.schedule()
    chunks = [scheduled(batch)]
    execute(engine, batch, set())
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
        execute(engine, batch, set())

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
    execute(engine, batch, set())
    batch = engine.schedule()
    assert scheduled(batch) == {3: 3, 0: 1, 1: 1, 2: 1}
    execute(engine, batch, set())
    assert [sequence.num_completion_tokens for sequence in decoding] == [3, 3, 3]


def test_a_step_without_work_is_empty_and_needs_no_update() -> None:
    engine = make_engine()

    assert engine.schedule().sequences == []
    assert engine.schedule().sequences == []
    assert engine.scheduler.is_idle


# Ends


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


# Order and preemption


def test_first_come_first_served_within_a_priority() -> None:
    engine = make_engine(max_num_sequences=1)
    for priority in (1, 0, 1, 0):
        engine.add([1], priority=priority, params=endless(1))

    order = []
    while not engine.scheduler.is_idle:
        order += [outcome.sequence.seq_id for outcome in engine.step()]

    assert order == [1, 3, 0, 2]


def test_nobody_overtakes_a_head_that_does_not_fit() -> None:
    engine = make_engine(num_blocks=17)
    engine.add([1] * 40, params=endless(2))
    engine.step()
    engine.step()
    long = engine.add([2] * 30, params=endless(1))
    short = engine.add([3], params=endless(1))

    while not long.is_finished:
        assert short.state == "waiting" or long.state == "running"
        engine.step()
    engine.run()

    assert short.is_finished


def fill_until_preemption(engine: SimulatedEngine) -> None:
    while not engine.scheduler.num_preemptions:
        engine.step()


def test_the_youngest_of_the_lowest_priority_is_preempted() -> None:
    engine = make_engine(num_blocks=17)
    low = engine.add([1], priority=5, params=endless())
    old = engine.add([2], params=endless())
    young = engine.add([3], params=endless())

    fill_until_preemption(engine)
    assert [s.num_preemptions for s in (low, old, young)] == [1, 0, 0]

    engine.scheduler.abort(low.request_id)
    while engine.scheduler.num_preemptions == 1:
        engine.step()
    assert [s.num_preemptions for s in (old, young)] == [0, 1]


def test_a_sequence_can_be_the_one_preempted_for_its_own_growth() -> None:
    engine = make_engine(num_blocks=17)
    engine.add([1] * 32, params=endless(32))
    engine.step()
    young = engine.add([2] * 24, params=endless(40))

    # 14 blocks at first; both grow at once, twice; the third time only the older can.
    fill_until_preemption(engine)

    assert young.state == "waiting"
    assert engine.scheduler.num_running == 1


def test_a_preempted_sequence_goes_before_those_that_never_ran() -> None:
    engine = make_engine(num_blocks=17, max_num_sequences=2)
    engine.add([1], params=endless(34))
    young = engine.add([2], params=endless(34))
    newcomer = engine.add([3], params=endless(1))

    fill_until_preemption(engine)

    assert engine.waiting() == [young, newcomer]
    while young.state == "waiting":
        assert newcomer.state == "waiting"
        engine.step()


def test_a_preempted_sequence_repeats_no_token_and_changes_none() -> None:
    engine = make_engine(num_blocks=17)
    sequences = [engine.add([number], params=endless(40)) for number in range(4)]

    engine.run()  # compares each completion with a run alone

    assert sum(s.num_preemptions for s in sequences) == engine.scheduler.num_preemptions > 0
    assert [s.num_completion_tokens for s in sequences] == [40] * 4
    engine.check_at_rest()


def test_nothing_is_admitted_in_a_step_that_preempts() -> None:
    engine = make_engine(num_blocks=17)
    engine.add([1] * 30, params=endless())
    engine.add([2] * 26, params=endless())
    engine.step()
    engine.step()
    engine.add([3], priority=-1, params=endless())

    while not engine.scheduler.num_preemptions:
        batch = engine.schedule()
        execute(engine, batch, set())

    assert batch.num_admitted == 0


def test_a_newcomer_leaves_each_running_sequence_a_block() -> None:
    engine = make_engine(num_blocks=17, max_num_scheduled_tokens=64)
    running = [engine.add([number] * 16, params=endless(4)) for number in (1, 2, 3)]
    engine.step()
    newcomer = engine.add([4] * 8, params=endless(8))

    # 12 blocks, soon 15; two more would fit today and be preempted tomorrow.
    engine.step()

    assert newcomer.state == "waiting"
    engine.run()
    assert [s.num_preemptions for s in (*running, newcomer)] == [0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(6))
def test_a_crowd_in_a_tiny_cache_is_served_in_full(seed: int) -> None:
    """Many preemptions, hits and evictions; every completion equals that of a run alone."""
    source = random.Random(seed)
    engine = make_engine(
        num_blocks=17 + seed,
        max_num_sequences=8,
        max_num_scheduled_tokens=8 + seed,
        share_completion_blocks=bool(seed % 2),
    )
    for number in range(60):
        prompt_ids = ([1, 2, 1, 3] * 16)[: source.randrange(1, 40)]
        params = SamplingParams(max_tokens=source.randrange(30), ignore_eos=source.random() < 0.8)
        for choice in range(source.choice([1, 1, 3])):
            engine.add(prompt_ids, request_id=f"r{number}", choice=choice, params=params)
        if source.random() < 0.5:
            engine.step()

    engine.run()

    assert set(engine.ends.values()) <= {"stop", "length"}
    assert len(engine.ends) == len(engine.sequences)
    assert engine.scheduler.num_preemptions > 10
    assert engine.scheduler.num_prefix_hit_tokens > 100
    engine.check_at_rest()


# Sharing


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
    execute(engine, batch, set())
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
        execute(engine, batch, set())

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


# Aborts


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
    execute(engine, batch, set())
    assert engine.schedule().released_seq_ids == []


# Faults


def test_a_row_that_fails_ends_its_own_sequence_and_no_other() -> None:
    engine = make_engine()
    sequences = [engine.add([number] * 9, params=endless(5)) for number in range(4)]

    execute(engine, engine.schedule(), {2})
    engine.run()

    assert [s.finish_reason for s in sequences] == ["length", "length", "error", "length"]
    assert sequences[2].completion_ids == []
    engine.check_at_rest()


def test_blocks_of_a_failed_row_are_not_shared_and_are_cleared_for_their_next_holder() -> None:
    engine = make_engine(num_blocks=17)
    engine.add([1] * 12, params=endless(5))
    batch = engine.schedule()
    table = set(engine.blocks.block_table(0))
    execute(engine, batch, {0})
    again = engine.add([1] * 60, params=endless(1))

    batch = engine.schedule()

    assert again.num_computed_tokens == 0
    assert set(batch.blocks_to_clear) == table
    execute(engine, batch, set())
    engine.run()
    assert again.finish_reason == "length"


def test_a_failed_row_of_an_aborted_sequence_is_withdrawn_too() -> None:
    engine = make_engine()
    sequence = engine.add([1] * 12)
    batch = engine.schedule()
    engine.scheduler.abort(sequence.request_id)
    execute(engine, batch, {0})

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
    execute(engine, after, set())
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
    execute(engine, engine.schedule(), {0})
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
    execute(engine, batch, set())
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
