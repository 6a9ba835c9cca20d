"""The ends of a decode step on a GPU: `engine.step_ends` in one kernel and, behind the head, two.

In torch they are some thirty, of a few numbers each: at one row up to a fifth of a step.
The bits are the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.batch import ModelInput
from engine.draw import Filters
from engine.draw_triton import draw
from engine.random_stream import NoiseKeys
from engine.sampling_params import COLDEST
from engine.step_ends import NOT_FINITE, Slots, StepInput, StepKernels
from model.gpt import GPT

_IDS = 1024  # of one row that a program looks at: one row should occupy many multiprocessors


def begin(model: GPT, slots: Slots, chosen: Tensor, block_size: int) -> StepInput:
    """Do what `engine.step_ends.begin` does, a program a row."""
    wte, wpe = model.wte.weight, model.wpe.weight
    for tensor in (slots.integers, slots.shares, slots.tables, chosen, wte, wpe):
        assert tensor.is_contiguous(), "kernels know no stride"
    num_rows, width = len(chosen), wte.shape[1]
    integers = torch.empty(8, num_rows, dtype=torch.int64, device=wte.device)
    shares = torch.empty(4, num_rows, dtype=torch.float64, device=wte.device)
    x = torch.empty(num_rows, width, dtype=wte.dtype, device=wte.device)
    _begin_kernel[(num_rows,)](
        chosen, slots.integers, slots.shares, slots.tables, wte, wpe, integers, shares, x,
        slots.integers.shape[1], slots.tables.shape[1],
        WIDTH=width, PADDED_WIDTH=triton.next_power_of_2(width), BLOCK_SIZE=block_size,
        COLDEST=COLDEST, num_warps=4,
    )  # fmt: skip
    tokens, positions, seeds, choices, top_k, next_positions, blocks, offsets = integers.unbind()
    temperature, top_p, min_p, typical_p = shares.unbind()
    batch = ModelInput(
        tokens=tokens,
        positions=positions,
        row_sequences=chosen,
        block_tables=slots.tables,
        slot_blocks=blocks,
        slot_offsets=offsets,
    )
    return StepInput(
        batch=batch,
        x=x,
        temperature=temperature,
        filters=Filters(top_k, top_p, min_p, typical_p, has_typical_p=False),
        keys=NoiseKeys(seeds, choices, next_positions),
    )


def finish(
    logits: Tensor, slots: Slots, chosen: Tensor, n_ctx: int, drawn: Tensor | None
) -> Tensor:
    """Do what `engine.step_ends.finish` does: a program for each part of a row, then one a row."""
    assert logits.stride(1) == 1, "a row's values lie together"
    num_rows, vocab_size = logits.shape
    num_parts = triton.cdiv(vocab_size, _IDS)
    part_peaks = torch.empty(num_rows, num_parts, device=logits.device)
    part_ids = torch.empty(num_rows, num_parts, dtype=torch.int32, device=logits.device)
    _peaks_kernel[(num_rows, num_parts)](
        logits, part_peaks, part_ids, vocab_size, logits.stride(0), IDS=_IDS, num_warps=4
    )
    token_ids = torch.empty_like(chosen)
    _finish_kernel[(num_rows,)](
        chosen, slots.integers, slots.shares, part_peaks, part_ids, drawn, token_ids,
        slots.integers.shape[1], num_parts, n_ctx - 1,
        PADDED_PARTS=triton.next_power_of_2(num_parts), NOT_FINITE=NOT_FINITE, num_warps=1,
    )  # fmt: skip
    return token_ids


KERNELS = StepKernels(begin, draw, finish)


# Where the arrays of a value a row lie follows from the number of rows: no program may know it.
@triton.jit(do_not_specialize_on_alignment=["chosen", "gathered", "gathered_shares"])
def _begin_kernel(
    chosen, integers, shares, tables, wte, wpe, gathered, gathered_shares, x,
    num_slots, num_blocks,
    WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    COLDEST: tl.constexpr,
):  # fmt: skip
    """Gather one row: `gathered` (8, N), `gathered_shares` (4, N) and `x` (N, C)."""
    row = tl.program_id(0).to(tl.int64)
    num_rows = tl.num_programs(0)
    # All that is loaded before all that is stored: a load waits behind a store that waits for one.
    slot = tl.load(chosen + row)
    token = tl.load(integers + slot)
    position = tl.load(integers + num_slots + slot)
    seed = tl.load(integers + 2 * num_slots + slot)
    choice = tl.load(integers + 3 * num_slots + slot)
    top_k = tl.load(integers + 4 * num_slots + slot)
    temperature = tl.load(shares + slot)
    top_p = tl.load(shares + num_slots + slot)
    min_p = tl.load(shares + 2 * num_slots + slot)
    block = tl.load(tables + slot * num_blocks + position // BLOCK_SIZE)
    channel = tl.arange(0, PADDED_WIDTH)
    is_channel = channel < WIDTH
    of_token = tl.load(wte + token * WIDTH + channel, mask=is_channel, other=0.0)
    of_position = tl.load(wpe + position * WIDTH + channel, mask=is_channel, other=0.0)
    # Added in float32 and rounded once, as torch does it.
    embedded = of_token.to(tl.float32) + of_position.to(tl.float32)
    tl.store(x + row * WIDTH + channel, embedded.to(x.dtype.element_ty), mask=is_channel)

    to = gathered + row
    tl.store(to, token)
    tl.store(to + num_rows, position)
    tl.store(to + 2 * num_rows, seed)
    tl.store(to + 3 * num_rows, choice)
    tl.store(to + 4 * num_rows, top_k)
    tl.store(to + 5 * num_rows, position + 1)
    tl.store(to + 6 * num_rows, block.to(tl.int64))
    tl.store(to + 7 * num_rows, position % BLOCK_SIZE)

    coldest = tl.full((), COLDEST, tl.float64)  # written as a number it would be a float32
    to = gathered_shares + row
    tl.store(to, tl.where(temperature < coldest, coldest, temperature))
    tl.store(to + num_rows, top_p)
    tl.store(to + 2 * num_rows, min_p)
    tl.store(to + 3 * num_rows, tl.full((), 1.0, tl.float64))  # typical_p is the host's affair


@triton.jit(do_not_specialize_on_alignment=["part_peaks", "part_ids"])
def _peaks_kernel(logits, part_peaks, part_ids, num_ids, logits_stride, IDS: tl.constexpr):
    """Find the highest logit among some ids of one row, and the lowest id that has it.

    What is not a number counts as infinite: either way the row has no token.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    token = part * IDS + tl.arange(0, IDS)
    none = float("-inf")
    logit = tl.load(logits + row * logits_stride + token, mask=token < num_ids, other=none)
    logit = tl.where(logit == logit, logit, float("inf"))
    peak = tl.max(logit, 0)
    at = row * tl.num_programs(1) + part
    tl.store(part_peaks + at, peak)
    tl.store(part_ids + at, tl.min(tl.where(logit == peak, token, num_ids - 1), 0))


