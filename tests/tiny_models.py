"""GPTs small enough for a test, with weights that make every part of them matter."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import GPTConfig
from model.gpt import GPT
from model.tokenizer import Tokenizer
from tests.byte_pairs import byte_pair_tokenizer
from weights.checkpoint import save

OUTLIER_CHANNELS = [3, 7, 11]
OFFSET_CHANNEL = 5


def tiny_config(**changes: Any) -> GPTConfig:
    """Two layers, 16 wide, a context of 16 tokens, room for the ids of `byte_pair_tokenizer`."""
    shape: dict[str, Any] = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "n_ctx": 16,
        "vocab_size": 280,
        **changes,
    }
    return GPTConfig(**shape)


def tiny_gpt(config: GPTConfig | None = None, *, seed: int = 0) -> GPT:
    """A model in evaluation mode whose logits spread over some units.

    A fresh GPT would not do: its biases are zero, its LayerNorms neutral and its logits so close
    to each other that most bugs hide.
    """
    model = GPT(config or tiny_config())
    randomize(model, seed=seed)
    return model.eval()


@torch.no_grad()
def randomize(model: torch.nn.Module, *, seed: int) -> None:
    """Give every parameter of a GPT, ours or transformers', values that show in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            parameter.copy_((0.5 if "wte" in name or "wpe" in name else 0.2) * values)
        elif name.endswith("weight"):  # of a LayerNorm
            parameter.copy_(1 + 0.3 * values)
        else:
            parameter.copy_(0.3 * values)


@torch.no_grad()
def gpt_with_outliers(config: GPTConfig | None = None, *, seed: int = 0) -> GPT:
    """A model with what GPT-2 has and random weights have not.

    Logits around -100, by a channel that all embeddings share, and LayerNorms that amplify three
    channels 50 times, with small weights behind them, so that the others still count.
    """
    model = tiny_gpt(config, seed=seed)
    model.wte.weight[:, OFFSET_CHANNEL] = 1.0
    for block in model.h:
        for norm, linear in ((block.ln_1, block.attn.c_attn), (block.ln_2, block.mlp.c_fc)):  # type: ignore[union-attr]
            norm.weight[OUTLIER_CHANNELS] *= 50  # type: ignore[union-attr, operator, index]
            linear.weight[:, OUTLIER_CHANNELS] /= 25  # type: ignore[union-attr, operator, index]
    model.ln_f.weight[OUTLIER_CHANNELS] *= 50
    model.ln_f.bias[OFFSET_CHANNEL] = -100.0
    model.wte.weight[:, OUTLIER_CHANNELS] /= 25
    return model


def random_tokens(config: GPTConfig, *shape: int, seed: int = 0) -> Tensor:
    """Ids of the model's vocabulary, at random."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, shape, generator=generator)


def tiny_checkpoint(
    directory: Path, *, model: GPT | None = None, tokenizer: Tokenizer | None = None
) -> Path:
    """A new checkpoint directory; by default `tiny_gpt` with `byte_pair_tokenizer`."""
    save(model or tiny_gpt(), directory, tokenizer=tokenizer or byte_pair_tokenizer())
    return directory
