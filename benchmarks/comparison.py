"""What every contestant is asked, and what came of it: loads, measurements and medians, as data."""

import dataclasses
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SCENARIOS = ("streams", "ttft", "long", "sampling")
TTFT_PROMPT_WORDS = 512  # and as many tokens of GPT-2: the load generator's words are one each
LONG_PROMPT_WORDS, LONG_MAX_TOKENS = 300, 128
_TTFT_REPEATS = 3
_MOST_LOADS = 100  # of a scenario, so that seeds do not meet


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Streams that begin at once and end by themselves."""

    scenario: str
    name: str
    num_streams: int
    prompt_words: int
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    prompts: int  # loads of the same number send the same prompts in a round

    def seed(self, turn: int) -> int:
        """Of the prompts: the same for every contestant, another in every round."""
        place = turn * len(SCENARIOS) + SCENARIOS.index(self.scenario)
        return place * _MOST_LOADS + self.prompts


def loads_of(
    scenario: str, *, streams: list[int], prompt_words: int = 24, max_tokens: int = 64
) -> list[Load]:
    """The loads of a scenario, in the order in which they are put on a server."""
    plain = Load(
        scenario=scenario, name="greedy", num_streams=max(streams), prompt_words=prompt_words,
        max_tokens=max_tokens, prompts=0,
    )  # fmt: skip
    if scenario == "streams":
        return [
            replace(plain, name=str(count), num_streams=count, prompts=number)
            for number, count in enumerate(streams)
        ]
    if scenario == "ttft":
        first = replace(plain, num_streams=1, prompt_words=TTFT_PROMPT_WORDS, max_tokens=1)
        return [
            replace(first, name=name, prompts=number)
            for number in range(_TTFT_REPEATS)
            for name in ("new", "again")  # again: its prefix is in the cache, if there is one
        ]
    if scenario == "long":
        return [
            replace(plain, name="long", prompt_words=LONG_PROMPT_WORDS, max_tokens=LONG_MAX_TOKENS)
        ]
    if scenario == "sampling":
        return [plain, replace(plain, name="sampled", temperature=0.8, top_p=0.95, prompts=1)]
    raise ValueError(f"scenario must be one of {', '.join(SCENARIOS)}, got {scenario}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One load on one contestant, in one round."""

    contestant: str
    scenario: str
    load: str
    turn: int
    numbers: dict[str, Any]  # as `benchmarks.serving.report` has them; a program's: its tokens/s


@dataclass(slots=True, kw_only=True)
class Comparison:
    """A run: who took part, ours first, under which conditions, and everything measured."""

    conditions: dict[str, Any]
    contestants: list[dict[str, Any]]
    measurements: list[Measurement] = dataclasses.field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write it all as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Comparison":
        """Read what `write` wrote."""
        document = json.loads(path.read_text(encoding="utf-8"))
        document["measurements"] = [Measurement(**item) for item in document["measurements"]]
        return cls(**document)

    def values(
        self, contestant: str, scenario: str, load: str, number: Callable[[dict[str, Any]], float]
    ) -> list[float]:
        """One number of every measurement of this kind, in the order of rounds."""
        return [
            number(one.numbers)
            for one in self.measurements
            if (one.contestant, one.scenario, one.load) == (contestant, scenario, load)
        ]

    def speeds(self, contestant: str) -> dict[int, float]:
        """Median tokens/s by the number of streams."""
        counts = {int(one.load) for one in self.measurements if one.scenario == "streams"}
        found = {
            count: self.values(contestant, "streams", str(count), tokens_per_second)
            for count in sorted(counts)
        }
        return {count: statistics.median(values) for count, values in found.items() if values}

    def figures(self, contestant: str) -> dict[str, float]:
        """What a table shows of a contestant: medians over the rounds, by heading."""
        figures = {
            f"{count} stream{'s' if count > 1 else ''}, tokens/s": speed
            for count, speed in self.speeds(contestant).items()
        }
        for heading, scenario, load, number in _FIGURES:
            if values := self.values(contestant, scenario, load, number):
                figures[heading] = statistics.median(values)
        greedy = self.values(contestant, "sampling", "greedy", tokens_per_second)
        sampled = self.values(contestant, "sampling", "sampled", tokens_per_second)
        if greedy:
            figures["sampling : greedy, tokens/s"] = statistics.median(
                one / other for one, other in zip(sampled, greedy, strict=True)
            )
        return figures


def tokens_per_second(numbers: dict[str, Any]) -> float:
    """Completion tokens a second, all streams together."""
    return float(numbers["tokens_per_second"])


def _milliseconds(name: str, column: str) -> Callable[[dict[str, Any]], float]:
    return lambda numbers: numbers[f"{name}_seconds"][column] * 1e3


_LONG = f"{LONG_PROMPT_WORDS}-word prompts"
_FIGURES = (
    (f"TTFT of {TTFT_PROMPT_WORDS} tokens, ms", "ttft", "new", _milliseconds("ttft", "p50")),
    ("TTFT of the same again, ms", "ttft", "again", _milliseconds("ttft", "p50")),
    (f"{_LONG}, tokens/s", "long", "long", tokens_per_second),
    (f"{_LONG}, TTFT p50, ms", "long", "long", _milliseconds("ttft", "p50")),
    (f"{_LONG}, ITL p50, ms", "long", "long", _milliseconds("itl", "p50")),
    (f"{_LONG}, ITL p99, ms", "long", "long", _milliseconds("itl", "p99")),
)
