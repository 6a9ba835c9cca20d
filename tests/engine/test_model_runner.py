"""The whole step on the `meta` device, whose tensors have no values: what reads one back raises."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from engine.config import EngineConfig
from engine.engine import Engine
from engine.sampling_params import SamplingParams
from tests.engine.engines import CONFIG, Request, random_prompt, run
from tests.tiny_models import tiny_gpt


class Results(TorchFunctionMode):
    """Lets a step read its results back, as zeros, and notes each time which tensor it was.

    Every other read is left to the meta device, which has nothing to answer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[torch.dtype, tuple[int, ...]]] = []
        self.num_computed_since = 0  # operations after the last read

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not Tensor.tolist:
            self.num_computed_since += getattr(func, "__name__", "") != "__get__"  # of attributes
            return func(*args, **(kwargs or {}))
        (tensor,) = args
        self.reads.append((tensor.dtype, tuple(tensor.shape)))
        self.num_computed_since = 0
        values = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
        return (values == 0 if tensor.dtype == torch.bool else values).numpy().tolist()


def make_engine_without_values(dtype: torch.dtype) -> Engine:
    return Engine(
        copy.deepcopy(tiny_gpt(CONFIG)).to(dtype).to("meta"),
        EngineConfig(block_size=4, max_num_sequences=16, max_num_scheduled_tokens=24),
        num_blocks=60,
        vocab_size=95,
        eos_token_ids=(),
    )


KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"logit_bias": {3: 1.0}, "allowed_token_ids": (1, 2, 3), "min_tokens": 3, "seed": 4},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_reads_nothing_from_the_device_but_its_draws_at_the_end(dtype: torch.dtype) -> None:
    engine = make_engine_without_values(dtype)
    # Prompts whole, in chunks and with a common beginning, beside decoding.
    requests = [
        Request(
            [7] * 9 + random_prompt(index * 5 % 40, seed=index),
            SamplingParams(max_tokens=6, ignore_eos=True, **KINDS[index % len(KINDS)]),
            arrives=index,
        )
        for index in range(15)
    ]
    step = engine.step
    num_steps = 0

    def watched_step() -> object:
        nonlocal num_steps
        with Results() as results:
            output = step()
        draws = [token for token in output.outputs if token.token_id is not None] if output else []
        rows = (len(draws),)
        assert results.reads == [(torch.int64, rows), (torch.bool, rows)] * bool(draws)
        assert not draws or results.num_computed_since == 0  # nothing waits behind a read
        num_steps += 1
        return output

    engine.step = watched_step  # type: ignore[assignment, method-assign]
    results = run(engine, requests)

    assert [len(result.token_ids) for (result,) in results] == [6] * 15
    assert num_steps > 15


def test_logprobs_are_read_with_the_draws_and_nothing_else_is() -> None:
    engine = make_engine_without_values(torch.float32)
    params = SamplingParams(max_tokens=2, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    request = Request(random_prompt(20, seed=1), params)

    with Results() as seen:
        ((result,),) = run(engine, [request])

    assert (len(result.prompt_logprobs), len(result.logprobs)) == (19, 2)
    assert {shape[0] for _, shape in seen.reads} == {1, 19}  # the drawn row, the prompt's rows
