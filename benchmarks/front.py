"""How fast the server process is on its own, with an engine that is never the limit (Linux).

`python -m benchmarks.front` measures how long `kvik serve` takes to its first answer, and how many
chunks a second leave it while a stand-in for the engine brings a token, or `--rounds` of them, a
stream and step.
"""

import argparse
import json
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contestants import processor_seconds
from engine.config import EngineConfig, LaunchConfig
from engine.messages import Ready
from server.app import serve
from server.config import ServerConfig
from server.served_model import ServedModel

ROOT = Path(__file__).resolve().parent.parent
STORYTELLER = ROOT / "weights" / "storyteller"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontResult:
    """What left the server while every stream was open."""

    num_streams: int
    num_rounds: int  # tokens of a stream that came together
    num_chunks: int
    seconds: float
    server_seconds: float  # of processor time, all of the server's threads

    @property
    def chunks_per_second(self) -> float:
        """As the client saw it, on this machine."""
        return self.num_chunks / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens that come together leave together."""
        return self.chunks_per_second * self.num_rounds

    @property
    def microseconds_per_chunk(self) -> float:
        """Of the server's processor time: what decides, were nothing else running."""
        return self.server_seconds / self.num_chunks * 1e6


def measure_start(model: Path, *, rounds: int = 5) -> float:
    """Median seconds from the start of `kvik serve` to its first answer to /health/live."""
    times = []
    for _ in range(rounds):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            address = probe.getsockname()
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "kvik", "serve", "--model", str(model),
             "--port", str(address[1]), "--device", "cpu"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT,
        )  # fmt: skip
        while not _is_live(address):
            time.sleep(0.002)
        times.append(time.perf_counter() - begin)
        process.kill()
        process.wait()
    return statistics.median(times)


def _is_live(address: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(address, timeout=5) as connection:
            connection.sendall(b"GET /health/live HTTP/1.0\r\n\r\n")
            return b" 200 " in connection.recv(4096)
    except OSError:
        return False


def measure_streams(
    model: Path, *, num_streams: int, max_tokens: int, num_rounds: int
) -> FrontResult:
    """Stream to `num_streams` clients at once, from a server with the stand-in behind it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.front", "--serve", "--model", str(model),
         "--rounds", str(num_rounds)],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        host, port = process.stdout.readline().strip().removeprefix("http://").split(":")
        return _read_streams(
            (host, int(port)), process.pid, model.name, num_streams, max_tokens, num_rounds
        )
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _read_streams(
    address: tuple[str, int],
    pid: int,
    name: str,
    num_streams: int,
    max_tokens: int,
    num_rounds: int,
) -> FrontResult:
    body = {"model": name, "prompt": [1], "max_tokens": max_tokens, "stream": True, "seed": 1}
    data = json.dumps({**body, "ignore_eos": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(data)
    selector = selectors.DefaultSelector()
    for _ in range(num_streams):
        connection = socket.create_connection(address)
        connection.sendall(head + data)
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, b"")
    chunks = 0
    num_chunks = num_streams * max_tokens // num_rounds
    first, last = num_chunks // 10, num_chunks * 9 // 10
    window: list[tuple[int, float, float]] = []
    while chunks < last:
        for key, _ in selector.select():
            connection = key.fileobj  # type: ignore[assignment]
            data = key.data + connection.recv(2**18)
            chunks += data.count(b"\n\n")
            selector.modify(connection, selectors.EVENT_READ, b"\n" if data[-1:] == b"\n" else b"")
        if not window and chunks >= first:
            window.append((chunks, time.perf_counter(), sum(processor_seconds(pid))))
    window.append((chunks, time.perf_counter(), sum(processor_seconds(pid))))
    for key in list(selector.get_map().values()):
        key.fileobj.close()  # type: ignore[union-attr]
    begin, end = window
    return FrontResult(
        num_streams=num_streams, num_rounds=num_rounds, num_chunks=end[0] - begin[0],
        seconds=end[1] - begin[1], server_seconds=end[2] - begin[2],
    )  # fmt: skip


def _serve(model: Path, num_rounds: int) -> None:
    """Be the server that is measured."""

    def announce(address: str, facts: Ready) -> None:
        print(address, flush=True)

    engine = EngineConfig(
        max_num_sequences=1024, max_num_scheduled_tokens=1024, max_num_rounds=num_rounds
    )
    launch = LaunchConfig(model=str(model), engine=engine)
    serve(
        ServerConfig(port=0), launch, ServedModel.read(model),
        worker_module="benchmarks.stand_in_worker", announce=announce,
    )  # fmt: skip


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=STORYTELLER)
    parser.add_argument("--streams", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--chunks", type=int, default=100_000, help="a row, about")
    parser.add_argument("--rounds", type=int, default=1, help="tokens that come together")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        _serve(arguments.model, arguments.rounds)
        return
    print(f"first answer after {measure_start(arguments.model):.2f} s\n")
    headings = "| streams | tokens/s | chunks/s | server us/chunk | server busy |"
    print(f"{headings}\n|---:|---:|---:|---:|---:|")
    for num_streams in arguments.streams:
        max_tokens = min(500, max(10, arguments.chunks // num_streams))
        result = measure_streams(
            arguments.model,
            num_streams=num_streams,
            max_tokens=max_tokens,
            num_rounds=arguments.rounds,
        )
        print(
            f"| {num_streams} | {result.tokens_per_second:,.0f} | {result.chunks_per_second:,.0f} "
            f"| {result.microseconds_per_chunk:.1f} "
            f"| {result.server_seconds / result.seconds:.0%} |"
        )


if __name__ == "__main__":
    main()
