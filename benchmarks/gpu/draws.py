"""The draw at full size: whether it equals its definition on the device, and how long both take."""

import dataclasses

import torch
from torch import Tensor

from benchmarks.gpu.report import Report
from benchmarks.gpu.workbench import Workbench
from engine import draw_triton
from engine.draw import Draw, Filters
from engine.draw import draw as draw_by_definition
from engine.random_stream import NoiseKeys
from engine.sampling_params import COLDEST

# How rows are filtered: top_k (0 is off), top_p, min_p; None where nothing filters.
_KINDS: dict[str, tuple[int, float, float] | None] = {
    "temperature alone": None,
    "top_p 0.95": (0, 0.95, 0.0),
    "top_k 50": (50, 1.0, 0.0),
    "top_k 50, top_p 0.9": (50, 0.9, 0.0),
    "top_k 5000, top_p 0.5": (5000, 0.5, 0.0),
    "min_p 0.05": (0, 1.0, 0.05),
    "top_p 0.1, min_p 0.001": (0, 0.1, 0.001),
}
_GOAL = "top_k 50, top_p 0.9"


@dataclasses.dataclass(frozen=True, slots=True)
class _Rows:
    """What is drawn from."""

    logits: Tensor
    temperature: Tensor
    keys: NoiseKeys
    filters: Filters | None

    def draw(self, draw: Draw) -> Tensor:
        return draw(self.logits, self.temperature, self.keys, self.filters)

    def some(self, places: slice) -> "_Rows":
        """Some of the rows."""
        keys, filters = self.keys, self.filters
        if filters is not None:
            filters = Filters(
                filters.top_k[places], filters.top_p[places], filters.min_p[places],
                filters.typical_p[places], has_typical_p=False,
            )  # fmt: skip
        keys = NoiseKeys(keys.seed[places], keys.choice[places], keys.position[places])
        return _Rows(self.logits[places], self.temperature[places], keys, filters)


def check_draws(bench: Workbench, report: Report) -> None:
    """Compare draws with the definition's, and those of a few rows with those among many."""
    num_rows = 5 if bench.is_smoke else 256
    found: list[tuple[object, ...]] = []
    try:
        for shape in ("flat", "peaked", "tied"):
            logits = _make_logits(bench, shape, num_rows)
            for name, kind in {**_KINDS, "all of these": None}.items():
                rows = _make_rows(bench, logits, kind)
                if name == "all of these":
                    rows = dataclasses.replace(rows, filters=_mixed_filters(bench, num_rows))
                found.append((shape, name, *_compare(rows)))
    finally:  # what was found before a failure says where it lies
        headings = ("logits", "filters", f"other tokens of {num_rows}", "the same in few")
        report.add_table((*headings, "verdict"), found)
    report.values["draws"] = float(all(row[-1] == "pass" for row in found))


def _compare(rows: _Rows) -> tuple[int, str, str]:
    drawn = rows.draw(draw_triton.draw)
    num_other = int((drawn != rows.draw(draw_by_definition)).sum())
    few = [rows.some(slice(1, 2)), rows.some(slice(2, 5))]
    alone = torch.cat([one.draw(draw_triton.draw) for one in few])
    is_same = torch.equal(alone, drawn[1:5])
    verdict = "pass" if num_other == 0 and is_same else "FAIL"
    return num_other, "yes" if is_same else "NO", verdict


def time_draws(bench: Workbench, report: Report) -> None:
    """Time draws, then the definition's, which sorts whole rows."""
    counts = (1, 2) if bench.is_smoke else (1, 64, 256)
    drawn_by: tuple[tuple[str, Draw, tuple[str, ...]], ...] = (
        ("our kernels", draw_triton.draw, ("flat", "peaked")),
        ("the definition", draw_by_definition, ("peaked",)),
    )
    for name, draw, shapes in drawn_by:
        found = []
        for shape in shapes:
            times: dict[str, list[float]] = {kind: [] for kind in _KINDS}
            for count in counts:
                logits = _make_logits(bench, shape, count)
                for kind, filters in _KINDS.items():
                    rows = _make_rows(bench, logits, filters)
                    rows = dataclasses.replace(rows, temperature=torch.ones_like(rows.temperature))
                    seconds = bench.seconds(lambda: rows.draw(draw), count=4)  # noqa: B023  called at once
                    times[kind].append(seconds)
            found += [
                (shape, kind, *(f"{t * 1e6:.0f}" for t in row)) for kind, row in times.items()
            ]
            if draw is draw_triton.draw and shape == "peaked":
                report.values["draw"] = times[_GOAL][-1] * 1e3
        report.parts.append(f"A draw by {name}:")
        headings = ("logits", "filters", *(f"us, {count} rows" for count in counts))
        report.add_table(headings, found)


def _make_logits(bench: Workbench, shape: str, num_rows: int) -> Tensor:
    """Logits (R, V): flat, as of random weights; peaked, as words are; or with many equals."""
    size = (num_rows, bench.config.vocab_size)
    logits = torch.randn(size, device=bench.device)
    if shape == "peaked":
        ranks = torch.rand(size, device=bench.device).argsort(1) + 1
        return 0.7 * logits - 1.3 * ranks.log() - 90
    if shape == "tied":
        return (4 * logits).round() / 2
    return 0.3 * logits


def _make_rows(bench: Workbench, logits: Tensor, kind: tuple[int, float, float] | None) -> _Rows:
    """Rows of several temperatures, greedy ones among them, all filtered alike."""
    places = torch.arange(len(logits), device=bench.device)
    temperature = 0.5 + places.double() % 7 / 6
    temperature[3::8] = COLDEST
    keys = NoiseKeys(places * 2**40 + 5, places % 3, places + 100)
    filters = None
    if kind is not None:
        top_k, top_p, min_p = (torch.full_like(temperature, value) for value in kind)
        filters = _make_filters(bench, top_k, top_p, min_p)
    return _Rows(logits, temperature, keys, filters)


def _mixed_filters(bench: Workbench, num_rows: int) -> Filters:
    kinds = [kind or (0, 1.0, 0.0) for kind in _KINDS.values()]
    table = torch.tensor(kinds, dtype=torch.float64, device=bench.device)
    places = torch.arange(num_rows, device=bench.device) % len(kinds)
    return _make_filters(bench, *table[places].unbind(1))


def _make_filters(bench: Workbench, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Filters:
    vocab_size = bench.config.vocab_size
    top_k = top_k.long()
    return Filters(
        top_k.where(top_k > 0, vocab_size).clamp(max=vocab_size),
        top_p,
        min_p,
        torch.ones_like(top_p),
        has_typical_p=False,
    )
