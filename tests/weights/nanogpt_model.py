"""nanoGPT's network once more, written from its formulas, as the oracle of the converter's tests.

Attention is spelled out with a mask and the layers keep nanoGPT's names; nothing of ours is used.
"""

import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Norm(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.weight
        return y if self.bias is None else y + self.bias


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, context: int, bias: bool, mask: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.num_heads = num_heads
        if mask:  # nanoGPT on a torch without flash attention saves its masks
            self.register_buffer("bias", torch.ones(context, context).tril()[None, None])

    def forward(self, x: Tensor) -> Tensor:
        length, width = x.shape
        heads = self.c_attn(x).view(length, 3, self.num_heads, -1).permute(1, 2, 0, 3)
        q, k, v = heads  # (H, T, D) each
        scores = q @ k.mT / math.sqrt(width // self.num_heads)
        visible = torch.ones(length, length).tril().bool()
        y = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v
        mixed: Tensor = self.c_proj(y.transpose(0, 1).reshape(length, width))
        return mixed


class Mlp(nn.Module):
    def __init__(self, width: int, bias: bool, tanh: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.c_proj = nn.Linear(4 * width, width, bias=bias)
        self.tanh = tanh

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        if self.tanh:
            x = x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        else:
            x = x / 2 * (1 + torch.erf(x / math.sqrt(2)))
        y: Tensor = self.c_proj(x)
        return y


class Layer(nn.Module):
    def __init__(
        self, width: int, num_heads: int, context: int, bias: bool, mask: bool, tanh: bool
    ) -> None:
        super().__init__()
        self.ln_1 = Norm(width, bias)
        self.attn = Attention(width, num_heads, context, bias, mask)
        self.ln_2 = Norm(width, bias)
        self.mlp = Mlp(width, bias, tanh)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        y: Tensor = x + self.mlp(self.ln_2(x))
        return y


class NanoGPT(nn.Module):
    """One sequence of token ids (T,) -> logits (T, V), weights far from their initial values."""

    def __init__(
        self,
        *,
        vocab_size: int,
        block_size: int = 16,
        n_layer: int = 2,
        n_head: int = 2,
        n_embd: int = 8,
        bias: bool = True,
        mask: bool = False,
        tanh: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model_args: dict[str, Any] = {
            "n_layer": n_layer,
            "n_head": n_head,
            "n_embd": n_embd,
            "block_size": block_size,
            "bias": bias,
            "vocab_size": vocab_size,
            "dropout": 0.0,
        }
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(
                    Layer(n_embd, n_head, block_size, bias, mask, tanh) for _ in range(n_layer)
                ),
                "ln_f": Norm(n_embd, bias),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight  # type: ignore[assignment]
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                scales = ".ln_" in name and name.endswith("weight")
                parameter.copy_(1 + noise / 4 if scales else noise / 2)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](torch.arange(len(tokens)))
        for layer in self.transformer["h"]:  # type: ignore[attr-defined]
            x = layer(x)
        logits: Tensor = self.lm_head(self.transformer["ln_f"](x))
        return logits


def nanogpt_checkpoint(
    model: NanoGPT, *, prefix: str = "", dataset: str = "shakespeare_char"
) -> dict[str, Any]:
    """What nanoGPT's train.py hands to torch.save, an optimizer with a step behind it included."""
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {
        "model": {prefix + name: tensor for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": dict(model.model_args),
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.4697),
        "config": {"dataset": dataset, "out_dir": "out", "learning_rate": 1e-3, "compile": True},
    }


def write_meta(path: Path, characters: str, protocol: int = pickle.DEFAULT_PROTOCOL) -> None:
    """Write a meta.pkl as nanoGPT's prepare.py does."""
    meta = {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: i for i, character in enumerate(characters)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(meta, protocol))
