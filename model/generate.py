"""Decoding without a cache: slow, obvious, the oracle of everything faster."""

import math
from collections.abc import Callable, Container, Iterator, Sequence

import torch
from torch import Tensor

from model.attention import CausalAttention
from model.gpt import GPT

Choose = Callable[[Tensor], int]


def greedy(logits: Tensor) -> int:
    """Choose the most probable token of logits (V,); the lowest id among equals."""
    return int(logits.argmax())


def sample(temperature: float, *, seed: int, top_k: int = 0) -> Choose:
    """Make a choice at random, from the `top_k` most probable tokens if that is not 0.

    A temperature of 0 is greedy. Raises ValueError for one that is negative or not a number; the
    choice raises FloatingPointError for logits that are not finite, as a diverged model has them.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if temperature == 0:
        return greedy
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> int:
        values, ids = logits.topk(min(top_k or len(logits), len(logits)))
        if not math.isfinite(values[0]):  # the largest; not a number counts as larger than all
            raise FloatingPointError("The logits are not finite.")
        # From the maximum down and in float64: a tiny temperature must not make inf - inf.
        scaled = (values - values[0]).cpu().double() / temperature
        probabilities = torch.softmax(scaled, dim=-1)
        return int(ids[torch.multinomial(probabilities, 1, generator=generator)])

    return choose


def generate(
    model: GPT,
    tokens: Sequence[int],
    num_tokens: int,
    *,
    choose: Choose = greedy,
    vocab_size: int | None = None,
    stop_token_ids: Container[int] = (),
) -> Iterator[int]:
    """Continue `tokens`, one id at a time, running the whole sequence through the model for each.

    Ends after `num_tokens`, after an id of `stop_token_ids`, or when the context is full; it is
    never shifted. Ids from `vocab_size` on are padding and never chosen. The caller puts the model
    in evaluation mode. Raises ValueError for an empty prompt or one beyond the context.
    """
    config = model.config
    if not 0 < len(tokens) <= config.n_ctx:
        raise ValueError(
            f"The prompt has {len(tokens)} tokens; this model takes 1 to {config.n_ctx}."
        )
    attend = CausalAttention(config)
    device = model.wte.weight.device
    sequence = list(tokens)
    for _ in range(min(num_tokens, config.n_ctx - len(tokens))):
        with torch.inference_mode():  # entered anew each time: a generator must not leak it
            x = torch.tensor(sequence, device=device)  # (T,)
            hidden = model(x, torch.arange(len(sequence), device=device), attend)
            token_id = choose(model.logits(hidden[-1])[:vocab_size])
        sequence.append(token_id)
        yield token_id
        if token_id in stop_token_ids:
            return
