"""How fast a long text is scored (echo with logprobs, max_tokens 0), against prefill in one run.

`python -m benchmarks.scoring --model DIR` alternates the three, so that a busy machine slows all.
Prefill computes no logits at all, so the head's product alone, which is timed beside them, keeps
scoring from reaching its speed.
"""

import argparse
import cProfile
import pstats
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.decode import random_prompts
from engine.config import EngineConfig, LaunchConfig
from engine.engine import Engine
from engine.kv_cache import KVCache
from engine.loading import load_engine
from engine.messages import Choice, Submit
from engine.network import Network, make_network
from engine.sampling_params import SamplingParams
from weights.checkpoint import load
from weights.layout import read_layout


def measure_prompts(
    engine: Engine, prompts: list[list[int]], *, prompt_logprobs: int | None
) -> float:
    """Seconds that prompts take, one after another, without a token drawn behind them."""
    params = SamplingParams(max_tokens=0, prompt_logprobs=prompt_logprobs)
    salt = time.monotonic_ns().to_bytes(8, "little")  # nothing is cached
    start = time.perf_counter()
    for index, prompt_ids in enumerate(prompts):
        engine.add(
            Submit(
                request_id=f"bench-{index}",
                prompt_ids=prompt_ids,
                choices=[Choice(seq_id=index, index=0)],
                params=params,
                salt=salt,
            )
        )
        num_scored = 0
        while (output := engine.step()) is not None:
            num_scored += sum(len(one.prompt_logprobs or ()) for one in output.outputs)
        assert num_scored == (0 if prompt_logprobs is None else len(prompt_ids) - 1)
    return time.perf_counter() - start


def load_network(path: Path, dtype: torch.dtype, vocab_size: int) -> Network:
    """The model as the engine runs it, for its head: the cache is next to nothing."""
    model = load(path, device="cpu", dtype=dtype)
    cache = KVCache(model.config, num_blocks=2, block_size=16, dtype=dtype, device="cpu")
    return make_network(
        model, cache, vocab_size=vocab_size, attention=None, use_triton=False, quantizes=False,
        same_bytes=True, fuses=True,
    )  # fmt: skip


def measure_head(network: Network, hidden: torch.Tensor) -> float:
    """Seconds that the logits of all rows (N, C) take, in as many products as steps would make."""
    most = EngineConfig().step_tokens
    start = time.perf_counter()
    for first in range(0, len(hidden), most):
        network.logits(hidden[first : first + most])
    return time.perf_counter() - start


def main() -> None:
    """Compare scoring with prefill, turn and turn about."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--tokens", type=int, default=1000, help="of a prompt")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--top", type=int, nargs="+", default=[0, 5], help="alternatives asked for")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="where scoring spends its time")
    arguments = parser.parse_args()

    console = Console()
    engine, ready = load_engine(LaunchConfig(model=str(arguments.model), dtype=arguments.dtype))
    prompts = random_prompts(arguments.prompts, arguments.tokens, engine.vocab_size)
    dtype = torch.bfloat16 if arguments.dtype == "bfloat16" else torch.float32
    network = load_network(arguments.model, dtype, engine.vocab_size)
    hidden = torch.randn(arguments.tokens, read_layout(arguments.model).config.n_embd)
    console.print(
        f"{arguments.model}, {ready.device}, {arguments.dtype}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; {arguments.prompts} prompts of {arguments.tokens} "
        f"tokens, one after another; medians of {arguments.rounds} rounds, alternating"
    )
    kinds: list[int | None] = [None, *arguments.top]
    seconds: dict[int | None, list[float]] = {kind: [] for kind in kinds}
    in_head: list[float] = []
    for kind in kinds:  # warm: kernels, allocator
        measure_prompts(engine, prompts[:1], prompt_logprobs=kind)
    measure_head(network, hidden)
    for _ in range(arguments.rounds):
        for kind in kinds:
            seconds[kind].append(measure_prompts(engine, prompts, prompt_logprobs=kind))
        in_head.append(arguments.prompts * measure_head(network, hidden))

    prefill, product = statistics.median(seconds[None]), statistics.median(in_head)
    num_tokens = arguments.prompts * arguments.tokens
    table = Table()
    for heading in ("", "tokens/s", "of prefill"):
        table.add_column(heading, justify="right")
    rows = [("prefill", prefill), ("prefill + the head's product", prefill + product)]
    rows += [(f"logprobs={top}", statistics.median(seconds[top])) for top in arguments.top]
    for name, taken in rows:
        table.add_row(name, f"{num_tokens / taken:,.0f}", f"{prefill / taken:.2f}")
    console.print(table)
    if arguments.profile:
        with cProfile.Profile() as profile:
            measure_prompts(engine, prompts, prompt_logprobs=arguments.top[-1])
        pstats.Stats(profile).sort_stats("tottime").print_stats(18)


if __name__ == "__main__":
    main()
