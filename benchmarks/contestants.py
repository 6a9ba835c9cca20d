"""Kvik and its peers as processes: started, stopped while another is measured, ended.

A contestant is a server that speaks OpenAI's completions API, or a program that prints its own
tokens/s. Nothing here knows what is measured.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving import BenchmarkError, LoadConfig, bench_serving

_SPEED = re.compile(r"batch (\d+): ([\d.]+) tokens/s")
_END_SECONDS = 20  # for a server to end by itself
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A peer without HTTP: a command that prints lines such as `batch 8: 612.3 tokens/s`."""

    name: str
    command: str

    def run(self) -> dict[int, float]:
        """Tokens a second by the number of streams. Raises BenchmarkError."""
        result = subprocess.run(
            shlex.split(self.command), capture_output=True, text=True, check=False
        )
        speeds = {int(count): float(speed) for count, speed in _SPEED.findall(result.stdout)}
        if not speeds:
            raise BenchmarkError(
                f"{self.name} printed no line such as 'batch 8: 612.3 tokens/s': "
                f"{(result.stderr or result.stdout)[-500:]}"
            )
        return speeds


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that runs, as the leader of a session of processes, whose groups may be several."""

    name: str
    url: str
    session: int
    start_seconds: float  # from its start to the end of its first answer

    @property
    def resident_bytes(self) -> int:
        """What the processes of the session hold in memory together (Linux)."""
        pages = sum(int(fields[21]) for _, fields in _processes(self.session))
        return pages * os.sysconf("SC_PAGE_SIZE")


def processor_seconds(pid: int) -> tuple[float, float]:
    """What a process has used of the processors so far, its own time and the system's (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return int(fields[11]) / _TICKS, int(fields[12]) / _TICKS


def _processes(session: int) -> Iterator[tuple[int, list[str]]]:
    """The processes of a session: pid, and what /proc says from the state on (Linux)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            fields = stat.read_text().rpartition(") ")[2].split()
            if int(fields[3]) == session:
                yield int(stat.parent.name), fields


def _tell(session: int, what: signal.Signals) -> None:
    """Send a signal to all processes of a session."""
    for pid, _ in _processes(session):
        with suppress(ProcessLookupError):
            os.kill(pid, what)


@contextmanager
def started(name: str, url: str, command: str, *, timeout_seconds: float = 180) -> Iterator[Server]:
    """A server that has answered once, until the end of the block.

    Raises BenchmarkError, with the last words of its log, if it never does.
    """
    with tempfile.TemporaryFile() as log:
        begin = time.perf_counter()
        process = subprocess.Popen(
            shlex.split(command), stdout=log, stderr=log, start_new_session=True
        )
        try:
            attempt = 0
            while not _answers(url, seed=attempt):
                attempt += 1
                if process.poll() is not None or time.perf_counter() - begin > timeout_seconds:
                    log.seek(0)
                    words = log.read().decode(errors="replace")[-1000:]
                    raise BenchmarkError(f"{name} gave no answer at {url}; its last words: {words}")
                time.sleep(0.02)
            yield Server(
                name=name, url=url, session=process.pid, start_seconds=time.perf_counter() - begin
            )
        finally:
            _end(process)


def _answers(url: str, *, seed: int) -> bool:
    # A seed for each attempt: a token may be half a character, and then no text comes.
    load = LoadConfig(
        url=url, num_requests=1, concurrency=1, prompt_words=1, max_tokens=1, temperature=0.0,
        seed=seed,
    )  # fmt: skip
    try:
        bench_serving(load)
    except BenchmarkError:
        return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a session of processes: its leader is asked first, what is left of it then is killed."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_SECONDS)
    _tell(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def stopped(servers: Iterable[Server]) -> Iterator[None]:
    """Let servers stand still for the length of the block."""
    with ExitStack() as stack:
        for server in servers:
            _tell(server.session, signal.SIGSTOP)
            stack.callback(_tell, server.session, signal.SIGCONT)
        yield


def kvik_command(model: str, dtype: str, port: int, *options: str) -> str:
    """How our own server is started."""
    return shlex.join(
        [
            sys.executable, "-m", "kvik", "serve", "--model", model, "--dtype", dtype,
            "--device", "cpu", "--port", str(port), *options,
        ]
    )  # fmt: skip


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
