"""Engines over tiny models, and a way to run workloads through them."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import Choice, Submit, TokenOutput, TopLogprobs
from engine.sampling_params import SamplingParams
from model.config import GPTConfig
from model.gpt import GPT
from tests.tiny_models import tiny_gpt

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=64, vocab_size=97)
DTYPES = [torch.float32, torch.bfloat16]
# What `make_engine` takes for each: how weights are held and computed with, and what the cache has.
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.bfloat16, "quantizes": True},
    "bfloat16, cache int8": {"dtype": torch.bfloat16, "kv_cache_dtype": torch.int8},
    "int8, cache int8": {
        "dtype": torch.bfloat16, "quantizes": True, "kv_cache_dtype": torch.int8,
    },
}  # fmt: skip


def make_engine(
    model: GPT | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    num_blocks: int = 200,
    vocab_size: int = 95,  # two ids are padding
    eos_token_ids: tuple[int, ...] = (),
    attention: Any = None,
    use_triton: bool | None = None,
    decode_step: Any = None,
    quantizes: bool = False,
    kv_cache_dtype: torch.dtype | None = None,
    **config: Any,
) -> Engine:
    """An engine over a copy of `model`: packing changes the one it is given."""
    settings: dict[str, Any] = {
        "block_size": 4,
        "max_num_sequences": 16,
        "max_num_scheduled_tokens": 64,
        "share_completion_blocks": True,
        **config,
    }
    return Engine(
        copy.deepcopy(model or tiny_gpt(CONFIG)).to(dtype),
        EngineConfig(**settings),
        num_blocks=num_blocks,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        attention=attention,
        use_triton=use_triton,
        decode_step=decode_step,
        quantizes=quantizes,
        kv_cache_dtype=kv_cache_dtype,
    )


@dataclass
class Result:
    """All that one choice of a request got."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TopLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TopLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    error_code: str | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0

    def add(self, output: TokenOutput) -> None:
        """Take in one output."""
        assert self.finish_reason is None, "nothing comes after the end"
        if output.token_id is not None:
            self.token_ids.append(output.token_id)
        if output.logprobs is not None:
            self.logprobs.append(output.logprobs)
        self.prompt_logprobs += output.prompt_logprobs or []
        self.finish_reason = output.finish_reason
        self.error, self.error_code = output.error, output.error_code
        if output.finish_reason is not None:
            self.num_cached_tokens = output.num_cached_tokens
            self.num_preemptions = output.num_preemptions

    @property
    def drawn(self) -> tuple[list[int], list[TopLogprobs], str | None]:
        """What must be the same, to the bit, whatever else happened."""
        return self.token_ids, self.logprobs, self.finish_reason


@dataclass(frozen=True)
class Request:
    """A prompt, how to continue it, and the step before which it arrives."""

    prompt_ids: list[int]
    params: SamplingParams
    arrives: int = 0
    num_choices: int = 1
    completion_ids: list[int] = field(default_factory=list)
    salt: bytes = b""


def run(engine: Engine, requests: Iterable[Request]) -> list[list[Result]]:
    """Run requests to their ends; results by request and choice."""
    waiting = list(enumerate(requests))
    results = [[Result() for _ in range(request.num_choices)] for _, request in waiting]
    place_of: dict[int, tuple[int, int]] = {}
    waiting.sort(key=lambda item: item[1].arrives)
    step = next_seq_id = 0
    while waiting or not engine.is_idle:
        while waiting and waiting[0][1].arrives <= step:
            index, request = waiting.pop(0)
            choices = []
            for choice in range(request.num_choices):
                place_of[next_seq_id] = (index, choice)
                choices.append(
                    Choice(seq_id=next_seq_id, index=choice, completion_ids=request.completion_ids)
                )
                next_seq_id += 1
            engine.add(
                Submit(
                    request_id=f"request-{index}",
                    prompt_ids=request.prompt_ids,
                    choices=choices,
                    params=request.params,
                    salt=request.salt,
                )
            )
        output = engine.step()
        step += 1
        for token in output.outputs if output is not None else []:
            index, choice = place_of[token.seq_id]
            results[index][choice].add(token)
    return results


def random_prompt(length: int, *, seed: int, vocab_size: int = 95) -> list[int]:
    """Ids at random."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(vocab_size, (length,), generator=generator).tolist()
    return ids


def sampled(max_tokens: int, **options: Any) -> SamplingParams:
    """Params whose results show every bit: draws at a high temperature, and logprobs."""
    return SamplingParams(**{"temperature": 2.0, "logprobs": 3, **options}, max_tokens=max_tokens)


def workload() -> list[Request]:
    """A dozen requests of all lengths, some with a common beginning."""
    common = random_prompt(21, seed=100)
    prompts = [random_prompt(length, seed=length) for length in (1, 2, 3, 8, 17, 40)]
    prompts += [common + random_prompt(length, seed=50 + length) for length in (1, 5, 9)]
    prompts += [common[:12] + random_prompt(20, seed=77), common, common]
    return [
        Request(prompt, sampled(10 + 3 * index % 14, seed=index))
        for index, prompt in enumerate(prompts)
    ]
