"""Where a decode step's time goes between the kernels and a client, in one run (Linux).

`python -m benchmarks.breakdown --model DIR` decodes so many streams with the engine alone and over
HTTP, the load generator on the same cores, and reads what each process has used of the processors;
prompts come from the prefix cache, so nearly all of it is decoding.
A server's own time is Python's, which makes text and events of tokens, and the system's, which
moves them through sockets. `benchmarks.kernels` has the phases within the engine's kernel.
"""

import argparse
import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.contestants import free_port, kvik_command, processor_seconds, started
from benchmarks.decode import measure_decode, random_prompts
from benchmarks.serving import LoadConfig, bench_serving
from engine.config import EngineConfig, LaunchConfig
from engine.loading import load_engine
from engine.sampling_params import SamplingParams

_ROUNDS = 3
_LOADS = 6  # of all streams, one behind the other: processor time has ticks of 10 ms
_PROMPT_WORDS, _PROMPT_TOKENS = 24, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Alone:
    """The engine by itself, seconds a step."""

    greedy: float
    sampled: float
    scheduling: float  # of the greedy step, outside model, head and sampler


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The same over HTTP, seconds a step: by the clock, and of the processors."""

    wall: float
    engine: float
    python: float  # of the server's process: text, JSON, events
    sockets: float  # of the server's process: the system's time
    load: float  # of the load generator


def measure_alone(model: str, dtype: str, counts: list[int], new_tokens: int) -> dict[int, Alone]:
    """Decode without a server."""
    config = EngineConfig(share_completion_blocks=True)
    engine, _ = load_engine(LaunchConfig(model=model, device="cpu", dtype=dtype, engine=config))
    found = {}
    for count in counts:
        prompts = random_prompts(count, _PROMPT_TOKENS, engine.vocab_size)
        plain = SamplingParams(max_tokens=new_tokens, ignore_eos=True, temperature=0)
        kinds = (plain, dataclasses.replace(plain, temperature=0.8, top_p=0.95, seed=1))
        # Turn and turn about: a shared machine is faster in some minutes than in others.
        rounds = [[measure_decode(engine, prompts, kind) for kind in kinds] for _ in range(_ROUNDS)]
        greedy, sampled = (
            sorted(column, key=lambda one: one.step_seconds)[_ROUNDS // 2]
            for column in zip(*rounds, strict=True)
        )
        found[count] = Alone(
            greedy=greedy.step_seconds,
            sampled=sampled.step_seconds,
            scheduling=greedy.outside_seconds,
        )
    return found


def measure_served(model: str, dtype: str, counts: list[int], new_tokens: int) -> dict[int, Served]:
    """Decode behind a server."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    found = {}
    with started("kvik", url, kvik_command(model, dtype, port), timeout_seconds=300) as server:
        (worker,) = (
            Path(f"/proc/{server.session}/task/{server.session}/children").read_text().split()
        )
        for count in counts:
            load = LoadConfig(
                url=url, num_requests=_LOADS * count, concurrency=count, prompt_words=_PROMPT_WORDS,
                max_tokens=new_tokens, temperature=0.0, seed=count,
            )  # fmt: skip
            bench_serving(load)  # and from now on its prompts are in the prefix cache
            pids = (server.session, int(worker), os.getpid())
            before = [processor_seconds(pid) for pid in pids]
            numbers = bench_serving(load)
            used = [
                (own - own_before, system - system_before)
                for (own, system), (own_before, system_before) in zip(
                    map(processor_seconds, pids), before, strict=True
                )
            ]
            steps = numbers["completion_tokens"] / count
            found[count] = Served(
                wall=numbers["seconds"] / steps,
                engine=sum(used[1]) / steps,
                python=used[0][0] / steps,
                sockets=used[0][1] / steps,
                load=sum(used[2]) / steps,
            )
            time.sleep(0.5)
    return found


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "int8", "float32"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=256)
    arguments = parser.parse_args()
    table = Table(
        title="milliseconds a step; behind the bar over HTTP, by the clock and of the processors"
    )
    headings = (
        *("", "streams", "engine alone", "scheduling", "sampling, more", "| over HTTP"),
        *("engine", "server: Python", "server: sockets", "load generator"),
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for dtype in arguments.dtype:
        settings = (arguments.model, dtype, arguments.streams, arguments.new_tokens)
        served = measure_served(*settings)
        alone = measure_alone(*settings)
        for count in arguments.streams:
            one, other = alone[count], served[count]
            values = (
                *(one.greedy, one.scheduling, one.sampled - one.greedy),
                *(other.wall, other.engine, other.python, other.sockets, other.load),
            )
            table.add_row(dtype, str(count), *(f"{1e3 * value:.2f}" for value in values))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
