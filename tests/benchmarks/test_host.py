"""The simulated device, and what its host does beside it."""

from benchmarks.host import measure_host


def test_a_round_takes_what_the_device_takes_and_the_host_waits_for_it() -> None:
    ahead, work = measure_host(
        num_sequences=3, latency=0.02, launch=0.0, is_ahead=True, num_steps=5
    )

    assert ahead >= 0.019  # each round begins when the last one has ended
    assert 0 < work < ahead


def test_where_the_host_comes_between_a_round_takes_both() -> None:
    between, work = measure_host(
        num_sequences=3, latency=0.02, launch=0.0, is_ahead=False, num_steps=5
    )

    assert 0 < work < between
    assert between >= 0.02


def test_several_rounds_take_one_look_of_the_host() -> None:
    ahead, _ = measure_host(
        num_sequences=2, latency=0.01, launch=0.0, is_ahead=True, max_num_rounds=4, num_steps=3
    )

    assert ahead >= 0.009
