"""Tokens/s against streams, a panel for each precision, in colours for light pages and dark ones.

`python -m benchmarks.picture RUN.json ... --out PICTURE.svg` draws what `benchmarks.peers --json`
wrote; it needs the extra `bench`. Only ratios of one run count, so where runs of one precision meet
in a panel, each peer is drawn at the ratio to us that it had in its own run.
"""

import argparse
import io
import itertools
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.comparison import Comparison

Lines = dict[str, dict[int, float]]  # tokens/s by name and number of streams

# A browser that asks for dark pages gets the second of each.
_INK = ("#1f2328", "#e6edf3")
_PAPER = ("#ffffff", "#0d1117")
_GRID = ("#d8dee4", "#30363d")
_OURS = ("#0969da", "#58a6ff")
_THEIRS = (
    ("#bc4c00", "#f0883e"),
    ("#1a7f37", "#3fb950"),
    ("#8250df", "#bc8cff"),
    ("#57606a", "#8b949e"),
    ("#9a6700", "#d29922"),
)
_COLOURS = (_INK, _PAPER, _GRID, _OURS, *_THEIRS)
_SETTINGS = {
    "svg.hashsalt": "kvik",  # no chance in the file: the same numbers are the same bytes
    "svg.fonttype": "path",
    "font.size": 9,
    "text.color": _INK[0],
    "axes.labelcolor": _INK[0],
}
_LABEL_POINTS = 11  # between the middles of two labels, at least
_LEFT_INCHES, _PLOT_INCHES, _LABEL_INCHES, _HEIGHT_INCHES = 0.65, 2.0, 1.1, 3.5


def panels_of(comparisons: list[Comparison]) -> dict[str, Lines]:
    """The lines of each precision, in the order in which they come, ours first.

    Raises ValueError if no run has speeds by the number of streams; those without are left out.
    """
    runs: dict[str, list[Comparison]] = {}
    for one in comparisons:
        if any(measurement.scenario == "streams" for measurement in one.measurements):
            runs.setdefault(one.conditions["dtype"], []).append(one)
    if not runs:
        raise ValueError("None of the runs has the scenario `streams`: there is nothing to draw.")
    return {dtype: _lines_of(several) for dtype, several in runs.items()}


def _lines_of(runs: list[Comparison]) -> Lines:
    """Ours by the median of all runs, each peer by its ratio to ours in those it took part in."""
    ours: dict[int, list[float]] = {}
    ratios: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        our_name, *peers = [str(contestant["name"]) for contestant in run.contestants]
        our_speeds = run.speeds(our_name)
        for count, speed in our_speeds.items():
            ours.setdefault(count, []).append(speed)
        for peer in peers:
            for count, speed in run.speeds(peer).items():
                found = ratios.setdefault(peer, {}).setdefault(count, [])
                found.append(speed / our_speeds[count])
    line = {count: statistics.median(speeds) for count, speeds in sorted(ours.items())}
    return {our_name: line} | {
        peer: {
            count: line[count] * statistics.median(found) for count, found in sorted(counts.items())
        }
        for peer, counts in ratios.items()
    }


def engine_of(name: str) -> str:
    """The engine in a contestant's name, which has one colour in every panel."""
    return name.split()[0]


def spread(heights: list[float], distance: float) -> list[float]:
    """Heights at least so far from each other, in the same order, none lower than before."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    moved = list(heights)
    for below, above in itertools.pairwise(order):
        moved[above] = max(moved[above], moved[below] + distance)
    return moved


def draw(comparisons: list[Comparison]) -> str:
    """The picture as SVG; the same text for the same numbers."""
    panels = panels_of(comparisons)
    colours = _colours_of(panels)
    with matplotlib.rc_context(_SETTINGS):
        width = _LEFT_INCHES + len(panels) * (_PLOT_INCHES + _LABEL_INCHES)
        figure = Figure(figsize=(width, _HEIGHT_INCHES), facecolor=_PAPER[0])
        first: Any = None
        for number, (dtype, lines) in enumerate(panels.items()):
            left = _LEFT_INCHES + number * (_PLOT_INCHES + _LABEL_INCHES)
            place = (left / width, 0.14, _PLOT_INCHES / width, 0.76)
            axes: Any = figure.add_axes(place, sharex=first, sharey=first)
            axes.set_title(dtype, loc="left", fontweight="bold")
            _draw_lines(axes, lines, colours)
            axes.tick_params(labelleft=first is None)
            first = first or axes
        first.set_ylabel("tokens/s")
        first.set_xlim(0)
        first.set_ylim(0)
        for axes, lines in zip(figure.axes, panels.values(), strict=True):
            _write_labels(axes, lines, colours)
        data = io.StringIO()
        figure.savefig(
            data, format="svg",
            metadata={"Date": None, "Creator": None, "Title": "Tokens a second against streams"},
        )  # fmt: skip
    return _with_dark_colours(data.getvalue())


def _colours_of(panels: dict[str, Lines]) -> dict[str, str]:
    """A colour for each engine, ours first."""
    names = [name for lines in panels.values() for name in lines]
    ours = engine_of(names[0])
    theirs = [engine for engine in dict.fromkeys(map(engine_of, names)) if engine != ours]
    return {ours: _OURS[0]} | {
        engine: _THEIRS[number % len(_THEIRS)][0] for number, engine in enumerate(theirs)
    }


def _draw_lines(axes: Any, lines: Lines, colours: dict[str, str]) -> None:
    for name, speeds in lines.items():
        colour = colours[engine_of(name)]
        is_ours = colour == _OURS[0]
        axes.plot(
            list(speeds), list(speeds.values()), marker="o", color=colour,
            markersize=4.5 if is_ours else 3.5, linewidth=2.4 if is_ours else 1.3,
            zorder=3 if is_ours else 2,
        )  # fmt: skip
    axes.set_xticks(list(next(iter(lines.values()))))
    axes.set_xlabel("streams")
    axes.grid(axis="y", color=_GRID[0], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(length=0, colors=_INK[0])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_INK[0])


def _write_labels(axes: Any, lines: Lines, colours: dict[str, str]) -> None:
    """Each line's name at its end, none over another."""
    ends = {name: max(speeds.items()) for name, speeds in lines.items()}
    points = axes.bbox.height / axes.figure.dpi * 72  # of the panel
    distance = axes.get_ylim()[1] * _LABEL_POINTS / points
    heights = spread([speed for _, speed in ends.values()], distance)
    for (name, (count, _)), height in zip(ends.items(), heights, strict=True):
        colour = colours[engine_of(name)]
        axes.annotate(
            name, (count, height), xytext=(7, 0), textcoords="offset points", va="center",
            color=colour, fontweight="bold" if colour == _OURS[0] else "normal",
            annotation_clip=False,
        )  # fmt: skip


def _with_dark_colours(svg: str) -> str:
    """Rules that give every colour its dark counterpart where the reader's pages are dark."""
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}'
        for light, dark in _COLOURS
        for kind in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>"
    return svg.replace("</svg>", f"{style}\n</svg>")


def main() -> None:
    """Draw what runs wrote."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        picture = draw([Comparison.read(path) for path in arguments.runs])
    except ValueError as error:
        raise SystemExit(str(error)) from None
    arguments.out.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
