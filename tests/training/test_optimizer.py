import math

import pytest
import torch

from model.gpt import GPT
from training.config import TrainingConfig
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


def test_matrices_decay_and_vectors_do_not() -> None:
    config = TrainingConfig(n_layer=1, n_head=2, n_embd=8, n_ctx=8, weight_decay=0.5)
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
