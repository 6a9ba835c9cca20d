"""How long `kvik serve` takes to its first answer, and what it then holds in memory (Linux).

`python -m benchmarks.start --model DIR` measures with the kernels compiled before; `--cold` with an
empty folder for them as well. Memory is PSS, which counts a page that processes share once, of the
server and its worker together: after the start, and after a load of streams.
"""

import argparse
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.serving import LoadConfig, bench_serving

_POLL_SECONDS = 0.005
_UNITS = {"bytes": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_WEIGHTS = re.compile(r"weights ([\d.]+) (bytes|kB|MB|GB)")
_CACHE = re.compile(r"KV cache ([\d.]+) (bytes|kB|MB|GB)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What the server's processes hold, and what of it weights and cache account for; bytes."""

    anonymous: int
    of_files: int
    weights: int  # as the server's own ledger has them
    kv_cache: int  # what has memory of it

    @property
    def rest(self) -> int:
        """What neither weights nor cache account for."""
        return self.anonymous + self.of_files - self.weights - self.kv_cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of the server: seconds since its exec, and memory."""

    live: float
    ready: float
    answered: float  # a completion of one token
    after_start: Memory
    after_load: Memory


def measure_start(
    model: Path, *, dtype: str, kernels: Path | None, num_streams: int, max_tokens: int
) -> Start:
    """Start a server, ask it for a token, put a load on it and end it.

    `kernels` is where compiled kernels are kept; None leaves that to numba.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "kvik", "serve", "--model", str(model), "--dtype", dtype]
    environment = {**os.environ, **({"NUMBA_CACHE_DIR": str(kernels)} if kernels else {})}
    with tempfile.TemporaryFile() as said:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--port", str(port), "--served-model-name", "gpt2", "--log-level",
             "warning"],
            env=environment, stdout=said, start_new_session=True,
        )  # fmt: skip
        try:
            live = _wait_for(f"{url}/health/live", process) - begin
            ready = _wait_for(f"{url}/health/ready", process) - begin
            _complete(url)
            answered = time.perf_counter() - begin
            time.sleep(0.5)  # what ends behind the first answer
            said.seek(0)
            text = said.read().decode()
            after_start = _memory(process.pid, text)
            load = LoadConfig(
                url=url, model="gpt2", num_requests=num_streams, concurrency=num_streams,
                prompt_words=24, max_tokens=max_tokens, temperature=0.8,
            )  # fmt: skip
            bench_serving(load)
            after_load = _memory(process.pid, text)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
    return Start(
        live=live, ready=ready, answered=answered, after_start=after_start, after_load=after_load
    )


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> float:
    """When a route first answered with 200."""
    while True:
        try:
            with urllib.request.urlopen(url, timeout=30):
                return time.perf_counter()
        except (urllib.error.URLError, OSError):
            if process.poll() is not None:
                raise SystemExit(f"kvik serve ended with {process.returncode}.") from None
            time.sleep(_POLL_SECONDS)


def _complete(url: str) -> None:
    body = {"model": "gpt2", "prompt": "Once upon a time", "max_tokens": 1}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        reply.read()


def _memory(pid: int, said: str) -> Memory:
    (worker,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    parts = {"Pss_Anon:": 0, "Pss_File:": 0, "Pss_Shmem:": 0}
    for one in (str(pid), worker):
        for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
            name, number, *_ = line.split()
            if name in parts:
                parts[name] += 1024 * int(number)
    # Nothing else comes near the cache's size.
    cache_bytes = _said(_CACHE, said)
    kv_cache = size = 0
    for line in Path(f"/proc/{worker}/smaps").read_text().splitlines():
        name, number, *_ = line.split()
        if name == "Size:":
            size = 1024 * int(number)
        elif name == "Anonymous:" and size > 0.99 * cache_bytes:
            kv_cache += 1024 * int(number)
    return Memory(
        anonymous=parts["Pss_Anon:"] + parts["Pss_Shmem:"],
        of_files=parts["Pss_File:"],
        weights=_said(_WEIGHTS, said),
        kv_cache=kv_cache,
    )


def _said(pattern: re.Pattern[str], said: str) -> int:
    """A number of bytes from the server's own lines."""
    found = pattern.search(said)
    assert found is not None, said
    return int(float(found[1]) * _UNITS[found[2]])


def main() -> None:
    """Print medians of some starts, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--dtype", nargs="+", default=["auto"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--cold", action="store_true", help="compile the kernels as well, once")
    arguments = parser.parse_args()

    times, memory = (
        Table(title="seconds from exec", title_justify="left"),
        Table(title="MB, PSS", title_justify="left"),
    )
    for heading in ("", "/health/live", "/health/ready", "first token"):
        times.add_column(heading, justify="right")
    for heading in ("", "anonymous", "of files", "weights", "KV written", "rest"):
        memory.add_column(heading, justify="right")
    for dtype in arguments.dtype:
        kinds = [("kernels cached", arguments.rounds)]
        with tempfile.TemporaryDirectory() as folder:
            kernels = Path(folder) if arguments.cold else None

            def start(dtype: str = dtype, kernels: Path | None = kernels) -> Start:
                return measure_start(
                    arguments.model, dtype=dtype, kernels=kernels,
                    num_streams=arguments.streams, max_tokens=arguments.max_tokens,
                )  # fmt: skip

            if arguments.cold:
                kinds.insert(0, ("no kernels yet", 1))
            else:
                start()  # compiles what is missing, and brings the files into memory
            for kind, rounds in kinds:
                starts = [start() for _ in range(rounds)]
                times.add_row(
                    f"{dtype}, {kind}",
                    *(
                        f"{statistics.median(getattr(one, name) for one in starts):.2f}"
                        for name in ("live", "ready", "answered")
                    ),
                )
                for when in ("after_start", "after_load"):
                    held = [getattr(one, when) for one in starts]
                    memory.add_row(
                        f"{dtype}, {kind}, {when.replace('_', ' ')}",
                        *(
                            f"{statistics.median(getattr(one, name) for one in held) / 1e6:,.0f}"
                            for name in ("anonymous", "of_files", "weights", "kv_cache", "rest")
                        ),
                    )
    console = Console()
    console.print(times)
    console.print(memory)


if __name__ == "__main__":
    main()
