"""Kvik beside its peers: real servers that take turns, and everything that was measured."""

import asyncio
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.comparison import Comparison, Measurement, loads_of
from benchmarks.contestants import Program, Server, free_port, kvik_command, started, stopped
from benchmarks.peers import put, run, table_of
from benchmarks.serving import BenchmarkError
from tests.benchmarks.other_server import OtherServer, Write, event, usage
from tests.tiny_models import tiny_checkpoint, tiny_config, tiny_gpt

ROOT = Path(__file__).parents[2]
DONE = b"data: [DONE]\n\n"
OPTIONS = ("--num-threads", "1")
# Prints, as its speed, how many processes stand still whose command names a checkpoint.
COUNT_STOPPED = """
import pathlib, sys
stopped = 0
for folder in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        fields = (folder / "stat").read_text().rpartition(") ")[2].split()
        leader = pathlib.Path("/proc", fields[3], "cmdline").read_text()
    except OSError:
        continue
    stopped += fields[0] == "T" and sys.argv[1] in leader
print(f"batch 1: {stopped}.0 tokens/s")
"""


def states(session: int) -> list[str]:
    """The states of the processes of a session, as Linux abbreviates them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            found.append(fields[0])
    return found


@pytest.fixture(scope="module")
def long_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny, with room for the longest prompts of all scenarios in its small vocabulary."""
    model = tiny_gpt(tiny_config(n_ctx=4096))
    return tiny_checkpoint(tmp_path_factory.mktemp("peers") / "tiny", model=model)


@pytest.fixture(scope="module")
def server(long_checkpoint: Path) -> Iterator[Server]:
    port = free_port()
    command = kvik_command(str(long_checkpoint), "float32", port, *OPTIONS)
    with started("kvik", f"http://127.0.0.1:{port}", command) as running:
        yield running


def test_a_server_is_started_when_it_has_answered(server: Server) -> None:
    (load,) = loads_of("streams", streams=[2], prompt_words=3, max_tokens=4)

    numbers = put(load, server, turn=1)

    assert (numbers["num_requests"], numbers["completion_tokens"]) == (2, 8)
    assert server.start_seconds > 0
    assert server.resident_bytes > 10e6


def test_a_stopped_server_stands_still_with_all_its_processes(server: Server) -> None:
    with stopped([server]):
        deadline = time.monotonic() + 10  # told at once, but a core that runs one has to hear of it
        while (inside := states(server.session)) != ["T", "T"] and time.monotonic() < deadline:
            time.sleep(0.01)

    assert inside == ["T", "T"]  # the server's and the engine's
    assert "T" not in states(server.session)


def test_nothing_of_a_server_outlives_its_block() -> None:
    # It ends without an answer and leaves a child behind.
    # The child is in a group of its own, as our engine is.
    program = (
        "import os, time\n"
        "os.fork() or (os.setpgid(0, 0), time.sleep(300))\n"
        "print('session', os.getpid())"
    )
    command = shlex.join([sys.executable, "-c", program])

    with (
        pytest.raises(BenchmarkError, match=r"no answer at .* session \d+") as caught,
        started("brief", f"http://127.0.0.1:{free_port()}", command),
    ):
        pass

    session = int(str(caught.value).split()[-1])
    deadline = time.monotonic() + 10  # killed, but the system takes its time
    while set(states(session)) - {"Z"} and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(states(session)) - {"Z"}


def test_a_program_that_prints_no_speed_is_told_with_its_words() -> None:
    program = Program(name="mute", command=shlex.join([sys.executable, "-c", "print('hello')"]))

    with pytest.raises(BenchmarkError, match=r"mute printed no line .* hello"):
        program.run()


def test_a_program_counts_where_it_was_asked() -> None:
    words = "print('other batch 8: 612.3 tokens/s'); print('batch 64: 1.0 tokens/s')"
    program = Program(name="other", command=shlex.join([sys.executable, "-c", words]))

    found = run(program, loads_of("streams", streams=[1, 8]), turn=2)

    assert found == [
        Measurement(
            contestant="other", scenario="streams", load="8", turn=2,
            numbers={"tokens_per_second": 612.3},
        )
    ]  # fmt: skip


