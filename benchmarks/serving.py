"""Load on any OpenAI-style server, over HTTP: what its clients wait for; knows nothing of engines.

Closed loop: so many streams at any time, each beginning when another has ended. Open loop: streams
begin at the moments of a Poisson process, however slow the server is, so that its queue shows.
"""

import asyncio
import dataclasses
import json
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from rich.table import Table

PERCENTILES = (50, 90, 95, 99)
_RECEIVE_BYTES = 2**18
_END = b"\ndata: [DONE]"  # in no event: there a line's end is written as two characters
_WORDS = ("the", "and", "a", "to", "of", "in", "was", "that", "he", "she", "said", "king", "house")


class BenchmarkError(Exception):
    """The load cannot be put on the server; one sentence says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """What to send, how often, and what counts as good. Raises ValueError."""

    url: str
    model: str | None = None  # None: the first of /v1/models
    api_key: str | None = None
    num_requests: int = 100
    concurrency: int = 8  # streams at any time, in the closed loop
    rate: float | None = None  # streams a second; given, the loop is open
    prompt_words: int = 32
    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    ignore_eos: bool = True  # not OpenAI's; servers without it refuse or ignore it
    good_ttft_seconds: float = 1.0
    good_itl_seconds: float = 0.1  # mean of a stream
    timeout_seconds: float = 600.0
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("num_requests", "concurrency", "prompt_words", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise ValueError(f"rate must be positive, got {self.rate}")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url must be like http://127.0.0.1:8000, got {self.url}")


@dataclass(slots=True, kw_only=True)
class StreamResult:
    """What one client saw; times in seconds on the benchmark's clock."""

    started_at: float
    pieces: list[tuple[float, bytes]] = dataclasses.field(default_factory=list)  # not yet looked at
    arrivals: list[float] = dataclasses.field(default_factory=list)  # of chunks with text
    ended_at: float = 0.0
    num_tokens: int = 0  # by `usage`, else chunks with text
    error: str | None = None

    @property
    def ttft_seconds(self) -> float:
        """From the request to the first text."""
        return self.arrivals[0] - self.started_at

    @property
    def total_seconds(self) -> float:
        """From the request to the end of the stream."""
        return self.ended_at - self.started_at

    @property
    def mean_itl_seconds(self) -> float:
        """Between tokens on average; 0 for a single token."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, self.num_tokens - 1)


async def measure_serving(
    config: LoadConfig, *, advance: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Put the load on the server and report; `advance` hears of every stream that ended.

    Raises BenchmarkError if the server cannot be reached or no stream came through.
    """
    model = config.model or await _first_model(config)
    numbers = random.Random(config.seed)
    prompts = [
        " ".join(numbers.choices(_WORDS, k=config.prompt_words)) for _ in range(config.num_requests)
    ]

    async def send(prompt: str) -> StreamResult:
        result = await stream_completion(config, model, prompt)
        advance()
        return result

    start = time.perf_counter()
    loop = _closed_loop if config.rate is None else _open_loop
    results = await loop(config, send, prompts, numbers)
    seconds = time.perf_counter() - start
    for result in results:
        _look_at(result)
    return report(config, model, results, seconds)


Send = Callable[[str], Awaitable[StreamResult]]


async def _closed_loop(
    config: LoadConfig, send: Send, prompts: list[str], numbers: random.Random
) -> list[StreamResult]:
    left = iter(prompts)
    results: list[StreamResult] = []

    async def client() -> None:
        for prompt in left:
            results.append(await send(prompt))  # noqa: PERF401

    await asyncio.gather(*(client() for _ in range(config.concurrency)))
    return results


async def _open_loop(
    config: LoadConfig, send: Send, prompts: list[str], numbers: random.Random
) -> list[StreamResult]:
    assert config.rate is not None
    due = time.perf_counter()
    streams: list[asyncio.Task[StreamResult]] = []
    for prompt in prompts:
        # Moments are fixed beforehand: a server that falls behind does not slow them down.
        await asyncio.sleep(due - time.perf_counter())
        streams.append(asyncio.ensure_future(send(prompt)))
        due += numbers.expovariate(config.rate)
    return list(await asyncio.gather(*streams))


async def _exchange(
    config: LoadConfig, method: str, path: str, body: bytes = b""
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, int]:
    """Send a request; its status, and the connection where its head was read.

    HTTP/1.0, so that the body is not in chunks and ends with the connection.
    """
    parts = urlsplit(config.url)
    is_tls = parts.scheme == "https"
    base = parts.path.rstrip("/").removesuffix("/v1")
    reader, writer = await asyncio.open_connection(
        parts.hostname, parts.port or (443 if is_tls else 80), ssl=is_tls, limit=_RECEIVE_BYTES
    )
    key = f"Authorization: Bearer {config.api_key}\r\n" if config.api_key else ""
    writer.write(
        f"{method} {base}{path} HTTP/1.0\r\nHost: {parts.netloc}\r\n{key}"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n".encode()
        + body
    )
    try:
        status = int((await reader.readline()).split(maxsplit=2)[1])
        while (await reader.readline()).strip():
            pass
    except (IndexError, ValueError, OSError):
        writer.close()
        raise ConnectionError("the server's reply is no HTTP") from None
    except asyncio.CancelledError:  # it took too long
        writer.close()
        raise
    return reader, writer, status


