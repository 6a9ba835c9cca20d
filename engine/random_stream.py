"""Randomness as a function: the noise of a token from (seed, choice, position, token id) alone.

It knows nothing of logits or requests, and it keeps no state: whatever was drawn before, beside
or on another device, a key always has the same noise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_NOISE = -2.812  # just below the noise of k = 0: no token has less
MAX_NOISE = 16.636  # just above the noise of k = 2^23 - 1: no token has more
GROUP = 16  # token ids whose top bytes come of one counter
LOUD = 255  # the highest top byte: noise with it exceeds any noise without it
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Philox's
WEYL = (0x9E3779B9, 0xBB67AE85)  # what its key words grow by, a round

_MASK = 0xFFFFFFFF


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3").

    Words are int64 in [0, 2^32), the counter's of one shape, the key's of one that broadcasts to
    it. A product of two words may pass 2^63, where int64 wraps: its 64 bits are right all the
    same, and the mask takes back what the arithmetic shift drags in. So the integers are the same
    on every device.
    """
    c0, c1, c2, c3 = counter
    for k0, k1 in zip(_round_keys(key[0], WEYL[0]), _round_keys(key[1], WEYL[1]), strict=True):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        # c1 and c3 keep the high half of their product: it is masked off with the rest.
        c0 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3 = p1, p0
    return c0, c1 & _MASK, c2, c3 & _MASK


def _round_keys(word: Tensor, step: int) -> Tensor:
    """Compute a key word of each of the 10 rounds: (10, *word.shape)."""
    steps = torch.arange(10, device=word.device) * step
    return (word + steps.view(-1, *[1] * word.dim())) & _MASK


def gumbel(k: Tensor) -> Tensor:
    """Turn integers k in [0, 2^23) into Gumbel noise, -log(-log u) at u = (k + 0.5) 2^-23; float32.

    u is never 0 or 1, so the noise is finite. The logarithms are float64, the noise is rounded to
    float32: any float64 logarithm within four units in the last place gives the same noise for
    all k but one (k = 3085996, whose noise is nearly 0), and it grows strictly with k. A float32
    logarithm would promise neither, for it differs between devices.
    """
    u = (k.double() + 0.5) * 2.0**-23
    return u.log_().neg_().log_().neg_().float()


@dataclass(frozen=True, slots=True)
class NoiseKeys:
    """What the noise of a row depends on besides the token id.

    The 23 bits k of a token are a top byte and 15 low bits, both from Philox under the seed:
    the byte is byte `id % 16` of the words at counter (id // 16, position, choice, 0), the low
    bits are the upper 15 of half-word `id % 8` of those at (id // 8, position, choice, 1). Ours:
    the bytes of a whole vocabulary are cheap, and tell which few tokens deserve the rest.
    """

    seed: Tensor  # (R,) int64, any value
    choice: Tensor  # (R,) int64 in [0, 2^32)
    position: Tensor  # (R,) int64 in [0, 2^32), of the token being drawn

    def all_noise(self, num_tokens: int) -> Tensor:
        """Compute the noise of the token ids below `num_tokens`: (R, num_tokens) float32."""
        groups = torch.arange(-(-num_tokens // GROUP), device=self.seed.device)[None]
        top = self._words(groups, torch.zeros_like(groups)).view(torch.uint8).flatten(-2)
        halves = torch.arange(2 * groups.shape[1], device=self.seed.device)[None]
        low = self._words(halves, torch.ones_like(halves)).view(torch.int16).flatten(-2)
        return gumbel(_join(top, low)[:, :num_tokens])

    def _words(self, index: Tensor, part: Tensor) -> Tensor:
        """Compute the words at a counter (1, G): (R, G, 4), as int32 with the same 32 bits."""
        # Computed as (G, R), where keys repeat along the outer dimension: twice as fast on a CPU.
        shape = (index.shape[1], len(self.seed))
        counter = (index.T, self.position, self.choice, part.T)
        c0, c1, c2, c3 = (word.expand(shape) for word in counter)
        words = philox((c0, c1, c2, c3), (self.seed & _MASK, (self.seed >> 32) & _MASK))
        # Whatever runs torch keeps the low byte of a word first, GPUs too: viewing the words as
        # bytes or half-words costs nothing and depends on no device.
        packed = torch.empty(*reversed(shape), 4, dtype=torch.int32, device=index.device)
        for i, word in enumerate(words):
            packed[..., i] = word.T
        return packed


def _join(top: Tensor, low: Tensor) -> Tensor:
    """Put top bytes (uint8) and low half-words (int16) of tokens together to k in [0, 2^23)."""
    return (top.long() << 15) | ((low.long() & 0xFFFF) >> 1)
