"""The sampler once more, slowly: one row at a time in Python and float64, from the definitions.

Shares nothing with the engine but the parameters. Filters by mass have an edge: where a mass comes
within rounding of what it must reach, `Plain.is_clear` is False and nothing can be asked.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from engine.sampling_params import SamplingParams

MASK = 0xFFFFFFFF


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def noise_bits(seed: int, choice: int, position: int, token_id: int) -> int:
    """The 23 bits k of a token, as engine/random_stream.py describes them."""
    key = (seed & MASK, seed >> 32 & MASK)
    words = philox((token_id // 16, position, choice, 0), key)
    top = words[token_id % 16 // 4] >> 8 * (token_id % 4) & 0xFF
    words = philox((token_id // 8, position, choice, 1), key)
    low = words[token_id % 8 // 2] >> 16 * (token_id % 2) & 0xFFFF
    return top << 15 | low >> 1


def gumbel(k: int) -> float:
    return -math.log(-math.log((k + 0.5) / 2**23))


@dataclass
class Plain:
    probabilities: np.ndarray  # (V,) float64: 0 for what is not kept
    logits: np.ndarray  # (V,) float64: edited, over the temperature
    is_clear: bool

    def draw(self, seed: int, choice: int, position: int) -> int:
        kept = np.flatnonzero(self.probabilities)
        noise = [gumbel(noise_bits(seed, choice, position, int(i))) for i in kept]
        return int(kept[np.argmax(self.logits[kept] + np.array(noise))])


def sample_plainly(
    logits: np.ndarray,
    params: SamplingParams,
    prompt_ids: list[int],
    completion_ids: list[int],
    eos_ids: list[int],
) -> Plain:
    edited = edit(logits, params, prompt_ids, completion_ids, eos_ids)
    if params.temperature == 0:
        greedy = np.zeros(len(edited))
        greedy[np.argmax(edited)] = 1
        return Plain(greedy, edited, True)
    scaled = (edited - edited.max()) / params.temperature
    kept, is_clear = filter_tokens(scaled, params)
    masses = np.where(kept, np.exp(scaled), 0)
    return Plain(masses / masses.sum(), scaled, is_clear)


def edit(
    logits: np.ndarray,
    params: SamplingParams,
    prompt_ids: list[int],
    completion_ids: list[int],
    eos_ids: list[int],
) -> np.ndarray:
    edited = logits.astype(np.float64)
    allowed = set(range(len(edited)))
    if params.allowed_token_ids is not None:
        allowed = set(params.allowed_token_ids)
    for token_id, bias in params.logit_bias.items():
        edited[token_id] += bias
    banned: set[int] = set()
    if len(completion_ids) < params.min_tokens:
        banned = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_ids))
    if allowed <= banned:
        banned = set()
    for token_id in range(len(edited)):
        if token_id not in allowed or token_id in banned:
            edited[token_id] = -math.inf
    for token_id in set(prompt_ids) | set(completion_ids):
        factor = params.repetition_penalty
        edited[token_id] *= 1 / factor if edited[token_id] > 0 else factor
    for token_id in set(completion_ids):
        edited[token_id] -= params.presence_penalty
        edited[token_id] -= params.frequency_penalty * completion_ids.count(token_id)
    # What the engine works on from here is float32.
    return edited.astype(np.float32).astype(np.float64)


def filter_tokens(scaled: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, bool]:
    """Which tokens remain (V,) of logits over the temperature, and whether that is beyond doubt."""
    by_probability = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    remaining = by_probability[: params.top_k] if params.top_k else by_probability
    remaining, is_clear = beginning(remaining, scaled, params.top_p)
    if params.min_p > 0:
        edge = math.log(params.min_p)
        # The edge is a float32 logit in the engine: within its rounding nothing is asked.
        is_clear &= all(abs(scaled[i] - edge) > 1e-3 or scaled[i] == edge for i in remaining)
        remaining = [i for i in remaining if scaled[i] >= edge]
    if params.typical_p < 1:
        masses = np.exp(scaled[remaining])
        mean = (masses * np.maximum(scaled[remaining], -1e9)).sum() / masses.sum()
        distance = {i: abs(scaled[i] - mean) for i in remaining}
        ordered = sorted(distance.values())
        gaps = [b - a for a, b in pairwise(ordered) if a < math.inf]
        # Two tokens at the same distance on both sides of the mean: which is first is rounding.
        sides = {(round(d, 6), scaled[i] > mean) for i, d in distance.items()}
        is_clear &= len({d for d, _ in sides}) == len(sides)
        is_clear &= all(gap == 0 or gap > 1e-4 for gap in gaps)
        remaining.sort(key=lambda i: (distance[i], i))
        remaining, still_clear = beginning(remaining, scaled, params.typical_p)
        is_clear &= still_clear
    kept = np.zeros(len(scaled), dtype=bool)
    kept[remaining] = True
    return kept, is_clear


def beginning(order: list[int], scaled: np.ndarray, p: float) -> tuple[list[int], bool]:
    """The shortest beginning of an order whose mass reaches a share p of all of it."""
    if p >= 1:
        return order, True
    masses = np.exp(scaled[order])
    masses[masses < 1e-12] = 0  # too little for a unit of the engine's
    before = np.concatenate(([0], np.cumsum(masses)[:-1]))
    goal = p * masses.sum()
    count = max(1, int((before < goal).sum()))
    doubt = np.abs(before - goal)[1:] / max(goal, 1e-300)
    exact = bool(np.all((masses == 1) | (masses == 0)))  # equal masses add up without rounding
    is_clear = exact or not bool((doubt < 1e-5).any()) or goal == 0
    return order[:count], is_clear
