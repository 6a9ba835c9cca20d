"""Threads that share out phases: every task once, in its phase, whoever comes and whenever."""

import os
import threading
from typing import Any

import numba
import numpy as np
import pytest

from engine.cpu_math import KERNEL
from engine.cpu_tasks import Team, counters, finish, phase_ends, take, wait

NUM_TASKS = 50


@numba.njit(**{**KERNEL, "cache": False})
def add_up(thread: Any, num_threads: Any, counts: Any, values: Any) -> None:
    """In each phase, every value becomes the sum of its neighbours' in the phase before."""
    for phase in range(len(counts)):
        while True:
            task = take(counts, phase)
            if task >= NUM_TASKS:
                break
            before = values[phase]
            after = before[task] + before[(task + 1) % NUM_TASKS] + 1
            values[phase + 1, task] = after % 1_000_003
            finish(counts, phase)
        wait(counts, phase, NUM_TASKS)


@numba.njit(**{**KERNEL, "cache": False})
def take_one(counts: Any) -> None:
    take(counts, 0)


def expected(num_phases: int) -> np.ndarray:
    values = np.arange(NUM_TASKS)
    for _ in range(num_phases):
        values = (values + np.roll(values, -1) + 1) % 1_000_003
    return values


def start_values(num_phases: int) -> np.ndarray:
    values = np.zeros((num_phases + 1, NUM_TASKS), np.int64)
    values[0] = np.arange(NUM_TASKS)
    return values


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_no_phase_begins_before_the_last_is_done(num_threads: int) -> None:
    team = Team(num_threads)

    for _ in range(20):
        values = start_values(300)
        team.run(add_up, counters(300), values)

        assert np.array_equal(values[-1], expected(300))


def test_threads_one_after_another_get_through_as_well() -> None:
    counts, values = counters(10), start_values(10)
    add_up(0, 3, counts, values)
    done = values.copy()

    for late in (1, 2):
        add_up(late, 3, counts, values)

    assert np.array_equal(values[-1], expected(10))
    assert np.array_equal(values, done)


def test_the_caller_does_not_wait_for_one_who_never_comes() -> None:
    team = Team(2)
    gate = threading.Event()

    def kernel(thread: int, _: int, counts: np.ndarray, values: np.ndarray) -> None:
        if thread == 1:
            gate.wait()
        add_up(thread, 2, counts, values)

    counts, values = counters(10), start_values(10)
    team.run(kernel, counts, values)
    gate.set()

    assert np.array_equal(values[-1], expected(10))


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="one core, or a system that does not let us choose",
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_cannot_be_kept_apart_stops_nobody() -> None:
    cores = os.sched_getaffinity(0)
    team = Team(2)
    gone: list[threading.Thread] = []
    is_noted = threading.Event()

    def leave(thread: int, _: int, counts: np.ndarray) -> None:
        if thread == 1:
            gone.append(threading.current_thread())
            is_noted.set()
            raise SystemExit  # of the thread alone

    values = start_values(10)
    try:
        for core in sorted(cores)[:2]:  # wherever the caller was before, it moves
            os.sched_setaffinity(0, {core})
            if not gone:
                team.run(leave, counters(0))
                is_noted.wait()
                gone[0].join()
            else:
                team.run(add_up, counters(10), values)
    finally:
        os.sched_setaffinity(0, cores)

    assert np.array_equal(values[-1], expected(10))


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_what_a_thread_raises_with_a_task_in_hand_ends_the_call_and_no_later_one(
    failing: int,
) -> None:
    team = Team(3)
    has_taken = threading.Event()

    def fail(thread: int, num_threads: int, counts: np.ndarray, values: np.ndarray) -> None:
        if thread == failing:
            take_one(counts)
            has_taken.set()
            raise MemoryError("no room for thread's rows")
        has_taken.wait()
        add_up(thread, num_threads, counts, values)

    for _ in range(3):
        has_taken.clear()
        with pytest.raises(MemoryError, match="no room for thread's rows"):
            team.run(fail, counters(10), start_values(10))

        values = start_values(10)
        team.run(add_up, counters(10), values)

        assert np.array_equal(values[-1], expected(10))
    team.stop()


def test_the_ends_of_phases_are_in_order() -> None:
    counts = counters(8)

    Team(1).run(add_up, counts, start_values(8))

    ends = phase_ends(counts)
    if not ends.any():
        pytest.skip("programs may read no clock on this processor")
    assert (ends > 0).all()
    assert (np.diff(ends) >= 0).all()  # a clock may be slower than a phase
    assert ends[-1] > ends[0]
