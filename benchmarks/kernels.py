"""The parts of a CPU step at GPT-2 124M's sizes: products, attention, the network by phases.

`python -m benchmarks.kernels` alternates ours and oneDNN's packed product, each over copies that
no cache holds together.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from engine.attention_cpu import CPUPagedAttention
from engine.batch import Rows, Span
from engine.kv_cache import KVCache
from engine.linear_cpu import FusedLinear
from engine.network_cpu import FusedNetwork
from model.config import GPTConfig
from model.gpt import GPT

_CONFIG = GPTConfig()  # GPT-2 124M
_SHAPES = {"c_attn": (2304, 768), "c_proj": (768, 768), "c_fc": (3072, 768),
           "mlp c_proj": (768, 3072), "head": (50257, 768)}  # fmt: skip
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


def _onednn(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The product with a weight (out, in) that oneDNN has packed, as torch offers it."""
    operations = torch.ops.mkldnn
    packed = operations._reorder_linear_weight(weight)
    return lambda x: operations._linear_pointwise(x, packed, None, "none", [], "")


def products(rows: int, rounds: int) -> Table:
    """Bare products, without what surrounds them in a block."""
    table = Table(title=f"products of {rows} rows, µs")
    for heading in ("", "bfloat16", "oneDNN bfloat16", "int8", "float32", "oneDNN float32"):
        table.add_column(heading, justify="right")
    for name, (num_out, num_in) in _SHAPES.items():
        calls: list[list[Callable[[], Tensor]]] = [[] for _ in range(5)]
        for _ in range(max(1, _CACHED_BYTES // (num_out * num_in * 2))):
            weight, x = torch.randn(num_out, num_in) * 0.02, torch.randn(rows, num_in)
            half, half_x = weight.bfloat16(), x.bfloat16()
            kinds = [
                (FusedLinear(half), x),
                (_onednn(half), half_x),
                (FusedLinear(half, quantizes=True), x),
                (FusedLinear(weight), x),
                (_onednn(weight), x),
            ]
            for kind, (product, given) in zip(calls, kinds, strict=True):
                kind.append(lambda product=product, given=given: product(given))  # type: ignore[misc]
        table.add_row(name, *map(str, median_microseconds(calls, rounds)))
    return table


def _rows(num_sequences: int, rows: int, length: int) -> Rows:
    """The last rows of sequences of one length, whose blocks lie anywhere."""
    blocks = np.random.default_rng(0).permutation(num_sequences * 64) + 1
    tables = blocks.astype(np.int32).reshape(num_sequences, 64)
    sequences = np.repeat(np.arange(num_sequences), rows)
    positions = np.tile(np.arange(length - rows, length), num_sequences)
    spans = tuple(Span(s, length - rows, length, length) for s in range(num_sequences))
    return Rows(positions, positions, sequences, tables, spans)


def _cache(rows: Rows, dtype: torch.dtype) -> KVCache:
    num_blocks = rows.block_tables.size + 1
    cache = KVCache(_CONFIG, num_blocks=num_blocks, block_size=16, dtype=dtype, device="cpu")
    # Memory that nobody wrote is the same page everywhere, and so in the nearest cache.
    cache.kv.fill_(1)
    return cache


def network(shapes: Sequence[tuple[int, int, int]], rounds: int) -> Table:
    """The network in one call, as a step runs it: where its time goes, phase by phase."""
    kinds = [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)]
    names = list(dict.fromkeys(FusedNetwork.phases(1)))
    table = Table(title="phases of a step, ms")
    for heading in ("", "sequences", "rows of each", "last position", *names, "all, as called"):
        table.add_column(heading, justify="right")
    for dtype, quantizes in kinds:
        kind = "int8" if quantizes else str(dtype).removeprefix("torch.")
        for shape in shapes:
            rows = _rows(*shape)
            fused = FusedNetwork(
                GPT(_CONFIG).to(dtype), _cache(rows, dtype), _CONFIG.vocab_size,
                quantizes=quantizes,
            )  # fmt: skip
            chosen = np.arange(1, shape[0] + 1) * shape[1] - 1  # the last rows
            phases = FusedNetwork.phases(_CONFIG.n_layer)
            times, shares = [], []
            for _ in range(rounds + 2):
                start = time.perf_counter()
                fused.run(rows, chosen if shape[1] > 1 else None)
                times.append(time.perf_counter() - start)
                # Of a phase that did not run, the end is the one's before. The first has no
                # beginning, and takes next to nothing.
                ends = np.maximum.accumulate(fused.phase_ends)
                spent = np.diff(ends, prepend=ends[0])
                shares.append(spent / spent.sum())
            milliseconds = 1e3 * statistics.median(times[2:])
            found = dict.fromkeys(names, 0.0)
            for name, share in zip(phases, np.median(shares[2:], 0), strict=True):
                found[name] += milliseconds * share
            columns = [f"{value:.2f}" for value in (*found.values(), milliseconds)]
            table.add_row(kind, *map(str, shape), *columns)
    return table


def attention(rounds: int) -> Table:
    """Attention of one layer over the paged cache."""
    table = Table(title="attention of a layer, µs")
    headings = ("bfloat16", "bfloat16, int8 cache", "float32", "float32, int8 cache")
    for heading in ("sequences", "rows of each", "last position", *headings):
        table.add_column(heading, justify="right")
    for num_sequences, rows, length in ((1, 1, 64), (32, 1, 64), (32, 1, 256), (1, 512, 512)):
        batch = _rows(num_sequences, rows, length)
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
        table.add_row(*map(str, (num_sequences, rows, length, *found)))
    return table


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    console = Console()
    with torch.inference_mode():
        for rows in arguments.rows:
            console.print(products(rows, arguments.rounds))
        console.print(attention(arguments.rounds))
        shapes = [(rows, 1, 64) for rows in arguments.rows] + [(1, 256, 256)]
        console.print(network(shapes, arguments.rounds))


if __name__ == "__main__":
    main()
