"""What service launches on a GPU has been compiled before: by warming up, and by the graphs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.cuda_graph import DecodeStep, Sampling
from model.config import GPTConfig
from tests.engine.decoding import params
from tests.engine.engines import Request, make_engine, random_prompt, run
from tests.tiny_models import tiny_gpt

pytest.importorskip("triton", reason="triton comes with torch on CUDA and with the test extra")

from triton.runtime.interpreter import InterpretedFunction

from engine.triton_operands import IS_INTERPRETED

pytestmark = pytest.mark.skipif(
    not IS_INTERPRETED, reason="launches are noted where kernels are interpreted"
)

# So many heads that 8 rows are as many pairs as are attended to in turn, and two parts of keys.
CONFIG = GPTConfig(n_layer=1, n_head=64, n_embd=64, n_ctx=160, vocab_size=97)
NUM_SEQUENCES = 9

# A program as Triton tells one from another: a kernel, its constants, and of each other argument
# the type and what the compiler may rely on.
Program = tuple[Any, ...]


def program_of(kernel: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Program:
    """Which program a launch wants."""
    free = set(kernel.kwargs.get("do_not_specialize") or ())
    unaligned = free | set(kernel.kwargs.get("do_not_specialize_on_alignment") or ())
    kinds: list[Any] = []
    for name, value in zip(kernel.arg_names, arguments, strict=False):
        if isinstance(value, Tensor):
            kinds.append((name, value.dtype, name in unaligned or value.data_ptr() % 16 == 0))
        elif isinstance(value, int) and name not in free:
            kinds.append((name, value == 1, value % 16 == 0, abs(value) >= 2**31))
    return kernel.__name__, *kinds, *sorted(keywords.items(), key=lambda item: item[0])


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> set[Program]:
    """Those that were launched so far."""
    seen: set[Program] = set()
    launch = InterpretedFunction.run

    def note_and_launch(self: Any, *arguments: Any, **keywords: Any) -> Any:
        constants = {k: v for k, v in keywords.items() if k not in ("grid", "warmup")}
        seen.add(program_of(self, arguments, constants))
        return launch(self, *arguments, **keywords)

    monkeypatch.setattr(InterpretedFunction, "run", note_and_launch)
    return seen


def test_service_launches_no_program_that_warming_up_did_not(
    programs: set[Program],
) -> None:
    steps: list[DecodeStep] = []

    def make_step(*arguments: Any, **keywords: Any) -> DecodeStep:
        steps.append(DecodeStep(*arguments, **keywords))
        return steps[0]

    engine = make_engine(
        tiny_gpt(CONFIG), num_blocks=500, max_num_sequences=NUM_SEQUENCES, use_triton=True,
        decode_step=make_step, share_completion_blocks=False,
    )  # fmt: skip
    engine.warm_up()
    with torch.inference_mode():  # what a device records as graphs
        for bucket in (1, NUM_SEQUENCES):
            for sampling in Sampling:
                steps[0].run(bucket, sampling)
    engine.is_batch_invariant()
    known = set(programs)
    assert {program[0] for program in known} >= {"_decode_kernel", "_prefill_kernel"}

    kinds: list[dict[str, Any]] = [
        {}, {"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.9}, {"logprobs": 2},
        {"temperature": 0.8, "top_k": 5, "presence_penalty": 0.5}, {"prompt_logprobs": 1},
        {"typical_p": 0.5, "temperature": 1.0}, {"logit_bias": {3: 1.0}}, {},
    ]  # fmt: skip
    lengths = [3, 16, 5, 1, 17, 4, 2, 7, 140]  # the last is a prompt of several chunks
    arrivals = [0, 0, 0, 1, 1, 1, 1, 1, 3]
    run(engine, [
        Request(
            random_prompt(length, seed=index),
            params(max_tokens=5, seed=index, **{"temperature": 0.0, **kind}),
            arrives=arrives,
        )
        for index, (kind, length, arrives) in enumerate(zip(kinds, lengths, arrivals, strict=True))
    ])  # fmt: skip

    assert programs - known == set()
