"""The GPU's draw against the definition: on a GPU, or else in Triton's interpreter."""

import pytest
import torch

from engine import draw as definition
from engine.random_stream import NoiseKeys

pytest.importorskip("triton", reason="triton comes with torch on CUDA and with the test extra")

from engine.draw_triton import draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_keys(num_rows: int, *, seed: int) -> NoiseKeys:
    generator = torch.Generator().manual_seed(seed)
    # Any 64 bits for a seed; choices and positions as large as they may be.
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=generator)
    choices = torch.randint(2**32, (num_rows,), generator=generator)
    positions = torch.randint(2**32, (num_rows,), generator=generator)
    return NoiseKeys(seeds.to(DEVICE), choices.to(DEVICE), positions.to(DEVICE))


@pytest.mark.parametrize("vocab_size", [1, 50, 1024, 3001])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_a_draw_is_the_one_of_the_definition(vocab_size: int, spread: float) -> None:
    torch.manual_seed(vocab_size)
    # Where all are equal, the noise alone decides.
    logits = (torch.randn(40, vocab_size) * spread - 100).to(DEVICE)
    temperature = torch.rand(40, dtype=torch.float64).to(DEVICE) * 2 + 1e-3
    keys = random_keys(40, seed=vocab_size)

    assert torch.equal(draw(logits, temperature, keys), definition.draw(logits, temperature, keys))


def test_banned_tokens_and_the_padding_of_a_row_are_never_drawn() -> None:
    logits = torch.full((30, 1100), -torch.inf, device=DEVICE)
    logits[:, 1050] = 3.0
    temperature = torch.ones(30, dtype=torch.float64, device=DEVICE)

    assert (draw(logits, temperature, random_keys(30, seed=1)) == 1050).all()


def test_rows_of_a_wider_table_are_drawn_from_alone() -> None:
    torch.manual_seed(0)
    table = torch.randn(5, 90).to(DEVICE)
    temperature = torch.ones(5, dtype=torch.float64, device=DEVICE)
    keys = random_keys(5, seed=2)

    found = draw(table[:, :80], temperature, keys)

    assert torch.equal(found, definition.draw(table[:, :80].contiguous(), temperature, keys))