@triton.jit(
    do_not_specialize_on_alignment=["chosen", "part_peaks", "part_ids", "drawn", "token_ids"]
)
def _finish_kernel(
    chosen, integers, shares, part_peaks, part_ids, drawn, token_ids,
    num_slots, num_parts, last_position,
    PADDED_PARTS: tl.constexpr, NOT_FINITE: tl.constexpr,
):  # fmt: skip
    """Choose one row's token, and leave it and its position in the row's slot.

    `drawn` may be None. A slot that several rows have is padding, which nobody writes.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PADDED_PARTS)
    is_part = part < num_parts
    peak = tl.load(part_peaks + row * num_parts + part, mask=is_part, other=float("-inf"))
    first = tl.load(part_ids + row * num_parts + part, mask=is_part, other=0)
    slot = tl.load(chosen + row)
    position = tl.load(integers + num_slots + slot)
    best = tl.max(peak, 0)
    is_finite = (best > float("-inf")) & (best < float("inf"))
    token = tl.min(tl.where(is_part & (peak == best), first, 2147483647), 0).to(tl.int64)
    if drawn is not None:
        token = tl.where(tl.load(shares + slot) == 0.0, token, tl.load(drawn + row))
    tl.store(token_ids + row, tl.where(is_finite, token, NOT_FINITE))
    is_somebody = slot != num_slots - 1
    tl.store(integers + slot, tl.where(is_finite, token, 0), mask=is_somebody)
    # A sequence may have ended without the device knowing: it must stay inside the context.
    position = tl.minimum(position + 1, last_position)
    tl.store(integers + num_slots + slot, position, mask=is_somebody)
