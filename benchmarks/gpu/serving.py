"""Kvik as its users meet it: `kvik serve` in its own process, load from several others."""

import copy
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.report import Report
from benchmarks.gpu.workbench import Workbench

NEEDED = (
    *("typer", "fastapi", "starlette", "pydantic", "uvicorn", "uvloop", "httptools"),
    *("prometheus_client", "tiktoken", "safetensors", "msgspec"),
)
_PORT = 8765


def time_serving(bench: Workbench, report: Report) -> None:
    """Time a server's start, cold and warm, a first token, and what 1, 64 and 256 streams get."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        report.parts.append(
            f"Not run: {', '.join(missing)} cannot be imported here; wheels of them may lie in "
            "`wheels/`."
        )
        return
    bench.forget_engines()  # the server wants their memory
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_gpt2(bench, model)
        cache = str(Path(folder) / "kernels")
        device = bench.device.type
        with _server(model, device, cache, Path(folder) / "cold.txt") as cold:
            report.parts.append(f"Ready {cold:.1f} s after its start, nothing compiled before.")
        with _server(model, device, cache, Path(folder) / "warm.txt") as warm:
            report.parts.append(f"Ready {warm:.1f} s after its start, kernels compiled before.")
            report.values["ready"] = warm
            length = bench.config.n_ctx - 1
            prompts = bench.prompts(2 if bench.is_smoke else 10, length)
            first = statistics.median([_first_token(prompt) for prompt in prompts][1:]) * 1e3
            report.parts.append(f"{length} tokens: {first:.2f} ms to the first event.")
            report.values["ttft_http"] = first
            rows = []
            for streams, processes in ((2, 2),) if bench.is_smoke else ((1, 1), (64, 4), (256, 8)):
                tokens = 8 if bench.is_smoke else 256
                found = _load(Path(folder), streams, processes, tokens)
                rate: float = sum(one["completion_tokens"] for one in found)
                rate /= max(one["seconds"] for one in found)
                errors = sum(one["num_errors"] for one in found)
                tokens_an_event = sum(one["completion_tokens"] for one in found)
                tokens_an_event /= max(1, sum(one["events"] for one in found))
                worst = {
                    name: max(one[name][rank] for one in found) * 1e3
                    for name, rank in (("ttft_seconds", "p50"), ("itl_seconds", "p99"))
                }
                rows.append(
                    (streams, processes, f"{rate:,.0f}", f"{tokens_an_event:.2f}",
                     f"{worst['ttft_seconds']:.1f} ms", f"{worst['itl_seconds']:.2f} ms", errors)
                )  # fmt: skip
                if streams == 256:
                    report.values["together"] = rate
                    if tokens_an_event < 1.05:
                        report.values["http"] = rate
    headings = ("streams", "client processes", "tokens/s", "tokens an event", "TTFT p50", "ITL p99")
    report.add_table((*headings, "errors"), rows)


def _first_token(prompt: list[int]) -> float:
    """Seconds from a request to the first event of its stream."""
    body = {"model": "model", "prompt": prompt, "max_tokens": 1, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{_PORT}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    start = time.perf_counter()
    with urllib.request.urlopen(request, timeout=30) as reply:
        reply.readline()
        seconds = time.perf_counter() - start
        reply.read()
    return seconds


def save_gpt2(bench: Workbench, folder: Path) -> None:
    """Write the model with a tokenizer of its size: every byte, then pairs and triples of ASCII.

    So nearly every token is whole characters, which a stream may show as it comes.
    """
    from model.tokenizer import BytePairTokenizer
    from model.vocabulary import END_OF_TEXT, byte_alphabet
    from weights.checkpoint import save

    alphabet = byte_alphabet()
    letters = sorted(alphabet, key=alphabet.__getitem__)
    size = bench.config.vocab_size
    if size <= len(letters):
        raise ValueError(f"a vocabulary of {size} ids has no room for every byte")
    ascii_letters = [letter for letter in letters if letter.isascii()]
    pairs = list(product(ascii_letters, ascii_letters))
    # Of three letters in such order, the first two are what merging joins first.
    ascending = (first + second for first, second in pairs if first < second)
    all_merges = chain(pairs, product(ascending, ascii_letters))
    merges = list(islice(all_merges, size - len(letters) - 1))
    tokens = [*letters, *(first + second for first, second in merges)]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = BytePairTokenizer.from_merges(vocabulary, merges, {END_OF_TEXT: size - 1})
    save(copy.deepcopy(bench.model).to(torch.bfloat16), folder, tokenizer=tokenizer)


@contextmanager
def _server(model: Path, device: str, kernels: str, log: Path) -> Iterator[float]:
    """A server for as long as this lasts, and the seconds until it was ready."""
    command = [
        *(sys.executable, "-m", "kvik", "serve", "--model", str(model), "--device", device),
        *("--dtype", "bfloat16", "--port", str(_PORT), "--max-waiting-requests", "1024"),
    ]
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TRITON_CACHE_DIR": kernels},
        )
    try:
        while not _is_ready():
            if process.poll() is not None or time.monotonic() - start > 120:
                said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
                raise RuntimeError(f"the server is not ready; it said:\n{said}")
            time.sleep(0.05)
        yield time.monotonic() - start
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_ready() -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{_PORT}/health/ready", timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _load(folder: Path, streams: int, processes: int, max_tokens: int) -> list[dict[str, Any]]:
    """Streams from several processes at a time, two rounds of them; each process's numbers."""
    running = []
    each = streams // processes
    for index in range(processes):
        command = [
            *(sys.executable, "-m", "kvik", "bench", "serve", f"http://127.0.0.1:{_PORT}"),
            *("--concurrency", str(each), "--num-requests", str(2 * each)),
            *("--prompt-words", "24", "--max-tokens", str(max_tokens), "--temperature", "0"),
            *("--seed", str(index), "--report", str(folder / f"{streams}-{index}.json")),
        ]
        running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    for process in running:
        if process.wait(60) != 0:
            raise RuntimeError("a client failed")
    return [
        json.loads((folder / f"{streams}-{index}.json").read_text(encoding="utf-8"))
        for index in range(processes)
    ]
