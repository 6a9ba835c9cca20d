"""A device that runs out of memory while it decodes by itself, at any moment."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention import PagedAttention
from engine.cuda_graph import DecodeStep, Sampling
from tests.engine.decoding import ON_DEVICE, params
from tests.engine.engines import Request, Result, make_engine, random_prompt, run


class Shortage:
    """Makes decode steps of which one call of a kind finds no memory."""

    def __init__(self, call: str, number: int) -> None:
        self._call = call
        self.calls_left = number

    def strike(self, call: str) -> None:
        """Raise if it is this call's turn."""
        if call == self._call:
            self.calls_left -= 1
            if self.calls_left == 0:
                raise torch.OutOfMemoryError("Tried to allocate more than there is.")

    def make_step(self, *arguments: Any, **keywords: Any) -> DecodeStep:
        """A step that suffers from it."""
        shortage = self

        class ShortStep(DecodeStep):
            def run(self, num_rows: int, sampling: Sampling) -> Tensor:
                shortage.strike("run")
                return super().run(num_rows, sampling)

            def read(self, token_ids: Tensor) -> Callable[[], list[list[int]]]:
                wait = super().read(token_ids)

                def strike_or_wait() -> list[list[int]]:
                    shortage.strike("read")
                    return wait()

                return strike_or_wait

        return ShortStep(*arguments, **keywords)


# Two begin, and others arrive later, alone or one behind the other: a step with a prompt in it does
# not go by what the device remembers, and may come right after one that failed.
ARRIVALS = [0, 0, 6, 9, 10, 14]


def workload() -> list[Request]:
    return [
        Request(
            random_prompt(3 + 4 * index, seed=index),
            params(max_tokens=14, seed=index, temperature=index % 2 * 0.9),
            arrives=arrives,
        )
        for index, arrives in enumerate(ARRIVALS)
    ]


@pytest.fixture(scope="module")
def undisturbed() -> list[Result]:
    return [result for (result,) in run(make_engine(attention=PagedAttention), workload())]


@pytest.mark.parametrize("max_num_rounds", [1, 4])
@pytest.mark.parametrize("call", ["run", "read"])
def test_whenever_a_device_lacks_memory_one_sequence_fails_and_no_other_notices(
    call: str, max_num_rounds: int, undisturbed: list[Result]
) -> None:
    num_failures = 0
    for number in range(1, 30):
        shortage = Shortage(call, number)
        engine = make_engine(
            **{**ON_DEVICE, "decode_step": shortage.make_step}, max_num_rounds=max_num_rounds
        )

        results = [result for (result,) in run(engine, workload())]

        failed = [result.finish_reason == "error" for result in results]
        assert sum(failed) == (shortage.calls_left <= 0), number
        num_failures += sum(failed)
        for result, whole, has_failed in zip(results, undisturbed, failed, strict=True):
            if has_failed:
                assert result.error_code == "out_of_memory"
                assert result.token_ids == whole.token_ids[: len(result.token_ids)], number
            else:
                assert result.drawn == whole.drawn, number
        assert engine.counts().stats.num_used_blocks == 0
    assert num_failures > 5
