"""How a decode step begins and ends, before and behind the layers, on the device's own memory.

The definition, in torch, which a CPU and the meta device run; `engine.step_triton` is the same in
three kernels. Both have static shapes and read nothing back to the host. Knows no requests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.batch import ModelInput
from engine.draw import Draw, Filters, draw, lowest_argmax
from engine.random_stream import NoiseKeys
from engine.sampling_params import COLDEST
from model.gpt import GPT

NOT_FINITE = -1  # in place of a token id


@dataclass(frozen=True, slots=True)
class Slots:
    """What S running sequences need for their next tokens; the last slot is padding.

    Of padding all is zero and stays so, whoever steps: its table is all null block.
    """

    # Rows: token, position, seed, choice, top_k. What is gathered of a row lies together, as
    # kernels take it.
    integers: Tensor  # (5, S) int64
    shares: Tensor  # (3, S) float64: temperature, top_p, min_p
    tables: Tensor  # (S, blocks) int32


@dataclass(frozen=True, slots=True)
class StepInput:
    """What a step of N of the slots gathers before it can compute."""

    batch: ModelInput
    x: Tensor  # (N, C), embedded
    temperature: Tensor  # (N,) float64, COLDEST where a row is greedy
    filters: Filters
    keys: NoiseKeys  # of the tokens to be drawn


Begin = Callable[[GPT, Slots, Tensor, int], StepInput]
Finish = Callable[[Tensor, Slots, Tensor, int, Tensor | None], Tensor]


class StepKernels(NamedTuple):
    """What a step runs before and behind its layers; all that there are give the same bits."""

    begin: Begin
    draw: Draw
    finish: Finish


def begin(model: GPT, slots: Slots, chosen: Tensor, block_size: int) -> StepInput:
    """Gather what the `chosen` slots (N,) int64 hold, and embed their tokens.

    Where a slot is chosen more than once, it is padding.
    """
    tokens, positions, seeds, choices, top_k = slots.integers.index_select(1, chosen).unbind()
    temperature, top_p, min_p = slots.shares.index_select(1, chosen).unbind()
    batch = ModelInput(
        tokens=tokens,
        positions=positions,
        row_sequences=chosen,
        block_tables=slots.tables,
        slot_blocks=slots.tables[chosen, positions // block_size].long(),
        slot_offsets=positions % block_size,
    )
    return StepInput(
        batch=batch,
        x=model.embed(tokens, positions),
        temperature=temperature.clamp(min=COLDEST),
        filters=Filters(top_k, top_p, min_p, torch.ones_like(top_p), has_typical_p=False),
        # The token to be drawn stands behind the one about to be computed.
        keys=NoiseKeys(seeds, choices, positions + 1),
    )


def finish(
    logits: Tensor, slots: Slots, chosen: Tensor, n_ctx: int, drawn: Tensor | None
) -> Tensor:
    """Advance the `chosen` slots (N,) by logits (N, V): their token ids (N,), or NOT_FINITE.

    That is the lowest id with the highest logit, or what was `drawn` (N,) for a row that has a
    temperature.
    """
    token_ids, best = lowest_argmax(logits)
    if drawn is not None:
        is_greedy = slots.shares[0].index_select(0, chosen) == 0
        token_ids = token_ids.where(is_greedy, drawn)
    is_finite = best.isfinite()
    advance(slots, chosen, token_ids.masked_fill(~is_finite, 0), n_ctx)
    return token_ids.masked_fill(~is_finite, NOT_FINITE)


def advance(slots: Slots, chosen: Tensor, token_ids: Tensor, n_ctx: int) -> None:
    """Leave the `chosen` slots (N,) ready for the next step, with the tokens (N,) it computes."""
    positions = slots.integers[1].index_select(0, chosen)
    slots.integers[0].index_copy_(0, chosen, token_ids)
    # A sequence may have ended without the device knowing: it must stay inside the context.
    slots.integers[1].index_copy_(0, chosen, (positions + 1).clamp(max=n_ctx - 1))
    slots.integers[:, -1].zero_()


BY_DEFINITION = StepKernels(begin, draw, finish)
