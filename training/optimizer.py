"""How weights follow gradients: AdamW and the schedule of its learning rate."""

import math

import torch

from model.gpt import GPT
from training.config import TrainingConfig


def make_optimizer(model: GPT, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the model's parameters; matrices and embeddings decay, vectors do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # fused: one pass over the parameters instead of a dozen, on CPUs as well.
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True
    )


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """The learning rate of step `step`, counted from 0.

    Linear up to `learning_rate` over warmup_steps, then half a cosine wave down to
    `min_learning_rate` at max_steps.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    span = max(1, config.max_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    height = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_learning_rate + height * (config.learning_rate - config.min_learning_rate)
