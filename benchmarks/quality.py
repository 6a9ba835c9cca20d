"""What a precision costs in quality: a text's perplexity and best tokens, beside float32's.

`python -m benchmarks.quality TEXT --model DIR` scores the text in windows of the model's context,
by the engine that serves, in each precision of weights and cache.
"""

import argparse
import math
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from engine.config import EngineConfig, LaunchConfig
from engine.engine import Engine
from engine.loading import load_engine
from engine.messages import TopLogprobs
from engine.sampling_params import SamplingParams
from weights.layout import read_layout, read_tokenizer

# Weights and cache; the first is what the others are held against.
_PRECISIONS = (
    ("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "int8"), ("int8", "auto"),
    ("int8", "int8"),
)  # fmt: skip


def windows_of(ids: list[int], size: int) -> list[list[int]]:
    """A text in pieces of at most `size` tokens; of each, all but the first is predicted."""
    return [ids[first : first + size] for first in range(0, len(ids) - 1, size)]


def score(engine: Engine, windows: list[list[int]], name: str) -> list[TopLogprobs]:
    """What the engine says of each predicted token: its logprob, and the likeliest of all."""
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    found: list[TopLogprobs] = []
    for window in track(windows, name):
        for _, output in engine.generate(window, params):
            found += output.prompt_logprobs or []
    return found


def main() -> None:
    """Score, compare, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="weights/storyteller")
    parser.add_argument("--tokens", type=int, default=20_000, help="of the text, from its start")
    arguments = parser.parse_args()
    ids = read_tokenizer(read_layout(Path(arguments.model))).encode(
        arguments.text.read_text(encoding="utf-8")
    )[: arguments.tokens]
    table = Table(title=f"{arguments.text.name}, {len(ids):,} tokens")
    headings = ("weights", "cache", "perplexity", "beside float32", "a token's logprob, off by")
    for heading in (*headings, "same best token"):
        table.add_column(heading, justify="right")
    exact: list[TopLogprobs] = []
    for dtype, cache in _PRECISIONS:
        engine, _ = load_engine(
            LaunchConfig(
                model=arguments.model, device="cpu", dtype=dtype, kv_cache_dtype=cache,
                engine=EngineConfig(max_num_sequences=1),
            )
        )  # fmt: skip
        found = score(engine, windows_of(ids, engine.n_ctx), f"{dtype}, cache {cache}")
        exact = exact or found
        pairs = list(zip(exact, found, strict=True))
        loss, base = (-sum(one.logprob for one in some) / len(some) for some in (found, exact))
        off = sum(abs(a.logprob - b.logprob) for a, b in pairs) / len(pairs)
        agree = sum(a.token_ids[0] == b.token_ids[0] for a, b in pairs) / len(pairs)
        table.add_row(
            dtype, cache, f"{math.exp(loss):.3f}", f"{math.expm1(loss - base):+.3%}", f"{off:.4f}",
            f"{agree:.2%}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
