"""The draw of `engine.draw` without filters, on a GPU: noise and maximum of a row in one kernel.

In torch it is some hundred operations on whole rows, each a kernel that writes 100 MB for 256 rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.random_stream import NoiseKeys

_IDS = 1024  # of one row that a program looks at
_NO_CHANCE = -19.5  # below this x, even the loudest noise loses to the faintest at x = 0


def draw(logits: Tensor, temperature: Tensor, keys: NoiseKeys) -> Tensor:
    """Draw a token id (R,) for each row of logits (R, V) float32 and temperatures (R,) float64.

    The same as `engine.draw.draw`. A row without a finite highest logit gets some id.
    """
    num_rows, vocab_size = logits.shape
    num_parts = triton.cdiv(vocab_size, _IDS)
    best = logits.amax(-1)
    peaks = torch.empty(num_rows, num_parts, dtype=torch.float64, device=logits.device)
    ids = torch.empty(num_rows, num_parts, dtype=torch.int64, device=logits.device)
    _draw_kernel[(num_rows, num_parts)](
        logits, best, temperature.contiguous(), keys.seed.contiguous(),
        keys.choice.contiguous(), keys.position.contiguous(), peaks, ids,
        vocab_size, logits.stride(0), IDS=_IDS, NO_CHANCE=_NO_CHANCE, num_warps=4,
    )  # fmt: skip
    return ids.gather(1, peaks.argmax(-1, keepdim=True))[:, 0]


# Specialised to the addresses of the keys, it would be another program for one row than for two.
@triton.jit(
    do_not_specialize_on_alignment=["temperatures", "seeds", "choices", "positions", "best"]
)
def _draw_kernel(
    logits, best, temperatures, seeds, choices, positions, peaks, ids, num_ids, logits_stride,
    IDS: tl.constexpr, NO_CHANCE: tl.constexpr,
):  # fmt: skip
    """Find the highest x + noise among some ids of one row, and the lowest id that has it."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at = row * tl.num_programs(1) + part
    token = part * IDS + tl.arange(0, IDS)
    is_token = token < num_ids
    logit = tl.load(logits + row * logits_stride + token, mask=is_token, other=float("-inf"))
    x = (logit.to(tl.float64) - tl.load(best + row).to(tl.float64)) / tl.load(temperatures + row)
    highest = tl.max(x, 0)
    token_of_highest = part * IDS
    if highest > NO_CHANCE:
        # The 23 bits of a token as in `NoiseKeys`, whose layout this repeats.
        seed = tl.load(seeds + row)
        choice = tl.load(choices + row).to(tl.uint32)
        position = tl.load(positions + row).to(tl.uint32)
        none = tl.zeros((IDS,), tl.uint32)
        w0, w1, w2, w3 = tl.philox(
            seed, (token // 16).to(tl.uint32), none + position, none + choice, none
        )
        word = (token % 16) // 4
        bits = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
        top = (bits >> ((token % 4) * 8).to(tl.uint32)) & 0xFF
        w0, w1, w2, w3 = tl.philox(
            seed, (token // 8).to(tl.uint32), none + position, none + choice, none + 1
        )
        word = (token % 8) // 2
        bits = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
        low = ((bits >> ((token % 2) * 16).to(tl.uint32)) & 0xFFFF) >> 1
        k = ((top << 15) | low).to(tl.float64)
        noise = -tl.log(-tl.log((k + 0.5) * 1.1920928955078125e-07))  # 2^-23
        x += noise.to(tl.float32).to(tl.float64)
        highest = tl.max(x, 0)
        token_of_highest = tl.min(tl.where(x == highest, token, num_ids - 1), 0)
    tl.store(peaks + at, highest)
    tl.store(ids + at, token_of_highest.to(tl.int64))
