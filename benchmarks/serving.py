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
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import uvloop
from rich.table import Table

PERCENTILES = (50, 90, 95, 99)
_END = b"\ndata: [DONE]"  # in no event: there a line's end is written as two characters
Pieces = list[tuple[float, bytes]]  # of a reply: when each came

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
    pieces: Pieces = dataclasses.field(default_factory=list)  # not yet looked at
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


def bench_serving(
    config: LoadConfig, *, advance: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Put the load on the server and report; `advance` hears of every stream that ended.

    Raises BenchmarkError if the server cannot be reached or no stream came through.
    """
    return uvloop.run(measure_serving(config, advance=advance))


async def measure_serving(
    config: LoadConfig, *, advance: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """See `bench_serving`; for who has an event loop."""
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


class _Reply(asyncio.Protocol):
    """What comes back on a connection, noted as it comes and looked at later.

    Who measures runs on the server's machine, and would keep it from its work: so this is all that
    happens for a token.
    """

    def __init__(self) -> None:
        self.pieces: Pieces = []
        self.ended = asyncio.get_running_loop().create_future()
        self._last = b""

    def data_received(self, data: bytes) -> None:
        """See Protocol."""
        self.pieces.append((time.perf_counter(), data))
        self._last = self._last[-len(_END) :] + data
        if _END in self._last and not self.ended.done():
            self.ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """See Protocol."""
        if self.ended.done():
            return
        if exc is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(exc)


async def _exchange(config: LoadConfig, method: str, path: str, body: bytes = b"") -> Pieces:
    """Send a request; the reply to its end, which is that of the connection or of the stream.

    HTTP/1.0, so that the body is not in chunks and ends with the connection.
    """
    parts = urlsplit(config.url)
    is_tls = parts.scheme == "https"
    base = parts.path.rstrip("/").removesuffix("/v1")
    transport, reply = await asyncio.get_running_loop().create_connection(
        _Reply, str(parts.hostname), parts.port or (443 if is_tls else 80), ssl=is_tls or None
    )
    key = f"Authorization: Bearer {config.api_key}\r\n" if config.api_key else ""
    transport.write(
        f"{method} {base}{path} HTTP/1.0\r\nHost: {parts.netloc}\r\n{key}"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n".encode()
        + body
    )
    try:
        await reply.ended
    finally:
        transport.close()
    return reply.pieces


async def _first_model(config: LoadConfig) -> str:
    try:
        async with asyncio.timeout(30):
            pieces = await _exchange(config, "GET", "/v1/models")
    except (OSError, TimeoutError) as error:
        raise BenchmarkError(f"{config.url} cannot be reached: {error or 'timeout'}.") from None
    status, lines = _after_head(pieces)
    if status == 401:
        raise BenchmarkError(
            f"{config.url} wants another API key than {'this' if config.api_key else 'none'}: name "
            "it with --api-key."
        )
    try:
        name = json.loads(b"\n".join(line for _, line in lines))["data"][0]["id"]
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
            result.pieces = await _exchange(
                config, "POST", "/v1/completions", json.dumps(body).encode()
            )
    except (OSError, TimeoutError) as error:
        result.error = str(error) or "timeout"
    result.ended_at = time.perf_counter()
    return result


def _look_at(result: StreamResult) -> None:
    """Find out what came when, in the order in which it came."""
    pieces, result.pieces = result.pieces, []
    if result.error is not None:
        return
    try:
        result.error = _find_events(pieces, result)
    except ValueError as broken:
        result.error = f"an event that is no JSON: {broken}"
    except (KeyError, TypeError, AttributeError):
        result.error = "the stream has events of another shape than OpenAI's"


def _find_events(pieces: Pieces, result: StreamResult) -> str | None:
    """Go through a stream; what went wrong, if anything."""
    status, lines = _after_head(pieces)
    if status is None:
        return "the server's reply is no HTTP"
    if status != 200:
        said = b"\n".join(line for _, line in lines)[:500].decode(errors="replace")
        return f"status {status}: {said}"
    is_done = False
    for arrived_at, line in lines:
        content = line[5:].strip()
        if not line.startswith(b"data:"):
            continue
        if content == b"[DONE]":
            is_done = True
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
    if not is_done:
        return "the stream ended without [DONE]"
    return None if result.arrivals else "a stream without text"


def _after_head(pieces: Pieces) -> tuple[int | None, Iterator[tuple[float, bytes]]]:
    """A reply's status, None where it is no HTTP, and the lines of its body."""
    lines = _lines(pieces)
    try:
        status = int(next(lines)[1].split(maxsplit=2)[1])
    except (StopIteration, IndexError, ValueError):
        return None, lines
    for _, line in lines:
        if not line.strip():
            break
    return status, lines


def _lines(pieces: Pieces) -> Iterator[tuple[float, bytes]]:
    """Lines, each with the moment when it was complete."""
    rest, arrived_at = b"", 0.0
    for arrived_at, data in pieces:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield arrived_at, line
    yield arrived_at, rest


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
        "events": sum(len(result.arrivals) for result in done),  # with text
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
