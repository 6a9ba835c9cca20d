"""What a model loses on windows of tokens, and on a whole split; takes no step."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import Attend, CausalAttention
from model.gpt import GPT
from training.data import TokenSplit


def next_token_loss(
    model: GPT, tokens: Tensor, attend: Attend, vocab_size: int, num_context: int = 0
) -> Tensor:
    """Sum of -log p(token | tokens before it), in nats, over windows.

    Args:
        model: training or not, as the caller has it.
        tokens: (B, T + 1).
        attend: how they see each other.
        vocab_size: ids from here on are padding and take no part.
        num_context: the first so many predictions of each window do not count.

    Returns:
        A float32 scalar.
    """
    positions = torch.arange(tokens.shape[1] - 1, device=tokens.device)
    hidden = model(tokens[:, :-1], positions, attend)[:, num_context:]  # (B, T, C)
    weight = model.wte.weight
    if vocab_size < len(weight):
        weight = weight[:vocab_size]
    # Under autocast the product is bfloat16 here, unlike in GPT.logits: it is half of a small
    # model's work, and training averages over the rounding that one greedy choice would not.
    logits = F.linear(hidden, weight).float()  # (B, T, V)
    targets = tokens[:, 1 + num_context :]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def evaluate(
    model: GPT,
    split: TokenSplit,
    *,
    batch: int,
    vocab_size: int,
    autocast: Callable[[], torch.autocast],
    is_stopped: Callable[[], bool] = lambda: False,
) -> tuple[float, float] | None:
    """Score a whole split, each token but the first once.

    Windows follow each other without overlap, as in `model/score.py`: the last, if short, is
    filled up with context from the left. The caller puts the model in evaluation mode.

    Returns:
        Loss in nats a token and bits a byte of the split's text, or None if stopped on the way.
    """
    n_ctx, device = model.config.n_ctx, model.wte.weight.device
    attend = CausalAttention(model.config)
    num_scored = len(split) - 1
    rest = num_scored % n_ctx
    starts = list(range(0, num_scored - rest, n_ctx))
    # (windows, tokens of each, context of each that another window scores)
    parts = [(starts[i : i + batch], n_ctx + 1, 0) for i in range(0, len(starts), batch)]
    if rest:
        length = min(n_ctx, num_scored)
        parts.append(([num_scored - length], length + 1, length - rest))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for windows, length, num_context in parts:
        if is_stopped():
            return None
        with torch.inference_mode(), autocast():
            tokens = read_windows(split, windows, length, device)
            total += next_token_loss(model, tokens, attend, vocab_size, num_context)
    nats = float(total)
    return nats / num_scored, nats / math.log(2) / split.num_bytes


def read_windows(split: TokenSplit, starts: list[int], length: int, device: torch.device) -> Tensor:
    """Windows of a split on the device, (B, length)."""
    tokens = torch.stack([torch.from_numpy(split.read(start, length)) for start in starts])
    if device.type == "cuda":
        return tokens.pin_memory().to(device, non_blocking=True)
    return tokens
