"""A server as people run it: `kvik serve` in a process of its own, with a real engine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
OUTCOMES = ("stop", "length", "abort", "error", "rejected", "timeout")


def command(checkpoint: Path | str, *options: str) -> list[str]:
    """How the server is started."""
    return [
        sys.executable, "-m", "kvik", "serve", "--model", str(checkpoint), "--port", "0",
        "--device", "cpu", "--dtype", "float32", "--num-threads", "1", *options,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """Ours, without what would change the server's options."""
    return {name: value for name, value in os.environ.items() if not name.startswith("KVIK_")}


class LiveServer:
    """A server that has said where it listens."""

    def __init__(self, checkpoint: Path | str, log: Path, *options: str) -> None:
        self.log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                command(checkpoint, *options),
                stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT, env=environment(),
            )  # fmt: skip
        self.lines: list[str] = []
        self.url = ""

    def wait_until_ready(self) -> "LiveServer":
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if line.startswith("address"):
                self.url = line.split()[1]
            if line.startswith("try it"):
                break
        assert self.url, self.log.read_text()
        return self

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def worker_pid(self) -> int:
        """The engine's process: the server's only child."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        (child,) = children
        return int(child)

    def client(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, trust_env=False, **options)

    def complete(self, **body: Any) -> dict[str, Any]:
        with self.client() as client:
            reply = client.post("/v1/completions", json=request(**body))
        assert reply.status_code == 200, reply.text
        document: dict[str, Any] = reply.json()
        return document

    def open_stream(self, **body: Any) -> "Stream":
        return Stream(self.url, request(stream=True, **body))

    def metrics(self) -> dict[tuple[str, str], float]:
        """Samples by name and the values of their labels."""
        with self.client() as client:
            text = client.get("/metrics").text
        return {
            (sample.name, ",".join(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def metric(self, name: str, labels: str = "") -> float:
        return self.metrics()[name, labels]

    def stop(self) -> int:
        """Ask it to end and wait; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextmanager
def live_server(checkpoint: Path | str, log: Path, *options: str) -> Iterator[LiveServer]:
    """A server that is ready, and ends with the block."""
    server = LiveServer(checkpoint, log, *options)
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()


def request(**body: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": " the", "max_tokens": 32, "ignore_eos": True, **body}


def raw_request(body: dict[str, Any]) -> bytes:
    """A completion request as it goes over a socket."""
    data = json.dumps(body).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(data)
    ) + data


def connect(url: str, *, receive_buffer: int | None = None) -> socket.socket:
    """A bare connection to a server."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(60)
    connection.connect((host, int(port)))
    return connection


class Stream:
    """A streamed completion, event by event."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self._client = httpx2.Client(base_url=url, timeout=60, trust_env=False)
        self._context = self._client.stream("POST", "/v1/completions", json=body)
        self.reply = self._context.__enter__()
        assert self.reply.status_code == 200, self.reply.read()
        self._lines = self.reply.iter_lines()
        self.comments = 0
        self.error: dict[str, Any] | None = None
        self.is_done = False

    def events(self) -> Iterator[dict[str, Any]]:
        """Chunks, until [DONE] or an error."""
        for line in self._lines:
            if line.startswith(":"):
                self.comments += 1
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                self.is_done = True
                continue
            document = json.loads(line[6:])
            if "error" in document:
                self.error = document["error"]
            else:
                yield document

    def text(self, count: int | None = None) -> str:
        """The text of the next `count` chunks, or of all that come."""
        text = ""
        for number, event in enumerate(self.events(), 1):
            text += "".join(choice["text"] for choice in event["choices"])
            if number == count:
                break
        return text

    def close(self) -> None:
        self._context.__exit__(None, None, None)
        self._client.close()


def books_are_closed(server: LiveServer) -> bool:
    """Whether every request that was received has finished, by the metrics."""
    metrics = server.metrics()
    finished = sum(metrics["kvik_requests_finished_total", outcome] for outcome in OUTCOMES)
    return (
        metrics["kvik_requests_in_flight", ""] == 0
        and finished == metrics["kvik_requests_received_total", ""]
    )


def until(condition: Callable[[], bool], seconds: float = 30) -> float:
    """Wait for something to become true; how long it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it did not happen"
        time.sleep(0.01)
    return time.monotonic() - start
