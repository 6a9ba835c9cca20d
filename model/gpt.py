"""The network: GPT-2 as nanoGPT writes it, for training and serving alike.

The bodies act on the last dimension, so (B, T) and flat (N,) tokens both pass; what the tokens
are to each other is the business of `attend`. No caches, batches, losses or files here.

Radford et al., 2019, "Language Models are Unsupervised Multitask Learners"; Karpathy's nanoGPT.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Attend
from model.config import Activation, GPTConfig

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


class CausalSelfAttention(nn.Module):
    """Multi-head attention that asks `attend` instead of attending."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Map x (..., C) to (..., C)."""
        q, k, v = (t.unflatten(-1, (self.n_head, -1)) for t in self.c_attn(x).chunk(3, dim=-1))
        y: Tensor = self.c_proj(attend(self.layer, q, k, v).flatten(-2))
        return y


class MLP(nn.Module):
    """Two linear layers with the model's activation between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_width, bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_width, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., C) to (..., C)."""
        y: Tensor = self.c_proj(self.activation(self.c_fc(x)))
        return y


class Block(nn.Module):
    """One layer: attention and MLP, each behind a LayerNorm and added to its input."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Map x (..., C) to (..., C)."""
        x = x + self.dropout(self.attn(self.ln_1(x), attend))
        y: Tensor = x + self.dropout(self.mlp(self.ln_2(x)))
        return y


def _embedding(num_rows: int, width: int) -> nn.Embedding:
    """An embedding left as memory holds it, for `_initialize` or a checkpoint to fill.

    The constructor would draw normal numbers, and on the meta device that imports torch._dynamo:
    a second of every start, for nothing.
    """
    rows = torch.empty(num_rows, width)
    embedding: nn.Embedding = nn.Embedding.from_pretrained(rows, freeze=False)  # type: ignore[no-untyped-call]
    return embedding


class GPT(nn.Module):
    """The model; its parameter names are the checkpoint's, so a key is an attribute path.

    A new GPT holds GPT-2's initialisation: normal with deviation 0.02, and residual projections
    smaller by sqrt(2 * n_layer), so that the residual stream starts at unit scale.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = _embedding(config.vocab_size, config.n_embd)
        self.wpe = _embedding(config.n_ctx, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)
        if self.wte.weight.device.type != "meta":
            self._initialize()

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run the network up to its last LayerNorm.

        Args:
            tokens: ids, (B, T) or (N,).
            positions: place of each token in its own sequence, broadcastable to `tokens`.
            attend: how the tokens see each other.

        Returns:
            Hidden states, (B, T, C) or (N, C).
        """
        return self.run_layers(self.embed(tokens, positions), attend)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Look up tokens and positions: the layers' input, (B, T, C) or (N, C)."""
        x: Tensor = self.dropout(self.wte(tokens) + self.wpe(positions))
        return x

    def run_layers(self, x: Tensor, attend: Attend) -> Tensor:
        """Take embedded tokens (..., C) through the layers and the last LayerNorm."""
        for block in self.h:
            x = block(x, attend)
        hidden: Tensor = self.ln_f(x)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Project hidden states (..., C) on the vocabulary by the tied embedding: (..., V) float32.

        Real GPT-2 logits lie around -100, where neighbouring bfloat16 values are 0.5 apart: a
        rounded product would decide greedy decoding by ties.
        """
        return F.linear(hidden.float(), self.wte.weight.float())

    @torch.no_grad()
    def _initialize(self) -> None:
        residual_deviation = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                is_residual = name.endswith("c_proj.weight")
                parameter.normal_(std=residual_deviation if is_residual else 0.02)
            elif name.endswith("bias"):
                parameter.zero_()
