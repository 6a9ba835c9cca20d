"""The parts of a CPU step at GPT-2 124M's sizes: products, attention, the network by phases.

`python -m benchmarks.kernels` alternates ours and oneDNN's packed product, each over copies that
no cache holds together.
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from engine.attention_cpu import CPUPagedAttention
from engine.batch import Rows, Span
from engine.cpu_math import KERNEL, view
from engine.cpu_tasks import counters, finish, take, team, wait
from engine.kv_cache import KVCache
from engine.linear_cpu import FusedLinear
from engine.network_cpu import FusedNetwork
from model.config import GPTConfig
from model.gpt import GPT

_CONFIG = GPTConfig()  # GPT-2 124M
_SHAPES = {"c_attn": (2304, 768), "c_proj": (768, 768), "c_fc": (3072, 768),
           "mlp c_proj": (768, 3072), "head": (50257, 768)}  # fmt: skip
_KINDS = ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False))
_CACHED_BYTES = 2**27  # more than a processor's caches


def median_microseconds(calls: Sequence[Sequence[Callable[[], Tensor]]], rounds: int) -> list[int]:
    """Median times of alternatives, turn and turn about; each has copies to go through."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 2):
        for copies, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            copies[turn % len(copies)]()
            found.append(time.perf_counter() - start)
    return [round(1e6 * statistics.median(found[2:])) for found in times]


def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of a type for this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _onednn(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The product with a weight (out, in) that oneDNN has packed, as torch offers it."""
    operations = torch.ops.mkldnn
    packed = operations._reorder_linear_weight(weight)
    return lambda x: operations._linear_pointwise(x, packed, None, "none", [], "")


def products(rows: int, rounds: int) -> Table:
    """Bare products, without what surrounds them in a block."""
    table = Table(title=f"products of {rows} rows, µs")
    onednn = [dtype for dtype in (torch.bfloat16, torch.float32) if _has_onednn(dtype)]
    names = [str(dtype).replace("torch.", "oneDNN ") for dtype in onednn]
    for heading in ("", "bfloat16", "int8", "float32", *names):
        table.add_column(heading, justify="right")
    for name, (num_out, num_in) in _SHAPES.items():
        calls: list[list[Callable[[], Tensor]]] = [[] for _ in range(3 + len(onednn))]
        for _ in range(max(1, _CACHED_BYTES // (num_out * num_in * 2))):
            weight, x = torch.randn(num_out, num_in) * 0.02, torch.randn(rows, num_in)
            half = weight.bfloat16()
            kinds: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
                (FusedLinear(half), x),
                (FusedLinear(half, quantizes=True), x),
                (FusedLinear(weight), x),
                *((_onednn(weight.to(dtype)), x.to(dtype)) for dtype in onednn),
            ]
            for kind, (product, given) in zip(calls, kinds, strict=True):
                kind.append(lambda product=product, given=given: product(given))  # type: ignore[misc]
        table.add_row(name, *map(str, median_microseconds(calls, rounds)))
    return table


class Part(NamedTuple):
    """Sequences of one length in a step, each with its last rows."""

    num_sequences: int
    rows: int
    length: int

    @classmethod
    def read(cls, text: str) -> "Part":
        """Read `32x1@64`: 32 sequences of 64 tokens, a row each."""
        found = re.fullmatch(r"(\d+)x(\d+)@(\d+)", text)
        if found is None:
            raise argparse.ArgumentTypeError(
                f"a step is SEQUENCESxROWS@LENGTH, or several of these joined by +, got {text!r}"
            )
        return cls(*map(int, found.groups()))

    def __str__(self) -> str:
        """What `read` reads."""
        return f"{self.num_sequences}x{self.rows}@{self.length}"


def read_step(text: str) -> list[Part]:
    """Read the parts of a step, joined by +."""
    return [Part.read(part) for part in text.split("+")]


def _rows(parts: Sequence[Part]) -> Rows:
    """A step, whose sequences' blocks lie anywhere."""
    num_sequences = sum(part.num_sequences for part in parts)
    blocks = np.random.default_rng(0).permutation(num_sequences * 64) + 1
    tables = blocks.astype(np.int32).reshape(num_sequences, 64)
    each = [part for part in parts for _ in range(part.num_sequences)]
    sequences = np.repeat(np.arange(num_sequences), [part.rows for part in each])
    positions = np.concatenate([np.arange(p.length - p.rows, p.length) for p in each])
    spans = tuple(Span(s, p.length - p.rows, p.length, p.length) for s, p in enumerate(each))
    return Rows(positions, positions, sequences, tables, spans)


def _cache(rows: Rows, dtype: torch.dtype) -> KVCache:
    num_blocks = rows.block_tables.size + 1
    cache = KVCache(_CONFIG, num_blocks=num_blocks, block_size=16, dtype=dtype, device="cpu")
    # Memory that nobody wrote is the same page everywhere, and so in the nearest cache.
    cache.kv.fill_(1)
    return cache


def network(
    steps: Sequence[Sequence[Part]], dtype: torch.dtype, rounds: int, *, quantizes: bool
) -> Table:
    """The network in one call, as a step runs it: where its time goes, phase by phase."""
    kind = "int8" if quantizes else str(dtype).removeprefix("torch.")
    table = Table(title=f"phases of a step in {kind}, ms")
    table.add_column("")
    columns = []
    for parts in steps:
        table.add_column(" + ".join(map(str, parts)), justify="right")
        rows = _rows(parts)
        fused = FusedNetwork(
            GPT(_CONFIG).to(dtype), _cache(rows, dtype), _CONFIG.vocab_size, quantizes=quantizes
        )
        ends = np.flatnonzero(np.diff(rows.row_sequences, append=-1))  # the last rows
        chosen = None if len(ends) == len(rows.tokens) else ends
        times, shares = [], []
        for _ in range(rounds + 2):
            start = time.perf_counter()
            fused.run(rows, chosen)
            times.append(time.perf_counter() - start)
            # Of a phase that did not run, the end is the one's before. The first has no
            # beginning, and takes next to nothing.
            clock = np.maximum.accumulate(fused.phase_ends)
            spent = np.diff(clock, prepend=clock[0])
            shares.append(spent / max(1, spent.sum()))  # 0 where programs may read no clock
        milliseconds = 1e3 * statistics.median(times[2:])
        phases = FusedNetwork.phases(_CONFIG.n_layer)
        found = dict.fromkeys(phases, 0.0)
        for name, share in zip(phases, np.median(shares[2:], 0), strict=True):
            found[name] += milliseconds * share
        columns.append({**found, "all, as called": milliseconds})
    for name in columns[0]:
        table.add_row(name, *(f"{column[name]:.2f}" for column in columns))
    return table


def attention(rounds: int) -> Table:
    """Attention of one layer over the paged cache."""
    table = Table(title="attention of a layer, µs")
    headings = ("bfloat16", "bfloat16, int8 cache", "float32", "float32, int8 cache")
    for heading in ("a step", *headings, "bare reads of bfloat16"):
        table.add_column(heading, justify="right")
    for step in ("1x1@64", "32x1@64", "32x1@256", "32x1@380", "1x512@512"):
        batch = _rows(read_step(step))
        found = []
        for dtype, cache_dtype in (
            (torch.bfloat16, torch.bfloat16),
            (torch.bfloat16, torch.int8),
            (torch.float32, torch.float32),
            (torch.float32, torch.int8),
        ):
            cache = _cache(batch, cache_dtype)
            given = batch.to(torch.device("cpu"), cache.block_size)
            attend = CPUPagedAttention(_CONFIG, cache, given)
            q, k, v = torch.randn(len(batch.positions), 3, 12, 64).to(dtype).unbind(1)
            calls = [
                lambda layer=layer, attend=attend, q=q, k=k, v=v: attend(layer, q, k, v)
                for layer in range(_CONFIG.n_layer)
            ]
            found += median_microseconds([calls], rounds)
        halves = _cache(batch, torch.bfloat16)
        reads = [
            lambda layer=layer, batch=batch, cache=halves: read_runs(batch, cache, layer)
            for layer in range(_CONFIG.n_layer)
        ]
        found += median_microseconds([reads], rounds)
        table.add_row(step, *map(str, found))
    return table


def read_runs(rows: Rows, cache: KVCache, layer: int) -> Tensor:
    """Read the keys and values that attention of lone rows reads, and do nothing with them.

    In the same runs, a block's keys or values of all heads, and by as many threads.
    """
    num_threads = torch.get_num_threads()
    sums = np.zeros((num_threads, 8))
    lengths = np.array([span.end for span in rows.spans])
    team(num_threads).run(
        _read_compiled, counters(1), rows.block_tables, lengths, layer, view(cache.kv),
        cache.block_size, sums,
    )  # fmt: skip
    return torch.from_numpy(sums)


def _read(
    thread: Any, num_threads: Any, counts: Any, tables: Any, lengths: Any, layer: Any, cache: Any,
    block_size: Any, sums: Any,
) -> None:  # fmt: skip
    while True:
        sequence = take(counts, 0)
        if sequence >= len(lengths):
            break
        for which in range(2):
            for index in range((lengths[sequence] + block_size - 1) // block_size):
                run = cache[tables[sequence, index], layer, which].reshape(-1).view(np.int64)
                total = np.int64(0)
                for place in range(np.uintp(len(run))):
                    total += run[place]
                sums[thread, 0] += total
        finish(counts, 0)
    wait(counts, 0, len(lengths))


_read_compiled = numba.njit(**KERNEL)(_read)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--steps", type=read_step, nargs="+", metavar="STEP",
        default=[read_step(step) for step in ("1x1@64", "8x1@64", "32x1@64", "1x256@256")],
        help="SEQUENCESxROWS@LENGTH, joined by +: 31x1@380+1x160@160 is a prompt beside 31 others",
    )  # fmt: skip
    arguments = parser.parse_args()
    console = Console()
    with torch.inference_mode():
        for rows in arguments.rows:
            console.print(products(rows, arguments.rounds))
        console.print(attention(arguments.rounds))
        for dtype, quantizes in _KINDS:
            console.print(network(arguments.steps, dtype, arguments.rounds, quantizes=quantizes))


if __name__ == "__main__":
    main()