async def _first_model(config: LoadConfig) -> str:
    try:
        async with asyncio.timeout(30):
            reader, writer, status = await _exchange(config, "GET", "/v1/models")
            data = await reader.read()
            writer.close()
    except (OSError, TimeoutError) as error:
        raise BenchmarkError(f"{config.url} cannot be reached: {error or 'timeout'}.") from None
    try:
        name = json.loads(data)["data"][0]["id"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise BenchmarkError(
            f"{config.url} has no list of models (status {status}); name one with --model."
        ) from None
    return str(name)


async def stream_completion(config: LoadConfig, model: str, prompt: str) -> StreamResult:
    """Stream one completion and note when something came, for `_look_at`.

    Failures are in the result.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        **({"top_p": config.top_p} if config.top_p < 1 else {}),
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"ignore_eos": True} if config.ignore_eos else {}),
    }
    result = StreamResult(started_at=time.perf_counter())
    try:
        async with asyncio.timeout(config.timeout_seconds):
            reader, writer, status = await _exchange(
                config, "POST", "/v1/completions", json.dumps(body).encode()
            )
            try:
                if status != 200:
                    said = (await reader.read(500)).decode(errors="replace")
                    result.error = f"status {status}: {said}"
                else:
                    await _receive(reader, result)
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        result.error = str(error) or "timeout"
    result.ended_at = time.perf_counter()
    return result


async def _receive(reader: asyncio.StreamReader, result: StreamResult) -> None:
    """Take a stream to its end, as it comes."""
    last = b""
    while data := await reader.read(_RECEIVE_BYTES):
        result.pieces.append((time.perf_counter(), data))
        last = last[-len(_END) :] + data
        if _END in last:
            return
    result.error = "the stream ended without [DONE]"


def _look_at(result: StreamResult) -> None:
    """Find out what came when, in the order in which it came.

    Afterwards: who measures runs on the server's machine, and would keep it from its work.
    """
    pieces, result.pieces = result.pieces, []
    try:
        error = _find_events(pieces, result)
    except ValueError as broken:
        error = f"an event that is no JSON: {broken}"
    except (KeyError, TypeError, AttributeError):
        error = "the stream has events of another shape than OpenAI's"
    result.error = error or result.error
    if result.error is None and not result.arrivals:
        result.error = "a stream without text"


def _find_events(pieces: list[tuple[float, bytes]], result: StreamResult) -> str | None:
    """Go through a stream; what its server says went wrong, if anything."""
    rest = b""
    for arrived_at, data in pieces:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            content = line[5:].strip()
            if not line.startswith(b"data:") or content == b"[DONE]":
                continue
            event = json.loads(content)
            if "error" in event:
                return json.dumps(event["error"])
            if any(choice.get("text") for choice in event.get("choices", ())):
                result.arrivals.append(arrived_at)
                result.num_tokens += 1
            usage = event.get("usage")
            if usage:
                result.num_tokens = usage["completion_tokens"]
    return None


def report(
    config: LoadConfig, model: str, results: list[StreamResult], seconds: float
) -> dict[str, Any]:
    """The numbers of a run, as JSON has them. Raises BenchmarkError if nothing succeeded."""
    done = [result for result in results if result.error is None]
    errors = [result.error for result in results if result.error is not None]
    if not done:
        raise BenchmarkError(f"No stream came through; the first one: {errors[0]}")
    num_tokens = sum(result.num_tokens for result in done)
    good = [
        result
        for result in done
        if result.ttft_seconds <= config.good_ttft_seconds
        and result.mean_itl_seconds <= config.good_itl_seconds
    ]
    gaps = [
        after - before
        for result in done
        for before, after in zip(result.arrivals, result.arrivals[1:], strict=False)
    ]
    settings = dataclasses.asdict(config)
    del settings["api_key"]
    return {
        "settings": {**settings, "model": model},
        "loop": "closed" if config.rate is None else "open",
        "seconds": seconds,
        "num_requests": len(results),
        "num_errors": len(errors),
        "first_error": errors[0] if errors else None,
        "completion_tokens": num_tokens,
        "tokens_per_second": num_tokens / seconds,
        "requests_per_second": len(done) / seconds,
        "goodput_requests_per_second": len(good) / seconds,
        "ttft_seconds": _summary([result.ttft_seconds for result in done]),
        "itl_seconds": _summary(gaps),
        "e2e_seconds": _summary([result.total_seconds for result in done]),
    }


def percentile(values: list[float], percent: float) -> float:
    """By linear interpolation between the nearest ranks; values need no order."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _summary(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "mean": sum(values) / len(values),
        **{f"p{percent}": percentile(values, percent) for percent in PERCENTILES},
        "max": max(values),
    }


def table_of(numbers: dict[str, Any]) -> Table:
    """A report for the eye: times in milliseconds."""
    table = Table(
        title=f"{numbers['tokens_per_second']:,.0f} tokens/s, "
        f"{numbers['requests_per_second']:,.2f} requests/s, "
        f"{numbers['goodput_requests_per_second']:,.2f} good, "
        f"{numbers['num_errors']} errors, {numbers['loop']} loop",
        title_justify="left",
    )
    columns = ["mean", *(f"p{percent}" for percent in PERCENTILES), "max"]
    table.add_column("ms")
    for column in columns:
        table.add_column(column, justify="right")
    for heading, name in (("TTFT", "ttft"), ("ITL", "itl"), ("end to end", "e2e")):
        summary = numbers[f"{name}_seconds"]
        if summary is not None:
            table.add_row(heading, *(f"{summary[column] * 1e3:,.2f}" for column in columns))
    return table
