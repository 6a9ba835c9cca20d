"""Kvik over HTTP and its peers, turn and turn about: ratios of medians in one run.

`python -m benchmarks.peers --model DIR --server "llama.cpp bf16" URL COMMAND` serves DIR, starts
COMMAND, and puts the same loads on both by turns, each standing still while the other is measured.
`--program NAME COMMAND` adds a peer that has no HTTP and prints lines such as `batch 8: 612.3
tokens/s`. Both may be given again, for more peers.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.comparison import SCENARIOS, Comparison, Load, Measurement, loads_of
from benchmarks.contestants import Program, Server, free_port, kvik_command, started, stopped
from benchmarks.serving import BenchmarkError, LoadConfig, bench_serving

WARM_TURN = 0  # the round that does not count
_PROCESS_ROWS = (("first answer, s", "start_seconds", 1), ("resident, MB", "resident_bytes", 1e6))


def put(load: Load, server: Server, *, turn: int) -> dict[str, Any]:
    """Put a load on a server; the report. Raises BenchmarkError if any stream failed."""
    config = LoadConfig(
        url=server.url,
        num_requests=load.num_streams,
        concurrency=load.num_streams,
        prompt_words=load.prompt_words,
        max_tokens=load.max_tokens,
        temperature=load.temperature,
        top_p=load.top_p,
        seed=load.seed(turn),
    )
    numbers = bench_serving(config)
    if numbers["num_errors"]:
        raise BenchmarkError(
            f"{server.name}: {numbers['num_errors']} of {load.num_streams} streams failed; "
            f"the first one: {numbers['first_error']}"
        )
    return numbers


def compare(
    servers: list[Server],
    programs: list[Program],
    scenarios: dict[str, list[Load]],
    comparison: Comparison,
    *,
    rounds: int,
    keep: Callable[[], None] = lambda: None,
) -> None:
    """Measure every contestant in every round, alone; `keep` is called after each round.

    Programs take part where streams are counted; how they warm up is their affair.
    """
    for scenario, loads in scenarios.items():
        for turn in range(rounds + 1):
            for server in servers:
                with stopped(other for other in servers if other is not server):
                    for load in loads:
                        numbers = put(load, server, turn=turn)
                        if turn != WARM_TURN:
                            comparison.measurements.append(
                                Measurement(
                                    contestant=server.name, scenario=scenario, load=load.name,
                                    turn=turn, numbers=numbers,
                                )
                            )  # fmt: skip
            if scenario == "streams" and turn != WARM_TURN:
                with stopped(servers):
                    for program in programs:
                        comparison.measurements += run(program, loads, turn=turn)
            keep()


def run(program: Program, loads: list[Load], *, turn: int) -> list[Measurement]:
    """Run a program; what it says of the numbers of streams that were asked for."""
    speeds = program.run()
    return [
        Measurement(
            contestant=program.name, scenario=load.scenario, load=load.name, turn=turn,
            numbers={"tokens_per_second": speeds[load.num_streams]},
        )
        for load in loads
        if load.num_streams in speeds
    ]  # fmt: skip


def table_of(comparison: Comparison) -> Table:
    """Medians, and ours as a ratio to each peer's."""
    ours, *peers = [str(contestant["name"]) for contestant in comparison.contestants]
    table = Table()
    table.add_column("medians")
    table.add_column(ours, justify="right")
    for peer in peers:
        table.add_column(peer, justify="right")
        table.add_column("ratio", justify="right")
    figures = comparison.figures(ours)
    theirs = [comparison.figures(peer) for peer in peers]
    for heading, value in figures.items():
        cells = []
        for other in theirs:
            known = heading in other
            cells.append(_number(other[heading]) if known else "")
            cells.append(f"{value / other[heading]:.2f}" if known else "")
        table.add_row(heading, _number(value), *cells)
    for heading, name, unit in _PROCESS_ROWS:
        values = [one.get(name) for one in comparison.contestants]
        texts = ["" if value is None else _number(value / unit) for value in values]
        table.add_row(heading, texts[0], *(cell for text in texts[1:] for cell in (text, "")))
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.3g}"


def _conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "processor": names[0] if names else platform.processor(),
        "num_processors": os.cpu_count(),
        "torch": importlib.metadata.version("torch"),
        "model": Path(arguments.model).name,
        "dtype": arguments.dtype,
        "rounds": arguments.rounds,
        "prompt_words": arguments.prompt_words,
        "max_tokens": arguments.max_tokens,
    }


def main() -> None:
    """Compare our server with its peers, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--server", nargs=3, action="append", default=[], metavar=("NAME", "URL", "COMMAND"),
        help="an OpenAI-style server and how it is started",
    )  # fmt: skip
    parser.add_argument(
        "--program", nargs=2, action="append", default=[], metavar=("NAME", "COMMAND"),
        help="a command that prints its tokens/s",
    )  # fmt: skip
    parser.add_argument("--scenarios", choices=SCENARIOS, nargs="+", default=["streams"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-words", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve-options", default="", help="more options of `kvik serve`")
    parser.add_argument("--json", type=Path, help="write everything measured")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that servers end with us

    port = free_port()
    ours = kvik_command(
        arguments.model, arguments.dtype, port, *shlex.split(arguments.serve_options)
    )
    wanted = [["kvik", f"http://127.0.0.1:{port}", ours], *arguments.server]
    programs = [Program(name=name, command=command) for name, command in arguments.program]
    scenarios = {
        name: loads_of(
            name, streams=arguments.streams, prompt_words=arguments.prompt_words,
            max_tokens=arguments.max_tokens,
        )
        for name in arguments.scenarios
    }  # fmt: skip
    comparison = Comparison(conditions=_conditions(arguments), contestants=[])

    def keep() -> None:
        if arguments.json is not None:
            comparison.write(arguments.json)

    try:
        with ExitStack() as stack:
            servers: list[Server] = []
            for name, url, command in wanted:
                with stopped(servers):
                    servers.append(stack.enter_context(started(name, url, command)))
            comparison.contestants += [
                {"name": server.name, "start_seconds": server.start_seconds} for server in servers
            ]
            comparison.contestants += [{"name": program.name} for program in programs]
            compare(servers, programs, scenarios, comparison, rounds=arguments.rounds, keep=keep)
            for server, contestant in zip(servers, comparison.contestants, strict=False):
                contestant["resident_bytes"] = server.resident_bytes
            keep()
    except BenchmarkError as error:
        raise SystemExit(str(error)) from None
    console = Console()
    console.print(
        ", ".join(f"{name} {value}" for name, value in comparison.conditions.items())
        + f"; medians of {arguments.rounds} rounds, turn and turn about; a ratio is ours : theirs"
    )
    console.print(table_of(comparison))


if __name__ == "__main__":
    main()
