"""Load on servers: what is measured is what was waited for, and what failed is counted as such."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.serving import (
    PERCENTILES,
    BenchmarkError,
    LoadConfig,
    StreamResult,
    measure_serving,
    percentile,
    report,
    table_of,
)
from kvik.command_line import app
from tests.benchmarks.other_server import HEAD, OtherServer, Write, event, usage
from tests.server.live import LiveServer
from tests.tiny_models import tiny_checkpoint, tiny_config, tiny_gpt

DONE = b"data: [DONE]\n\n"


def measure(
    stream: Callable[[Write], Awaitable[None]], *, head: bytes | None = None, **options: Any
) -> tuple[dict[str, Any], OtherServer]:
    """Put a load on a server that streams like this; the report, and what the server saw."""
    server = OtherServer(stream) if head is None else OtherServer(stream, head)

    async def run() -> dict[str, Any]:
        async with server.listening():
            return await measure_serving(LoadConfig(url=server.url, **options))

    return asyncio.run(asyncio.wait_for(run(), 100)), server


def failure(stream: Callable[[Write], Awaitable[None]], *, head: bytes | None = None) -> str:
    """What the report says of streams that all fail like this."""
    with pytest.raises(BenchmarkError) as caught:
        measure(stream, head=head, num_requests=2)
    return str(caught.value)


async def quick(write: Write) -> None:
    await write(event("a") + usage(1) + DONE)


def paced(first: float, between: float, count: int) -> Callable[[Write], Awaitable[None]]:
    """A stream of `count` tokens at known moments."""

    async def stream(write: Write) -> None:
        await asyncio.sleep(first)
        for number in range(count):
            if number:
                await asyncio.sleep(between)
            await write(event("x"))
        await write(usage(count) + DONE)

    return stream


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_percentiles_are_numpy_s(count: int) -> None:
    values = [random.Random(count).expovariate(1) for _ in range(count)]

    for percent in (0, *PERCENTILES, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def result(*arrivals: float, num_tokens: int | None = None) -> StreamResult:
    return StreamResult(
        started_at=10.0, arrivals=list(arrivals), ended_at=arrivals[-1] + 0.5,
        num_tokens=len(arrivals) if num_tokens is None else num_tokens,
    )  # fmt: skip


def test_a_report_is_arithmetic_over_what_clients_saw() -> None:
    config = LoadConfig(url="http://x", api_key="secret")
    results = [
        result(11.0, 11.25, 11.75),
        result(12.0),
        StreamResult(started_at=10.0, ended_at=10.1, error="status 500: no"),
    ]

    numbers = json.loads(json.dumps(report(config, "m", results, 8.0)))

    assert (numbers["num_requests"], numbers["num_errors"]) == (3, 1)
    assert numbers["first_error"] == "status 500: no"
    assert (numbers["completion_tokens"], numbers["tokens_per_second"]) == (4, 0.5)
    assert numbers["requests_per_second"] == 2 / 8
    assert numbers["ttft_seconds"] == pytest.approx(
        {"mean": 1.5, "p50": 1.5, "p90": 1.9, "p95": 1.95, "p99": 1.99, "max": 2.0}
    )
    assert numbers["itl_seconds"]["mean"] == pytest.approx((0.25 + 0.5) / 2)
    assert numbers["e2e_seconds"]["max"] == pytest.approx(2.5)
    assert numbers["settings"]["model"] == "m"
    assert numbers["loop"] == "closed"
    assert "secret" not in json.dumps(numbers)


@pytest.mark.parametrize(
    ("seen", "num_good"),
    [
        (result(11.0, 11.1), 1),  # just good enough, in both
        (result(11.01, 11.1), 0),  # the first token too late
        (result(10.5, 10.5 + 0.11), 0),  # too slow afterwards
        (result(10.5, 10.7, num_tokens=5), 1),  # 0.2 s, but for four tokens
        (result(11.0), 1),  # a lone token waits for nothing
    ],
)
def test_goodput_counts_what_came_in_time_and_at_pace(seen: StreamResult, num_good: int) -> None:
    config = LoadConfig(url="http://x", good_ttft_seconds=1.0, good_itl_seconds=0.1 + 1e-9)

    numbers = report(config, "m", [seen], 2.0)

    assert numbers["goodput_requests_per_second"] == num_good / 2


def test_delays_of_another_server_are_found_again() -> None:
    numbers, server = measure(paced(0.3, 0.1, 5), num_requests=6, concurrency=3, max_tokens=5)

    assert numbers["completion_tokens"] == 6 * 5
    assert numbers["num_errors"] == 0
    # Never less than was waited; medians, as a busy machine makes some of them longer.
    assert 0.299 < numbers["ttft_seconds"]["p50"] < 0.45
    assert 0.09 < numbers["itl_seconds"]["p50"] < 0.2
    assert 0.699 < numbers["e2e_seconds"]["p50"] < 1.1
    assert numbers["seconds"] > 2 * 0.699  # three at a time
    assert server.max_open == 3


def test_a_request_is_what_openai_s_clients_send() -> None:
    _, server = measure(
        quick, num_requests=3, api_key="sesame", prompt_words=7, max_tokens=9, ignore_eos=False,
        temperature=0.5,
    )  # fmt: skip

    assert server.keys == ["Bearer sesame"] * 3
    for body in server.bodies:
        assert len(body.pop("prompt").split()) == 7
        assert body == {
            "model": "other-1", "max_tokens": 9, "temperature": 0.5, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip


def test_the_open_loop_does_not_wait_for_the_server() -> None:
    slow = paced(2.0, 0, 1)

    numbers, server = measure(slow, num_requests=40, rate=50.0)

    assert numbers["loop"] == "open"
    assert server.max_open == 40  # the last began before the first had ended
    gaps = np.diff(server.began_at)
    assert 0.4 < gaps.sum() < 1.6  # 39 gaps of 1/50 s on average
    assert gaps.std() > 0.3 * gaps.mean()  # of a Poisson process, and not of a metronome


def test_the_closed_loop_has_so_many_streams_and_no_more() -> None:
    _, server = measure(paced(0.02, 0, 1), num_requests=10, concurrency=4)

    assert server.max_open == 4
    assert len(server.bodies) == 10


@pytest.mark.parametrize(
    "stream",
    [
        [event("ab", usage=None), event("c", usage=None), usage(7), DONE],
        [b": a comment\n\n", event("a").replace(b"data: ", b"data:"), event("b"), usage(7), DONE],
        [event("a").replace(b"\n", b"\r\n"), event("b"), usage(7), DONE],
        [
            event("a")[:20],
            event("a")[20:] + event("b")[:9],
            event("b")[9:],
            usage(7),
            DONE[:9],
            DONE[9:],
        ],
        [event("a"), event(""), event("b"), usage(7), DONE],
        [event("a"), event("b"), event("", usage={"completion_tokens": 7}), DONE],
    ],
    ids=[
        "null usage",
        "comment",
        "carriage returns",
        "cut anywhere",
        "no text",
        "usage in a chunk",
    ],
)
def test_streams_may_be_spelled_in_many_ways(stream: list[bytes]) -> None:
    async def send(write: Write) -> None:
        for data in stream:
            await write(data)
            await asyncio.sleep(0.01)

    numbers, _ = measure(send, num_requests=1)

    assert numbers["completion_tokens"] == 7
    assert numbers["itl_seconds"]["max"] > 0


def test_a_server_that_sends_chunks_all_the_same_is_understood() -> None:
    async def send(write: Write) -> None:
        for data in (event("a"), event("b"), usage(2), DONE):
            await write(b"%x\r\n%b\r\n" % (len(data), data))
        await write(b"0\r\n\r\n")

    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    numbers, _ = measure(send, head=head, num_requests=1)

    assert numbers["completion_tokens"] == 2


def test_without_usage_chunks_with_text_are_the_tokens() -> None:
    async def send(write: Write) -> None:
        await write(event("a") + event("") + event("b") + DONE)

    numbers, _ = measure(send, num_requests=1)

    assert numbers["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (event("a") + b'data: {"error": {"message": "it broke"}}\n\n', "it broke"),
        (event("a"), "ended without [DONE]"),
        (usage(3) + DONE, "without text"),
        (b"data: {nonsense\n\n", "Expecting property name"),
        (b"data: []\n\n", "of another shape"),
        (b'data: {"choices": [3]}\n\n', "of another shape"),
        (event("a", usage={"tokens": 3}) + DONE, "of another shape"),
    ],
)
def test_a_stream_that_fails_says_how(data: bytes, said: str) -> None:
    async def send(write: Write) -> None:
        await write(data)

    assert said in failure(send)


def test_a_refusal_is_told_with_its_status() -> None:
    async def send(write: Write) -> None:
        await write(b'{"error": {"message": "too busy"}}')

    said = failure(send, head=b"HTTP/1.1 429 Too Many\r\nContent-Type: application/json\r\n\r\n")

    assert "status 429" in said
    assert "too busy" in said


def test_what_is_no_http_is_told() -> None:
    assert "no HTTP" in failure(quick, head=b"220 mail.example ESMTP\r\n")


def test_failures_are_counted_beside_what_came_through() -> None:
    turn = iter(range(100))

    async def send(write: Write) -> None:
        await quick(write) if next(turn) % 4 else await write(event("a"))

    numbers, _ = measure(send, num_requests=8, concurrency=2)

    assert (numbers["num_requests"], numbers["num_errors"]) == (8, 2)
    assert numbers["completion_tokens"] == 6
    assert "1 errors" not in str(table_of(numbers).title)
    assert "2 errors" in str(table_of(numbers).title)


def test_a_stream_that_hangs_is_given_up() -> None:
    async def hang(write: Write) -> None:
        await write(event("a"))
        await asyncio.sleep(60)

    with pytest.raises(BenchmarkError, match="timeout"):
        measure(hang, num_requests=1, timeout_seconds=0.2)


@pytest.mark.parametrize(
    "options",
    [
        {"url": "ftp://x"}, {"url": "127.0.0.1:8000"}, {"num_requests": 0}, {"concurrency": 0},
        {"rate": 0.0}, {"rate": float("inf")}, {"max_tokens": 0}, {"prompt_words": 0},
        {"top_p": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_an_impossible_load_names_its_field(options: dict[str, Any]) -> None:
    (field,) = options
    with pytest.raises(ValueError, match=field):
        LoadConfig(**{"url": "http://x", **options})


def test_nobody_at_the_address_is_a_sentence() -> None:
    run = CliRunner().invoke(app, ["bench", "serve", "http://127.0.0.1:9", "--num-requests", "1"])

    assert run.exit_code == 1
    assert "cannot be reached" in run.output
    assert "Traceback" not in run.output


def test_a_live_server_is_measured_from_the_command_line(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", model=tiny_gpt(tiny_config(n_ctx=256)))
    live = LiveServer(checkpoint, tmp_path / "stderr", "--api-key", "sesame").wait_until_ready()
    written = tmp_path / "report.json"
    load = ["bench", "serve", live.url, "--num-requests", "1", "--max-tokens", "4"]
    try:
        locked_out = CliRunner().invoke(app, load)
        unwritten = CliRunner().invoke(
            app, [*load, "--api-key", "sesame", "--report", str(tmp_path / "nowhere" / "report")]
        )
        run = CliRunner().invoke(
            app,
            [
                "bench", "serve", live.url, "--api-key", "sesame", "--num-requests", "12",
                "--concurrency", "4", "--max-tokens", "20", "--prompt-words", "5",
                "--report", str(written),
            ],
        )  # fmt: skip
        with live.client(headers={"Authorization": "Bearer sesame"}) as client:
            metrics = client.get("/metrics").text
    finally:
        live.kill()

    assert run.exit_code == 0, run.output
    assert all(heading in run.output for heading in ("TTFT", "ITL", "end to end"))
    numbers = json.loads(written.read_text())
    assert (numbers["num_requests"], numbers["num_errors"]) == (12, 0)
    assert numbers["completion_tokens"] == 12 * 20
    assert "kvik_generation_tokens_total 244.0" in metrics
    assert "wants another API key than none: name it with --api-key." in locked_out.stderr
    assert "end to end" in unwritten.stdout  # what was measured is not lost
    assert "report cannot be written: No such file or directory." in unwritten.stderr
    assert set(numbers) == {
        "settings", "loop", "seconds", "num_requests", "num_errors", "first_error",
        "completion_tokens", "events", "tokens_per_second", "requests_per_second",
        "goodput_requests_per_second", "ttft_seconds", "itl_seconds", "e2e_seconds",
    }  # fmt: skip
