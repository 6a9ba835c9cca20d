import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.gpt import GPT
from tests.training.tiny import begin
from training.config import Optimizer, TrainingConfig
from training.optimizer import learning_rate_at, make_optimizer

CONFIG = TrainingConfig(learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=10, max_steps=110)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1e-4),
        (4, 5e-4),
        (9, 1e-3),
        (10, 1e-3),
        (35, 1e-4 + 9e-4 * 0.5 * (1 + math.sqrt(0.5))),  # a quarter of the way: cos 45°
        (60, 5.5e-4),
        (110, 1e-4),
        (500, 1e-4),
    ],
)
def test_learning_rate_warms_up_and_follows_a_cosine(step: int, expected: float) -> None:
    assert learning_rate_at(step, CONFIG) == pytest.approx(expected, rel=1e-12)


def test_run_of_warmup_alone_has_a_learning_rate() -> None:
    config = TrainingConfig(warmup_steps=5, max_steps=5, learning_rate=1e-3)

    assert [learning_rate_at(step, config) for step in (4, 5)] == pytest.approx([1e-3, 1e-3])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_matrices_decay_and_vectors_do_not(optimizer: Optimizer) -> None:
    config = TrainingConfig(
        n_layer=1, n_head=2, n_embd=8, n_ctx=8, weight_decay=0.5, optimizer=optimizer
    )
    model = GPT(config.model_config(vocab_size=11))
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)

    make_optimizer(model, config).step()

    for name, parameter in model.named_parameters():
        expected = 1 - config.learning_rate * 0.5 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter.data, torch.full_like(parameter, expected), msg=name)


def test_steps_are_adamws_of_the_textbook() -> None:
    torch.manual_seed(0)
    config = TrainingConfig(
        n_layer=1, n_head=2, n_embd=8, n_ctx=8, weight_decay=0.1, beta1=0.8, beta2=0.95
    )
    model = GPT(config.model_config(vocab_size=11))
    optimizer = make_optimizer(model, config)
    weight = model.wte.weight
    x, m, v = weight.detach().double(), torch.zeros(11, 8).double(), torch.zeros(11, 8).double()

    for step in range(1, 4):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        assert weight.grad is not None
        g = weight.grad.double()
        x = x * (1 - 1e-3 * 0.1)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        x = x - 1e-3 * (m / (1 - 0.8**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        optimizer.step()

    # float32 against float64: a few units in the last place of numbers around 0.02.
    torch.testing.assert_close(weight.detach().double(), x, rtol=1e-5, atol=1e-7)


MATRICES_OF_A_BLOCK = {
    "h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_fc.weight",
    "h.0.mlp.c_proj.weight",
}  # fmt: skip


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    config = TrainingConfig(n_layer=1, n_head=2, n_embd=8, n_ctx=8, optimizer="muon")
    model = GPT(config.model_config(vocab_size=11))
    optimizer = make_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)

    optimizer.step()

    kept = {name: set(optimizer.state[p]) for name, p in model.named_parameters()}
    adamws = {"step", "exp_avg", "exp_avg_sq"}
    assert {name for name, keys in kept.items() if keys == {"momentum_buffer"}} == (
        MATRICES_OF_A_BLOCK
    )
    assert {name for name, keys in kept.items() if keys == adamws} == set(kept) - (
        MATRICES_OF_A_BLOCK
    )
    assert {"wte.weight", "wpe.weight", "h.0.mlp.c_fc.bias", "ln_f.weight"} <= set(kept)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Five quintic Newton-Schulz iterations in float64, as Jordan (2024) gives them."""
    x: Tensor = matrix / matrix.norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x


@pytest.mark.parametrize("name", sorted(MATRICES_OF_A_BLOCK))
def test_steps_are_muons_of_the_textbook(name: str) -> None:
    torch.manual_seed(0)
    config = TrainingConfig(
        n_layer=1, n_head=2, n_embd=16, n_ctx=8, optimizer="muon", weight_decay=0.5
    )
    model = GPT(config.model_config(vocab_size=11))
    optimizer = make_optimizer(model, config)
    weight = model.get_parameter(name)
    x, momentum = weight.detach().double(), torch.zeros_like(weight).double()
    moved = torch.zeros_like(x)

    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        assert weight.grad is not None
        g = weight.grad.double()
        momentum = 0.95 * momentum + 0.05 * g
        direction = orthogonalised(0.95 * momentum + 0.05 * g)
        scale = 0.2 * math.sqrt(max(weight.shape))  # AdamW's usual size
        x = x * (1 - 1e-3 * 0.5) - 1e-3 * scale * direction
        moved -= 1e-3 * scale * direction
        optimizer.step()

    # torch iterates in bfloat16, eight bits: a few hundredths of the way gone, in all directions.
    distance = (weight.detach().double() - x).norm() / moved.norm()
    assert distance < 0.03


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_schedule_reaches_every_parameter(data: Path, tmp_path: Path, optimizer: str) -> None:
    """A first step with a tenth of the learning rate goes a tenth of the way."""
    steps = []
    for warmup_steps in (1, 10):
        trainer = begin(
            tmp_path / str(warmup_steps), data, optimizer=optimizer, max_steps=1,
            warmup_steps=warmup_steps, learning_rate=1e-2, min_learning_rate=0.0, weight_decay=0.0,
        )  # fmt: skip
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        steps.append({name: p - before[name] for name, p in trainer.model.named_parameters()})

    whole, tenth = steps
    for name, step in whole.items():
        # Adding 1e-3 to a weight of 1 in float32 rounds by 6e-8.
        torch.testing.assert_close(tenth[name], step / 10, rtol=1e-3, atol=2e-7, msg=name)
        assert step.abs().max() > 1e-3, name
