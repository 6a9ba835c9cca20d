"""The report of a run on a GPU: Markdown as it grows, and goals with their verdicts."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Goal:
    """A number to reach on an H200 with GPT-2 124M in bfloat16."""

    name: str
    limit: float
    unit: str
    is_at_least: bool = True

    def verdict(self, value: float | None) -> str:
        """Say pass or fail, or that nothing was measured."""
        if value is None:
            return "not measured"
        has_passed = value >= self.limit if self.is_at_least else value <= self.limit
        return "pass" if has_passed else "FAIL"


GOALS = {
    "kernels": Goal("every kernel equals float32 on the CPU", 1, "yes = 1"),
    "bytes": Goal("same bytes in any batch", 1, "yes = 1"),
    "engine": Goal("the engine draws what float32 on the CPU draws", 1, "yes = 1"),
    "draws": Goal("the draw equals its definition", 1, "yes = 1"),
    "graphs": Goal("graphs draw what plain calls draw", 1, "yes = 1"),
    "rounds": Goal("several rounds a step draw what single ones draw", 1, "yes = 1"),
    "1": Goal("1 sequence", 3_500, "tokens/s"),
    "stretch": Goal("1 sequence, beyond the goal", 5_000, "tokens/s"),
    "64": Goal("64 sequences, about 512 tokens long", 80_000, "tokens/s"),
    "256": Goal("256 sequences, about 512 tokens long", 110_000, "tokens/s"),
    "ttft": Goal("first token of 1,023, the engine alone", 5, "ms", is_at_least=False),
    "ttft_http": Goal("first token of 1,023, an idle server", 5, "ms", is_at_least=False),
    "ready": Goal("start to ready, kernels compiled before", 10, "s", is_at_least=False),
    "layer": Goal("kernels a layer in a decode step", 7, "", is_at_least=False),
    "around": Goal("kernels around the layers, greedy", 5, "", is_at_least=False),
    "draw": Goal("a draw with top_k and top_p for 256 rows", 0.5, "ms", is_at_least=False),
    "cost": Goal("what the same bytes cost a step of 64", 10, "%", is_at_least=False),
    "host": Goal("the host's own time a step of 256", 1, "ms", is_at_least=False),
    "peer": Goal("1 sequence, against transformers", 2, "times"),
    "http": Goal("256 streams over HTTP, an event a token", 50_000, "tokens/s"),
    "together": Goal("256 streams over HTTP, several tokens an event", 80_000, "tokens/s"),
    "memory": Goal(
        "memory beside weights and cache, of what the ledger sets aside",
        1,
        "times",
        is_at_least=False,
    ),
}

_CHECKS = ("kernels", "bytes", "engine", "draws", "graphs", "rounds")  # the rest are times


@dataclass(slots=True)
class Report:
    """Markdown as it grows, and the numbers that goals are about."""

    has_times: bool  # that mean something
    parts: list[str] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)

    def add_table(self, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Append a table."""
        lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
        lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
        self.parts.append("\n".join(lines))

    def goals(self) -> str:
        """Every goal with its verdict, those that nothing was measured for included."""
        table = Report(self.has_times)
        rows: list[tuple[str, ...]] = []
        for name, goal in GOALS.items():
            is_known = name in self.values and (self.has_times or name in _CHECKS)
            value = self.values[name] if is_known else None
            bound = "at least" if goal.is_at_least else "at most"
            measured = "-" if value is None else f"{value:,.2f}"
            rows.append(
                (goal.name, f"{bound} {goal.limit:,} {goal.unit}", measured, goal.verdict(value))
            )
        table.add_table(("goal", "limit", "measured", "verdict"), rows)
        return table.parts[0]

    def markdown(self) -> str:
        """The whole report, goals first."""
        return "\n\n".join(["# The GPU path", "## Goals", self.goals(), *self.parts]) + "\n"

    def save(self, out: Path, place: int) -> None:
        """Write `gpu.md`, and `gpu.json` for another process that goes on after part `place`."""
        (out / "gpu.md").write_text(self.markdown(), encoding="utf-8")
        state = json.dumps({"place": place, "parts": self.parts, "values": self.values})
        (out / "gpu.json.new").write_text(state, encoding="utf-8")
        (out / "gpu.json.new").replace(out / "gpu.json")  # whoever reads it reads all of it

    def load(self, out: Path) -> int | None:
        """Take over what was saved; returns the part that ran last, None where none has begun."""
        try:
            state = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        self.parts, self.values = state["parts"], state["values"]
        place: int = state["place"]
        return place
