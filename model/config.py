"""The shape of a GPT: numbers and names, no torch, so that any process can read it at once."""

from dataclasses import dataclass
from typing import Literal, get_args

Activation = Literal["gelu_new", "gelu", "relu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTConfig:
    """The architecture of one model, after GPT-2 (Radford et al., 2019).

    The defaults are GPT-2 124M. Raises ValueError, naming field, value and remedy.
    """

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_ctx: int = 1024  # longest sequence in tokens; nanoGPT calls it block_size
    vocab_size: int = 50257  # rows of wte; may exceed the tokenizer's, the rest is padding
    n_inner: int | None = None  # width of the MLP; None means 4 * n_embd
    activation: Activation = "gelu_new"  # gelu_new: tanh (OpenAI); gelu: exact (nanoGPT)
    layer_norm_epsilon: float = 1e-5
    scale_attn_by_inverse_layer_idx: bool = False  # divide layer i's scores by i + 1 as well
    bias: bool = True  # biases in every Linear and LayerNorm
    dropout: float = 0.0  # training only: embeddings, attention weights, residual branches

    def __post_init__(self) -> None:
        for field in ("n_layer", "n_head", "n_embd", "n_ctx", "vocab_size"):
            value = getattr(self, field)
            if value < 1:
                raise ValueError(f"{field} must be at least 1, got {value}")
        if self.n_inner is not None and self.n_inner < 1:
            raise ValueError(
                f"n_inner must be at least 1, or absent for 4 * n_embd, got {self.n_inner}"
            )
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd must be a multiple of n_head, got n_embd={self.n_embd} "
                f"and n_head={self.n_head}"
            )
        if self.activation not in get_args(Activation):
            raise ValueError(
                f"activation must be one of {', '.join(get_args(Activation))}, "
                f"got {self.activation!r}"
            )
        if not self.layer_norm_epsilon > 0:
            raise ValueError(f"layer_norm_epsilon must be positive, got {self.layer_norm_epsilon}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {self.dropout}")

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        """Width of the hidden layer of every MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, the tied output head counted once."""
        width, inner, bias = self.n_embd, self.mlp_width, int(self.bias)
        norm = width * (1 + bias)
        attention = 4 * width * width + 4 * width * bias
        mlp = 2 * width * inner + (inner + width) * bias
        embeddings = (self.vocab_size + self.n_ctx) * width
        return embeddings + self.n_layer * (2 * norm + attention + mlp) + norm

    def attention_scale(self, layer: int) -> float:
        """The factor on layer `layer`'s scores q k^T before the softmax."""
        scale: float = self.head_size**-0.5
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale
