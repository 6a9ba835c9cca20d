"""How weights follow gradients: AdamW or Muon, and the schedule of the learning rate."""

import math

import torch

from model.gpt import GPT
from training.config import TrainingConfig


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for some parameters and AdamW for the others, seen from outside as one optimizer.

    Whoever sets the learning rate of every group or saves the state of every parameter reaches
    both.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        """Join two optimizers that have no parameter in common and no state yet."""
        self._muon = muon
        self._adamw = adamw
        # Shared, not copied: torch keeps the dictionaries it is handed as groups, and states are
        # kept by parameter.
        super().__init__([*muon.param_groups, *adamw.param_groups], defaults={})
        muon.state = adamw.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no use for a closure
        """Move every parameter that has a gradient."""
        assert closure is None, "gradients are there before a step"
        self._muon.step()  # type: ignore[no-untyped-call]
        self._adamw.step()


def make_optimizer(model: GPT, config: TrainingConfig) -> torch.optim.Optimizer:
    """The config's optimizer over the model's parameters.

    Matrices and embeddings decay, vectors do not. Muon takes the matrices of the blocks, each
    update scaled to the size that AdamW's usually have (Liu et al., 2025, arXiv:2502.16982), so
    that one learning rate and one decay serve both. Embeddings and vectors stay with AdamW, as
    Muon's author has it (Jordan, 2024).
    """
    has_muon = config.optimizer == "muon"
    hidden = [p for p in model.h.parameters() if p.dim() >= 2] if has_muon else []
    hidden_ids = {id(p) for p in hidden}
    matrices = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in hidden_ids]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # fused: one pass over the parameters instead of a dozen, on CPUs as well.
    adamw = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True
    )
    if not has_muon:
        return adamw
    return MuonWithAdamW(
        torch.optim.Muon(
            hidden,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        adamw,
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
