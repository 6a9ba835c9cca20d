"""What others make of the same sizes, same device: transformers, vLLM, a loop without cache."""

import copy
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.report import Report
from benchmarks.gpu.serving import save_gpt2
from benchmarks.gpu.workbench import Workbench
from model.attention import CausalAttention


def time_loop(bench: Workbench, report: Report) -> None:
    """Time our own model in nanoGPT's manner for one sequence: no cache, the whole text each time.

    It stands in for its sample.py, which is not at hand here.
    """
    model = copy.deepcopy(bench.model).to(bench.device, torch.bfloat16)
    attend = CausalAttention(bench.config)
    ids = torch.tensor(bench.prompts(1, 64), device=bench.device)
    num_tokens = 4 if bench.is_smoke else 128
    times = []
    for _ in range(2):
        text = ids
        start = time.perf_counter()
        with torch.inference_mode():
            for _ in range(num_tokens):
                hidden = model(text, torch.arange(text.shape[1], device=bench.device), attend)
                probabilities = model.logits(hidden[:, -1]).softmax(-1)
                text = torch.cat((text, torch.multinomial(probabilities, 1)), dim=1)
        bench.synchronize()
        times.append(time.perf_counter() - start)
    _add(report, "a loop without cache, as nanoGPT's sample.py has one", 1, num_tokens / times[-1])


def time_static(bench: Workbench, report: Report) -> None:
    """Time transformers' greedy `generate` with a static cache, which it compiles on CUDA."""
    peer = _peer(bench, report)
    if peer is None:
        return
    num_tokens = 4 if bench.is_smoke else 64
    for count in (1,) if bench.is_smoke else (1, 64):
        ids = torch.tensor(bench.prompts(count, 64), device=bench.device)
        times = []
        for _ in range(3):  # the first two compile
            start = time.perf_counter()
            with torch.inference_mode():
                peer.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                    min_new_tokens=num_tokens, max_new_tokens=num_tokens,
                    cache_implementation="static",
                )  # fmt: skip
            bench.synchronize()
            times.append(time.perf_counter() - start)
        rate = count * num_tokens / times[-1]
        _add(report, "transformers, static cache", count, rate)
        if count == 1 and "1" in report.values:
            report.values["peer"] = report.values["1"] / rate


def time_continuous(bench: Workbench, report: Report) -> None:
    """Time transformers' continuous batching, greedy, its cache made and warmed before."""
    bench.forget_engines()  # it takes what memory it finds
    peer = _peer(bench, report)
    if peer is None:
        return
    from transformers import ContinuousBatchingConfig, GenerationConfig

    num_tokens = 4 if bench.is_smoke else 128  # its thread takes a third of a second to end
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=num_tokens, pad_token_id=0, eos_token_id=-1
    )
    for count in (2,) if bench.is_smoke else (64, 256):
        prompts = bench.prompts(count, 64)
        # Left to itself it fills the memory, most of it with masks, which takes long. Its blocks
        # have 256 tokens, so these are two for each sequence, and all prompts fit into a step.
        sizes = ContinuousBatchingConfig(max_batch_tokens=64 * count, num_blocks=8 + 2 * count)
        times = []
        for _ in range(2):
            start = time.perf_counter()
            outputs = peer.generate_batch(
                inputs=prompts, generation_config=settings, continuous_batching_config=sizes,
                persistent_manager=True,
            )  # fmt: skip
            bench.synchronize()
            times.append(time.perf_counter() - start)
        peer.destroy_cached_continuous_batching_manager()  # made for so many sequences
        made = sum(len(output.generated_tokens) for output in outputs.values())
        _add(report, "transformers, continuous batching", count, made / times[-1])


def time_vllm(bench: Workbench, report: Report) -> None:
    """Time vLLM, greedy and offline, in a process of its own: it takes the memory it finds."""
    if importlib.util.find_spec("vllm") is None:
        report.parts.append("Not run: vllm cannot be imported here.")
        return
    bench.forget_engines()
    counts = (1,) if bench.is_smoke else (1, 64, 256)
    with tempfile.TemporaryDirectory() as folder:
        save_gpt2(bench, Path(folder) / "model")
        done = subprocess.run(
            [
                *(sys.executable, "-m", "benchmarks.gpu.vllm_offline", str(Path(folder) / "model")),
                *("--num-tokens", "4" if bench.is_smoke else "128"),
                *("--counts", *map(str, counts)),
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"vLLM ended with {done.returncode}:\n{done.stderr[-2000:]}")
    for count, rate in json.loads(done.stdout.splitlines()[-1]).items():
        _add(report, "vLLM", int(count), rate)


def _peer(bench: Workbench, report: Report) -> Any:
    """GPT-2 as transformers has it; None where that cannot be imported, which is then said."""
    if importlib.util.find_spec("transformers") is None:
        report.parts.append("Not run: transformers cannot be imported here.")
        return None
    from transformers import GPT2Config, GPT2LMHeadModel

    config = bench.config
    peer_config = GPT2Config(
        n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
        n_positions=config.n_ctx, vocab_size=config.vocab_size,
    )  # fmt: skip
    return GPT2LMHeadModel(peer_config).to(bench.device, torch.bfloat16).eval()


def _add(report: Report, name: str, count: int, rate: float) -> None:
    ours = report.values.get(str(count))
    ratio = "" if ours is None else f"; kvik, the engine alone: {ours / rate:.2f} times as many"
    report.parts.append(f"{name}, {count} sequences: {rate:,.0f} tokens/s{ratio}.")
