"""How fast the engine decodes, without a server; with a peer beside it, as a ratio in one run.

`python -m benchmarks.decode --model DIR --against transformers` alternates the two, so that a busy
machine slows both; `kvik bench decode` runs the engine alone.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from engine.config import EngineConfig, LaunchConfig
from engine.engine import Engine
from engine.loading import load_engine
from engine.messages import Choice, Submit
from engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeResult:
    """One run: a number of sequences, decoded together to their ends."""

    num_sequences: int
    num_tokens: int  # completion tokens of all sequences
    seconds: float  # prompts included
    step_seconds: float  # median of the steps that only decode
    outside_seconds: float  # of it, outside the model, the head and the sampler

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens a second, prompts included in the time."""
        return self.num_tokens / self.seconds


def random_prompts(num_sequences: int, num_tokens: int, vocab_size: int) -> list[list[int]]:
    """Prompts of random ids, the same every time."""
    generator = torch.Generator().manual_seed(1)
    ids: list[list[int]] = torch.randint(
        vocab_size, (num_sequences, num_tokens), generator=generator
    ).tolist()
    return ids


def measure_decode(
    engine: Engine, prompts: list[list[int]], params: SamplingParams
) -> DecodeResult:
    """Decode all prompts together and time the steps. Prefixes are salted: nothing is cached."""
    salt = time.monotonic_ns().to_bytes(8, "little")
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
    num_tokens = 0
    steps: list[float] = []
    outside: list[float] = []
    start = before = time.perf_counter()
    while (output := engine.step()) is not None:
        now = time.perf_counter()
        num_tokens += sum(token.token_id is not None for token in output.outputs)
        # A device that feeds itself may have drawn several tokens of each.
        num_rounds, rest = divmod(output.stats.num_scheduled_tokens, len(prompts))
        if num_rounds and not rest and len(output.outputs) == num_rounds * len(prompts):
            steps.append((now - before) / num_rounds)
            outside.append((now - before - engine.kernel_seconds) / num_rounds)
        before = now
    if not steps:
        raise ValueError(
            f"no step decoded all {len(prompts)} sequences: the first had ended before the last "
            f"prompt was read; raise new_tokens, got {params.max_tokens}"
        )
    return DecodeResult(
        num_sequences=len(prompts),
        num_tokens=num_tokens,
        seconds=before - start,
        step_seconds=statistics.median(steps),
        outside_seconds=statistics.median(outside),
    )


def bench_decode(
    model: str,
    *,
    num_sequences: list[int],
    prompt_tokens: int,
    new_tokens: int,
    temperature: float,
    top_p: float,
    device: str,
    dtype: str,
    console: Console,
) -> None:
    """Measure the engine at several batch sizes and print a table.

    Raises ValueError for what does not fit into the context, and an EngineError.
    """
    # All of them at once: where some wait for others, no step is one of the whole batch.
    at_once = max(EngineConfig().max_num_sequences, *num_sequences)
    config = LaunchConfig(model=model, device=device, dtype=dtype, engine=_engine_config(at_once))
    engine, ready = load_engine(config)
    if prompt_tokens + new_tokens > engine.n_ctx:
        raise ValueError(
            f"prompt_tokens and new_tokens must fit into the context of {engine.n_ctx} tokens, "
            f"got {prompt_tokens} and {new_tokens}"
        )
    params = _params(new_tokens, temperature, top_p)
    console.print(f"{model}, {ready.device}, {ready.dtype}, {torch.get_num_threads()} threads")
    table = Table()
    for heading in ("sequences", "tokens/s", "step", "outside the kernels"):
        table.add_column(heading, justify="right")
    for count in num_sequences:
        prompts = random_prompts(count, prompt_tokens, engine.vocab_size)
        measure_decode(engine, prompts, params)  # warm: kernels, allocator
        result = measure_decode(engine, prompts, params)
        table.add_row(
            str(count),
            f"{result.tokens_per_second:,.0f}",
            f"{result.step_seconds * 1e3:.2f} ms",
            f"{result.outside_seconds * 1e3:.2f} ms",
        )
    console.print(table)


def _engine_config(max_num_sequences: int) -> EngineConfig:
    return EngineConfig(share_completion_blocks=True, max_num_sequences=max_num_sequences)


def _params(new_tokens: int, temperature: float, top_p: float) -> SamplingParams:
    return SamplingParams(
        max_tokens=new_tokens, temperature=temperature, top_p=top_p, ignore_eos=True
    )


def transformers_runner(model: str, dtype: str) -> Callable[[list[list[int]], int], float]:
    """A peer: seconds that transformers' greedy `generate` takes for a batch."""
    from transformers import GPT2LMHeadModel

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    peer = GPT2LMHeadModel.from_pretrained(model, dtype=dtypes[dtype]).eval()

    def run(prompts: list[list[int]], new_tokens: int) -> float:
        ids = torch.tensor(prompts)
        start = time.perf_counter()
        with torch.inference_mode():
            peer.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return time.perf_counter() - start

    return run


def main() -> None:
    """Compare the engine with a peer, turn and turn about."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--against", choices=["transformers"], default="transformers")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    console = Console()
    config = _engine_config(max(arguments.sequences))
    engine, ready = load_engine(
        LaunchConfig(model=str(arguments.model), dtype=arguments.dtype, engine=config)
    )
    peer = transformers_runner(str(arguments.model), arguments.dtype)
    params = _params(arguments.new_tokens, 0.0, 1.0)
    console.print(
        f"{arguments.model}, {ready.device}, {arguments.dtype}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; prompts of {arguments.prompt_tokens} tokens, "
        f"{arguments.new_tokens} new, greedy; medians of {arguments.rounds} rounds, alternating"
    )
    table = Table()
    for heading in ("sequences", "kvik tokens/s", "transformers tokens/s", "ratio", "outside"):
        table.add_column(heading, justify="right")
    for count in arguments.sequences:
        prompts = random_prompts(count, arguments.prompt_tokens, engine.vocab_size)
        measure_decode(engine, prompts, params)
        ours: list[DecodeResult] = []
        theirs: list[float] = []
        for _ in range(arguments.rounds):
            ours.append(measure_decode(engine, prompts, params))
            theirs.append(peer(prompts, arguments.new_tokens))
        speed = statistics.median(result.tokens_per_second for result in ours)
        their_speed = count * arguments.new_tokens / statistics.median(theirs)
        outside = statistics.median(r.outside_seconds / r.step_seconds for r in ours)
        table.add_row(
            str(count),
            f"{speed:,.0f}",
            f"{their_speed:,.0f}",
            f"{speed / their_speed:.2f}",
            f"{outside:.1%}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
