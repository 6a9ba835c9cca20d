"""Choose one token a row from edited logits: the definition of the filters and of the draw.

A few operations on whole rows, with static shapes and no host reads, for any device; what
`engine.draw_triton` and `engine.sampler_cpu`, the same draw for a GPU and for a CPU, are tested
against. It knows no requests.

x = (logit - highest logit) / temperature; tokens are ordered by logit, highest first, the lower id
first among equals. Filters keep, one after another: the first `top_k`; of these the shortest
beginning whose mass reaches `top_p` of theirs; those at least `min_p` times as probable as the
first; and of what is left, ordered by |x - mean x| (the distance of the surprise from the entropy:
Meister et al., 2022, arXiv:2202.00666), the shortest beginning whose mass reaches `typical_p`. The
highest x + noise wins, the lower id among equals.

A row's token does not depend on what else is in the batch: masses are whole numbers, in units of
2^-36 of the first token's, so float64 sums over a vocabulary (fewer than 2^17 tokens) are exact and
have no order. All else is elementwise, a maximum or a comparison; a mass is made of operations that
every device rounds alike.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.random_stream import NoiseKeys

CHUNK = 64  # neighbouring ids whose highest logit `lowest_argmax` finds first
WEIGHTLESS = -26.0  # an x whose mass is less than half a unit
UNIT_BITS = 36  # the first token has 2^36 units of mass
LOG2_E = math.log2(math.e)
MASSLESS = np.float32(-40)  # a power of 2 that is surely no unit; lower ones leave float32
POWERS_OF_TWO = tuple(math.log(2) ** k / math.factorial(k) for k in range(1, 7))  # Taylor's


@dataclass(frozen=True, slots=True)
class Filters:
    """The filters of R rows, each (R,)."""

    top_k: Tensor  # int64, at least 1; the vocabulary or more is off
    top_p: Tensor  # float64, as the rest; 1 is off
    min_p: Tensor  # 0 is off
    typical_p: Tensor  # 1 is off
    has_typical_p: bool  # known on the host, as it decides which operations run


Draw = Callable[[Tensor, Tensor, NoiseKeys, Filters | None], Tensor]  # `draw`, or its equal


def draw(
    logits: Tensor, temperature: Tensor, keys: NoiseKeys, filters: Filters | None = None
) -> Tensor:
    """Draw a token id (R,) for each row of logits (R, V) float32 and temperatures (R,) float64.

    Temperatures are positive and not below 1e-30, where float32 would divide by zero. A row
    without a finite highest logit gets some id.
    """
    best = logits.amax(-1)
    x = (logits.double() - best[:, None]) / temperature[:, None]
    if filters is not None:
        x = x.masked_fill(~kept_tokens(logits, temperature, filters), -math.inf)
    return (x + keys.all_noise(logits.shape[1])).argmax(-1)


def kept_tokens(logits: Tensor, temperature: Tensor, filters: Filters) -> Tensor:
    """Apply the filters by sorting whole rows: which tokens remain, (R, V) bool."""
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    best = ordered[:, 0]
    kept = torch.arange(logits.shape[1], device=logits.device) < filters.top_k[:, None]
    weights = mass(ordered, best, temperature)
    goal = mass_goal(filters.top_p, sum_of(weights * kept))
    kept &= weights.double().cumsum(-1) - weights < goal[:, None]
    kept &= ordered >= logit_at(filters.min_p.log(), best, temperature)[:, None]
    kept = torch.empty_like(kept).scatter_(-1, ids, kept)  # from here on in the order of the ids
    if filters.has_typical_p:
        kept = _typical_tokens(logits, best, temperature, kept, filters.typical_p)
    return kept


def _typical_tokens(
    logits: Tensor, best: Tensor, temperature: Tensor, kept: Tensor, typical_p: Tensor
) -> Tensor:
    weights = mass(logits, best, temperature) * kept
    total = sum_of(weights)
    x = (logits.double() - best[:, None]) / temperature[:, None]
    # Whole numbers again, in sixteenths lest their sum reach 2^53. The clamp is for 0 * -inf.
    mean = sum_of((weights * x.clamp(min=2 * WEIGHTLESS) / 16).round_()) * 16 / total
    distance = (x - mean[:, None]).abs_().masked_fill_(~kept, math.inf)
    order = distance.sort(dim=-1, stable=True).indices
    weights = weights.gather(-1, order)
    before = weights.double().cumsum(-1) - weights
    typical = before < mass_goal(typical_p, total)[:, None]  # what was not kept comes too late
    return torch.empty_like(kept).scatter_(-1, order, typical)


def lowest_argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Find each row's highest logit and the lowest id that has it: (R, V) to ids (R,), logits (R,).

    NaN counts as highest. In two levels, because on a CPU the maximum of every chunk and two
    short searches take a fifth of the time of torch's argmax.
    """
    peaks = chunk_peaks(logits)
    first = peaks.argmax(-1, keepdim=True) * CHUNK
    ids = first + torch.arange(CHUNK, device=logits.device)
    lane = logits.gather(1, ids.clamp_(max=logits.shape[1] - 1)).argmax(-1, keepdim=True)
    return (first + lane)[:, 0], peaks.amax(-1)


def chunk_peaks(logits: Tensor) -> Tensor:
    """Find the highest logit of every CHUNK neighbouring ids: (R, V) to (R, ceil(V / CHUNK))."""
    whole = logits.shape[1] // CHUNK
    peaks = logits[:, : whole * CHUNK].view(len(logits), whole, CHUNK).amax(-1)
    if logits.shape[1] == whole * CHUNK:
        return peaks
    return torch.cat((peaks, logits[:, whole * CHUNK :].amax(-1, keepdim=True)), 1)


def mass(logits: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """Compute the mass of tokens in whole units: (R, V) logits, (R,) the rest, (R, V) float32.

    An exponential of its own, within 5e-6: 2 to the whole part of a power, by its bits, times 2 to
    the rest, by a polynomial. Each operation is rounded by itself, and whoever repeats them (no
    fused multiply-add!) gets the same bits, on any device.
    """
    scale = (LOG2_E / temperature).float()
    power = (logits - best[:, None]).mul_(scale[:, None]).clamp_(min=float(MASSLESS))
    whole = power.round()
    rest = power.sub_(whole)
    y = torch.full_like(rest, POWERS_OF_TWO[-1])
    for coefficient in (*reversed(POWERS_OF_TWO[:-1]), 1.0):
        y.mul_(rest).add_(coefficient)
    bits = whole.int().add_(UNIT_BITS + 127).bitwise_left_shift_(23)
    return y.mul_(bits.view(torch.float32)).round_()


def sum_of(masses: Tensor) -> Tensor:
    """Add up whole numbers (R, V), exactly: (R,) float64."""
    return masses.sum(-1, dtype=torch.float64)


def mass_goal(p: Tensor, total: Tensor) -> Tensor:
    """Compute what a beginning of the order must reach: a token with less before it is kept.

    The first token always is. Weightless ones may not be: that is no loss, as they never win.
    """
    return (p * total).clamp(min=0.5)


def logit_at(x: Tensor | float, best: Tensor, temperature: Tensor) -> Tensor:
    """Find the logit (R,) float32 that lies at x.

    Its rounding cannot exclude a token: a float32 below the nearest float32 is below the value.
    """
    return (best.double() + temperature * x).float()
