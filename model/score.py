"""How well a model predicts a text: the sum of log-probabilities, over any length of text."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model.attention import CausalAttention
from model.gpt import GPT
from model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a model made of a text, in the units that people compare."""

    log_likelihood: float  # the sum over the scored tokens, in nats
    num_scored: int
    num_bytes: int  # of the scored tokens

    @property
    def loss(self) -> float:
        """Nats a token."""
        return -self.log_likelihood / self.num_scored

    @property
    def perplexity(self) -> float:
        """The choice, among so many equal ones, that each token was to the model."""
        return math.exp(min(self.loss, 700))  # a float ends a little beyond

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, as the text's bytes are the same to all."""
        return -self.log_likelihood / math.log(2) / self.num_bytes


def score(
    model: GPT,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    *,
    bos_token_id: int | None,
    advance: Callable[[int], None] = lambda num_tokens: None,
) -> Score:
    """Score a text that `tokenizer` encoded. Like `log_likelihood`, which computes the sum."""
    total, num_scored = log_likelihood(
        model,
        tokens,
        bos_token_id=bos_token_id,
        vocab_size=tokenizer.vocab_size,
        advance=advance,
    )
    # Without a bos the first token is only context.
    scored = tokens[len(tokens) - num_scored :]
    return Score(
        log_likelihood=total,
        num_scored=num_scored,
        num_bytes=sum(len(tokenizer.token_bytes(token_id)) for token_id in scored),
    )


def log_likelihood(
    model: GPT,
    tokens: Sequence[int],
    *,
    bos_token_id: int | None,
    vocab_size: int,
    advance: Callable[[int], None] = lambda num_tokens: None,
) -> tuple[float, int]:
    """Sum the log-probability of a text, in nats, and count the tokens scored.

    Windows of n_ctx tokens follow each other without overlap; each sees the last token before it,
    the first sees `bos_token_id`, and the last, if short, is filled up with context from the left:
    the rolling log-likelihood of EleutherAI's lm-evaluation-harness. Without a bos the first token
    cannot be scored. Ids from `vocab_size` on are padding and take no part in the normalisation.

    `advance` hears how many tokens each window scored. Raises ValueError for fewer than one token
    to score.
    """
    config = model.config
    stream = [*([] if bos_token_id is None else [bos_token_id]), *tokens]
    if len(stream) < 2:
        raise ValueError("The text is too short: there is no token to score.")
    attend = CausalAttention(config)
    device = model.wte.weight.device
    total, num_scored = 0.0, len(stream) - 1
    for start in range(0, num_scored, config.n_ctx):
        end = min(start + config.n_ctx, num_scored)
        first = max(0, end - config.n_ctx)  # earlier than start only in the last window
        window = torch.tensor(stream[first : end + 1], device=device)
        with torch.inference_mode():
            positions = torch.arange(end - first, device=device)
            hidden = model(window[:-1], positions, attend)[start - first :]  # (N, C)
            logits = model.logits(hidden)[:, :vocab_size]
            total -= float(F.cross_entropy(logits, window[start - first + 1 :], reduction="sum"))
        advance(end - start)
    return total, num_scored
