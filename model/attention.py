"""The question a layer asks, and its answer for whole sequences; knows nothing of caches."""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from model.config import GPTConfig


class Attend(Protocol):
    """Attention as a layer sees it: queries, keys and values in, their mixture out.

    The caller of `GPT.forward` knows what the tokens are to each other (one sequence, a batch,
    rows of a paged cache); the layer does not.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend in layer `layer`: q, k, v (..., H, D) -> (..., H, D)."""
        ...


class CausalAttention:
    """Attention over whole sequences, each position seeing itself and all before it.

    For training, scoring and the cache-free oracle. Stores nothing. `dropout` acts on the
    attention weights; pass it while training only.
    """

    def __init__(self, config: GPTConfig, *, dropout: float = 0.0) -> None:
        self._scales = [config.attention_scale(layer) for layer in range(config.n_layer)]
        self._dropout = dropout

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, T, H, D) or (T, H, D) -> the same shape."""
        q, k, v = (t.transpose(-3, -2) for t in (q, k, v))  # (..., H, T, D)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self._dropout, scale=self._scales[layer]
        )
        return y.transpose(-3, -2)