def test_a_failed_stream_ends_the_comparison() -> None:
    turn = iter(range(10))

    async def send(write: Write) -> None:
        await write(event("a") + (usage(1) + DONE if next(turn) else b""))

    async def measure() -> None:
        async with OtherServer(send).listening() as other:
            server = Server(name="other", url=other.url, session=0, start_seconds=0.0)
            (load,) = loads_of("streams", streams=[3])
            await asyncio.to_thread(put, load, server, turn=1)

    with pytest.raises(BenchmarkError, match=r"other: 1 of 3 streams failed; .* \[DONE\]"):
        asyncio.run(measure())


def test_a_load_is_what_the_server_is_asked() -> None:
    async def send(write: Write) -> None:
        await write(event("a") + usage(1) + DONE)

    async def measure() -> OtherServer:
        async with OtherServer(send).listening() as other:
            server = Server(name="other", url=other.url, session=0, start_seconds=0.0)
            for load in [*loads_of("sampling", streams=[1]), *loads_of("ttft", streams=[1])[:2]]:
                await asyncio.to_thread(put, load, server, turn=1)
            return other

    greedy, sampled, new, again = asyncio.run(measure()).bodies

    assert (greedy["temperature"], greedy.get("top_p", 1)) == (0, 1)
    assert (sampled["temperature"], sampled["top_p"]) == (0.8, 0.95)
    assert len(new["prompt"].split()) == 512
    assert (new, new["max_tokens"]) == (again, 1)


def test_a_ratio_is_ours_by_theirs_and_what_is_unknown_stays_empty() -> None:
    measurements = [
        Measurement(contestant=name, scenario="streams", load=load, turn=1,
                    numbers={"tokens_per_second": speed})
        for name, load, speed in (("kvik", "1", 300.0), ("other", "1", 200.0), ("kvik", "8", 5.0))
    ]  # fmt: skip
    contestants: list[dict[str, Any]] = [{"name": "kvik", "start_seconds": 2.5}, {"name": "other"}]

    table = table_of(Comparison(conditions={}, contestants=contestants, measurements=measurements))
    ours, theirs, ratios = (list(column.cells) for column in table.columns[1:])

    assert ours[:3] == ["300", "5", "2.5"]
    assert theirs[:3] == ["200", "", ""]
    assert ratios[:3] == ["1.50", "", ""]


def test_servers_and_programs_take_turns_over_all_scenarios(
    long_checkpoint: Path, tmp_path: Path
) -> None:
    port = free_port()
    written = tmp_path / "run.json"
    other = kvik_command(str(long_checkpoint), "float32", port, *OPTIONS)
    count = shlex.join([sys.executable, "-c", COUNT_STOPPED, str(long_checkpoint)])

    result = subprocess.run(
        [
            sys.executable, "-m", "benchmarks.peers", "--model", str(long_checkpoint),
            "--dtype", "float32", "--serve-options", shlex.join(OPTIONS),
            "--server", "twin", f"http://127.0.0.1:{port}", other, "--program", "counter", count,
            "--scenarios", "streams", "ttft", "long", "sampling", "--streams", "1", "3",
            "--max-tokens", "3", "--prompt-words", "4", "--rounds", "2", "--json", str(written),
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert result.returncode == 0, result.stderr
    assert "300-word prompts, ITL p99, ms" in result.stdout
    run = Comparison.read(written)
    assert [contestant["name"] for contestant in run.contestants] == ["kvik", "twin", "counter"]
    assert list(run.figures("kvik")) == list(run.figures("twin"))
    assert len(run.figures("kvik")) == 2 + 2 + 4 + 1
    rounds = [one.turn for one in run.measurements if one.load == "3"]
    assert rounds == [1, 1, 2, 2]  # by turns
    # Both servers and their workers stood still; the server of the other tests did not.
    assert run.speeds("counter") == {1: 4.0}
    assert str(tmp_path) not in json.dumps(run.conditions)
