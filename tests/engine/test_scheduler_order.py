"""Who comes first, who waits, and who is preempted."""

import random

import pytest

from engine.sampling_params import SamplingParams
from tests.engine.scheduling import endless, fill_until_preemption, make_engine


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
        engine.finish(batch)

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
