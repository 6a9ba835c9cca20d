"""Kvik over HTTP against a peer's own program, turn and turn about: ratios of medians in one run.

`python -m benchmarks.peers --model DIR --peer "COMMAND"` serves DIR and alternates streams over
HTTP with the command, which prints lines such as `batch 8: 612.3 tokens/s`, as offline benchmarks
of other engines do. The server stands still while the peer runs.
"""

import argparse
import asyncio
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.serving import LoadConfig, measure_serving

_SPEED = re.compile(r"batch (\d+): ([\d.]+) tokens/s")


@contextmanager
def served(model: str, dtype: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server of our own in a group of processes of its own, until the end of the block."""
    command = [sys.executable, "-m", "kvik", "serve", "--model", model, "--dtype", dtype]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--served-model-name", "gpt2"],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not _is_ready(port):
            if process.poll() is not None:
                raise SystemExit(
                    f"kvik serve ended with {process.returncode}; its words are above."
                )
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        process.wait()


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _resident_bytes(group: int) -> int:
    """What the processes of a group hold in memory together (Linux)."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(") ")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[2]) == group:
            total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return total


def run_peer(command: str) -> dict[int, float]:
    """Run a peer's program; tokens a second by the number of streams."""
    result = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
    speeds = {int(count): float(speed) for count, speed in _SPEED.findall(result.stdout)}
    if not speeds:
        raise SystemExit(
            "The peer printed no line such as 'batch 8: 612.3 tokens/s': "
            f"{(result.stderr or result.stdout)[-500:]}"
        )
    return speeds


def main() -> None:
    """Alternate our server and a peer, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peer", required=True, help="a command that prints its tokens/s")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-words", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8123)
    arguments = parser.parse_args()

    ours: dict[int, list[float]] = {count: [] for count in arguments.streams}
    theirs: dict[int, list[float]] = {count: [] for count in arguments.streams}
    began = time.perf_counter()
    with served(arguments.model, arguments.dtype, arguments.port) as server:
        ready = time.perf_counter() - began

        def load(count: int, seed: int, temperature: float = 0.0) -> float:
            config = LoadConfig(
                url=f"http://127.0.0.1:{arguments.port}", model="gpt2", num_requests=count,
                concurrency=count, prompt_words=arguments.prompt_words,
                max_tokens=arguments.max_tokens, temperature=temperature, seed=seed,
            )  # fmt: skip
            return float(asyncio.run(measure_serving(config))["tokens_per_second"])

        for count in arguments.streams:
            load(count, seed=0)
        for turn in range(arguments.rounds):
            for count in arguments.streams:
                ours[count].append(load(count, seed=turn + 1))
            os.killpg(server.pid, signal.SIGSTOP)
            try:
                speeds = run_peer(arguments.peer)
            finally:
                os.killpg(server.pid, signal.SIGCONT)
            for count in arguments.streams:
                theirs[count].append(speeds[count])

        most = arguments.streams[-1]
        sampled: list[float] = []
        for turn in range(arguments.rounds):
            greedy = load(most, seed=100 + turn)
            sampled.append(load(most, seed=200 + turn, temperature=0.8) / greedy)
        resident = _resident_bytes(server.pid)

    console = Console()
    console.print(
        f"{arguments.dtype}, prompts of {arguments.prompt_words} words, {arguments.max_tokens} new "
        f"tokens, medians of {arguments.rounds} rounds; ready {ready:.1f} s after the start, "
        f"{resident / 1e6:,.0f} MB resident; at {most} streams sampling at temperature 0.8 gave "
        f"{statistics.median(sampled):.2f} of greedy's tokens/s"
    )
    table = Table()
    for heading in ("streams", "kvik over HTTP, tokens/s", "peer, tokens/s", "ratio"):
        table.add_column(heading, justify="right")
    for count in arguments.streams:
        mine, other = statistics.median(ours[count]), statistics.median(theirs[count])
        table.add_row(str(count), f"{mine:,.0f}", f"{other:,.0f}", f"{mine / other:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
