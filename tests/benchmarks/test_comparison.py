"""What is asked of Kvik and its peers, and the medians of what came."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.comparison import SCENARIOS, Comparison, Load, Measurement, loads_of


def measured(
    contestant: str, scenario: str, load: str, *speeds: float, **more: Any
) -> list[Measurement]:
    """Measurements of the rounds 1, 2 and so on."""
    return [
        Measurement(
            contestant=contestant, scenario=scenario, load=load, turn=turn,
            numbers={"tokens_per_second": speed, **more},
        )
        for turn, speed in enumerate(speeds, 1)
    ]  # fmt: skip


def comparison(*measurements: list[Measurement]) -> Comparison:
    return Comparison(
        conditions={"dtype": "bfloat16"}, contestants=[{"name": "kvik"}, {"name": "other"}],
        measurements=[one for several in measurements for one in several],
    )  # fmt: skip


def all_loads() -> list[Load]:
    return [load for scenario in SCENARIOS for load in loads_of(scenario, streams=[1, 8, 32])]


def test_only_the_repeated_prompt_is_sent_twice() -> None:
    turns = range(4)

    seeds = {(load.scenario, load.prompts, turn): load.seed(turn)
             for load in all_loads() for turn in turns}  # fmt: skip

    assert len(set(seeds.values())) == len(seeds)
    repeated = [load for load in all_loads() if load.name == "again"]
    assert len(repeated) > 1
    assert len(all_loads()) - len(repeated) == len(seeds) / len(turns)


def test_a_prompt_comes_again_right_after_its_first_time() -> None:
    loads = loads_of("ttft", streams=[1, 8])

    for new, again in zip(loads[::2], loads[1::2], strict=True):
        assert (new.name, again.name) == ("new", "again")
        assert new.seed(1) == again.seed(1)
        assert (new.num_streams, new.prompt_words, new.max_tokens) == (1, 512, 1)


def test_sampling_differs_from_greedy_in_nothing_else() -> None:
    greedy, sampled = loads_of("sampling", streams=[1, 8, 4])

    assert (greedy.temperature, greedy.top_p) == (0, 1)
    assert (sampled.temperature, sampled.top_p) == (0.8, 0.95)
    for name in ("num_streams", "prompt_words", "max_tokens"):
        assert getattr(greedy, name) == getattr(sampled, name)
    assert greedy.num_streams == 8


def test_an_unknown_scenario_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"scenario must be one of .* got sprint"):
        loads_of("sprint", streams=[1])


def test_figures_are_medians_of_one_contestant() -> None:
    found = comparison(
        measured("kvik", "streams", "1", 30, 10, 20),
        measured("other", "streams", "1", 1000),
        measured("kvik", "streams", "8", 100, 300),
    ).figures("kvik")

    assert found == {"1 stream, tokens/s": 20, "8 streams, tokens/s": 200}


def test_speeds_are_in_the_order_of_streams() -> None:
    found = comparison(
        measured("kvik", "streams", "32", 3), measured("kvik", "streams", "8", 2),
    ).speeds("kvik")  # fmt: skip

    assert list(found.items()) == [(8, 2), (32, 3)]


def test_times_are_told_in_milliseconds() -> None:
    times = {"ttft_seconds": {"p50": 0.25}, "itl_seconds": {"p50": 0.5, "p99": 2.0}}

    found = comparison(
        measured("kvik", "ttft", "new", 1, **times),
        measured("kvik", "ttft", "again", 1, ttft_seconds={"p50": 0.125}),
        measured("kvik", "long", "long", 7, **times),
    ).figures("kvik")

    assert found == {
        "TTFT of 512 tokens, ms": 250, "TTFT of the same again, ms": 125,
        "300-word prompts, tokens/s": 7, "300-word prompts, TTFT p50, ms": 250,
        "300-word prompts, ITL p50, ms": 500, "300-word prompts, ITL p99, ms": 2000,
    }  # fmt: skip


def test_sampling_is_held_against_greedy_of_its_own_round() -> None:
    found = comparison(
        measured("kvik", "sampling", "greedy", 10, 100, 1000),
        measured("kvik", "sampling", "sampled", 5, 90, 700),
    ).figures("kvik")

    assert found == {"sampling : greedy, tokens/s": 0.7}


def test_what_is_written_can_be_read_again(tmp_path: Path) -> None:
    written = comparison(measured("kvik", "streams", "1", 1.5, note=None))

    written.write(tmp_path / "run.json")

    assert Comparison.read(tmp_path / "run.json") == written
