"""The sampler by itself, at GPT-2's vocabulary: what a step's draw costs beside greedy's argmax.

`python -m benchmarks.sampling` alternates the kinds of sampling, every time at another position, so
with other noise; over logits as flat as random weights make them, and as peaked as trained ones.
"""

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from engine.sampler import sample
from engine.sampling_params import SamplingParams
from engine.sampling_row import SamplingRow

_VOCAB_SIZE = 50257
_KINDS = {
    "greedy": SamplingParams(temperature=0),
    "temperature 0.8": SamplingParams(temperature=0.8),
    "and top_p 0.95": SamplingParams(temperature=0.8, top_p=0.95),
    "and top_k 50": SamplingParams(temperature=0.8, top_k=50),
    "and typical_p 0.9": SamplingParams(temperature=0.8, typical_p=0.9),
    "and a penalty": SamplingParams(temperature=0.8, frequency_penalty=0.5),
    "greedy, logprobs 5": SamplingParams(temperature=0, logprobs=5),
}
_COPIES = 4  # of the logits, so that they are not always where the last call left them


def make_logits(num_rows: int, *, is_peaked: bool) -> Tensor:
    """Logits (R, V): a trained model's few high ones stand out of a broad mass."""
    logits = torch.randn(num_rows, _VOCAB_SIZE)
    if is_peaked:
        # Each further rank less probable by a power law, as words are.
        ranks = torch.rand(num_rows, _VOCAB_SIZE).argsort(1) + 1
        return 0.7 * logits - 1.3 * ranks.log() - 90
    return 0.3 * logits


def median_microseconds(num_rows: int, *, is_peaked: bool, rounds: int) -> list[int]:
    """Median times of the kinds of sampling, turn and turn about."""
    copies = [make_logits(num_rows, is_peaked=is_peaked) for _ in range(_COPIES)]
    prompt_ids = list(range(40))
    batches = [
        [SamplingRow(params, choice=choice, prompt_ids=prompt_ids) for choice in range(num_rows)]
        for params in _KINDS.values()
    ]
    times: list[list[float]] = [[] for _ in batches]
    for turn in range(rounds + 2):
        for rows, found in zip(batches, times, strict=True):
            start = time.perf_counter()
            sampled = sample(copies[turn % _COPIES], rows)
            token_ids = sampled.token_ids.tolist()
            sampled.logprobs_by_row()
            found.append(time.perf_counter() - start)
            for row, token_id in zip(rows, token_ids, strict=True):
                row.extend([token_id])
    return [round(1e6 * statistics.median(found[2:])) for found in times]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    start = time.perf_counter()
    with torch.inference_mode():
        sample(make_logits(1, is_peaked=False), [SamplingRow(_KINDS["greedy"], prompt_ids=[0])])
        first = time.perf_counter() - start
        columns = [
            (f"{rows}, {'peaked' if is_peaked else 'flat'}", rows, is_peaked)
            for is_peaked in (False, True)
            for rows in arguments.rows
        ]
        found = [
            median_microseconds(rows, is_peaked=is_peaked, rounds=arguments.rounds)
            for _, rows, is_peaked in columns
        ]
    table = Table(title=f"sampling, µs a step; the first call took {first:.1f} s")
    for heading in ("rows, logits", *(name for name, _, _ in columns)):
        table.add_column(heading, justify="right")
    for name, values in zip(_KINDS, zip(*found, strict=True), strict=True):
        table.add_row(name, *map(str, values))
    Console().print(table)


if __name__ == "__main__":
    main()
