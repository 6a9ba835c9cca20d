"""The GPU's draw against the definition: on a GPU, or else in Triton's interpreter."""

import dataclasses
import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from engine import draw as definition
from engine.draw import Filters, mass
from engine.random_stream import NoiseKeys
from engine.sampling_params import COLDEST

pytest.importorskip("triton", reason="triton comes with torch on CUDA and with the test extra")

from engine.draw_triton import draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Numpy's, of the interpreter: a GPU says nothing where numbers are too large or none.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{warning}:RuntimeWarning")
    for warning in ("overflow encountered", "invalid value encountered", "All-NaN slice")
]


def random_keys(num_rows: int, *, seed: int) -> NoiseKeys:
    generator = torch.Generator().manual_seed(seed)
    # Any 64 bits for a seed; choices and positions as large as they may be.
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=generator)
    choices = torch.randint(2**32, (num_rows,), generator=generator)
    positions = torch.randint(2**32, (num_rows,), generator=generator)
    return NoiseKeys(seeds.to(DEVICE), choices.to(DEVICE), positions.to(DEVICE))


# Shapes of logits: name, and how rows are made of standard normal numbers.
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "smooth": lambda x: 3 * x - 100,
    "flat": lambda x: 0.1 * x - 100,
    "ties": lambda x: x.round(),  # zeros of both signs, most of all
    "peaked": lambda x: 8 * x,
    "holes": lambda x: torch.where(x > 1, x, -math.inf).index_fill(-1, torch.tensor(0), 0.0),
    "enormous": lambda x: 1e38 * x.clamp(-3, 3),
}


def make_logits(shape: str, num_rows: int, vocab_size: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return SHAPES[shape](torch.randn(num_rows, vocab_size, generator=generator)).to(DEVICE)


def make_filters(
    top_k: list[int] | None = None,
    top_p: list[float] | None = None,
    min_p: list[float] | None = None,
    *,
    num_rows: int,
    vocab_size: int,
) -> Filters:
    """Filters of rows; one value is for all, and none turns a filter off."""

    def column(values: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor([*values] * (num_rows // len(values)), dtype=dtype).to(DEVICE)

    return Filters(
        column([min(k, vocab_size) for k in top_k or [vocab_size]], torch.int64),
        column(top_p or [1.0]),
        column(min_p or [0.0]),
        column([1.0]),
        has_typical_p=False,
    )


def mixed_filters(num_rows: int, vocab_size: int, *, seed: int) -> Filters:
    """Filters of every kind, alone and together, and now and then none."""
    chance = random.Random(seed)

    def some(choices: Sequence[float]) -> list[float]:
        return [chance.choice(choices) for _ in range(num_rows)]

    sizes = [1, 2, 5, 40, vocab_size // 2, vocab_size - 1, *[vocab_size] * 5]
    return make_filters(
        [max(1, int(k)) for k in some(sizes)],
        some([1e-9, 0.1, 0.5, 0.9, 0.999, 1 - 1e-12, 1.0, 1.0, 1.0]),
        some([0.0, 0.0, 0.0, 1e-6, 0.05, 0.5, 1.0]),
        num_rows=num_rows,
        vocab_size=vocab_size,
    )


def temperatures(*values: float, num_rows: int) -> Tensor:
    return torch.tensor([*values] * (num_rows // len(values)), dtype=torch.float64).to(DEVICE)


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


@pytest.mark.parametrize("vocab_size", [1, 50, 1024, 3001])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_filtered_draw_is_the_one_of_the_definition(vocab_size: int, shape: str) -> None:
    num_rows = 10
    logits = make_logits(shape, num_rows, vocab_size, seed=vocab_size)
    heat = temperatures(0.1, 0.7, 1.0, 2.0, COLDEST, num_rows=num_rows)
    keys = random_keys(num_rows, seed=vocab_size)
    filters = mixed_filters(num_rows, vocab_size, seed=vocab_size)

    found = draw(logits, heat, keys, filters)

    assert torch.equal(found, definition.draw(logits, heat, keys, filters))


@pytest.mark.parametrize("shape", ["smooth", "flat", "ties"])
@pytest.mark.parametrize("top_k", [1, 3, 40, 700])
def test_top_k_keeps_as_many_as_the_definition_does(shape: str, top_k: int) -> None:
    logits = make_logits(shape, 8, 1000, seed=top_k)
    heat, keys = temperatures(1.5, num_rows=8), random_keys(8, seed=top_k)
    # The total that top_p is a share of changes with every token that is kept or not.
    filters = make_filters([top_k], [1.0, 0.8], num_rows=8, vocab_size=1000)

    found = draw(logits, heat, keys, filters)

    assert torch.equal(found, definition.draw(logits, heat, keys, filters))


@pytest.mark.parametrize("top_k", [1, 5, 150, 1500])
def test_of_equals_top_k_keeps_the_lowest_ids(top_k: int) -> None:
    num_rows = 6
    logits = torch.zeros(num_rows, 2000, device=DEVICE)
    logits[:, ::3] = -0.0  # no other logit than 0.0
    logits[:, 1200] = 1.0
    heat, keys = temperatures(1.0, num_rows=num_rows), random_keys(num_rows, seed=top_k)
    filters = make_filters([top_k], num_rows=num_rows, vocab_size=2000)

    found = draw(logits, heat, keys, filters)

    assert torch.equal(found, definition.draw(logits, heat, keys, filters))
    assert bool(((found < top_k - 1) | (found == 1200)).all())


@pytest.mark.parametrize("shape", ["smooth", "flat", "ties"])
def test_top_p_is_decided_to_the_last_unit_of_mass(shape: str) -> None:
    num_rows, vocab_size = 8, 1500
    logits = make_logits(shape, num_rows, vocab_size, seed=4)
    # Far too little to be drawn, but not nothing.
    logits[:, 1300:] = logits.amax(-1, keepdim=True) - 22 * 0.8
    heat, keys = temperatures(0.8, num_rows=num_rows), random_keys(num_rows, seed=5)
    unfiltered = definition.draw(logits, heat, keys)
    # What comes before the winner, as a share of all: the least that top_p must not be.
    masses = mass(logits, logits.amax(-1), heat).double()
    best = logits.gather(1, unfiltered[:, None])
    has_lower_id = torch.arange(vocab_size, device=DEVICE) < unfiltered[:, None]
    before = (masses * ((logits > best) | ((logits == best) & has_lower_id))).sum(-1)
    filters = make_filters(num_rows=num_rows, vocab_size=vocab_size)

    for factor, is_kept in ((1 - 1e-12, False), (1 + 1e-12, True)):
        filters.top_p.copy_((before / masses.sum(-1) * factor).clamp(max=1 - 1e-12))
        found = draw(logits, heat, keys, filters)

        assert torch.equal(found, definition.draw(logits, heat, keys, filters))
        assert bool(((found == unfiltered) == is_kept)[before > 0].all())


@pytest.mark.parametrize("min_p", [0.5, 0.01])
def test_min_p_keeps_what_lies_on_its_floor(min_p: float) -> None:
    num_rows = 8
    # All but the first have this share of its probability, to the bit, or just less.
    logits = torch.full((num_rows, 600), math.log(min_p), device=DEVICE)
    logits[1::2, 1:] = torch.nextafter(logits[1, 1:], torch.tensor(-math.inf, device=DEVICE))
    logits[:, 0] = 0.0
    heat, keys = temperatures(1.0, num_rows=num_rows), random_keys(num_rows, seed=3)
    filters = make_filters(min_p=[min_p], num_rows=num_rows, vocab_size=600)

    found = draw(logits, heat, keys, filters)

    assert torch.equal(found, definition.draw(logits, heat, keys, filters))
    assert bool((found[::2] > 0).any())
    assert not found[1::2].any()


def test_a_row_alone_draws_what_it_draws_among_others() -> None:
    num_rows = 9
    logits = make_logits("smooth", num_rows, 1100, seed=1)
    heat, keys = temperatures(1.2, num_rows=num_rows), random_keys(num_rows, seed=1)
    filters = mixed_filters(num_rows, 1100, seed=2)
    together = draw(logits, heat, keys, filters)

    for row in range(num_rows):
        one = slice(row, row + 1)
        key = NoiseKeys(keys.seed[one], keys.choice[one], keys.position[one])
        own = Filters(
            filters.top_k[one], filters.top_p[one], filters.min_p[one], filters.typical_p[one],
            has_typical_p=False,
        )  # fmt: skip

        assert torch.equal(draw(logits[one], heat[one], key, own), together[one])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_without_a_finite_best_gets_some_id_and_leaves_the_others_alone(
    value: float,
) -> None:
    logits = make_logits("smooth", 3, 1100, seed=1)
    expected = logits.clone()
    logits[1, slice(None) if value == -math.inf else 500] = value
    heat, keys = temperatures(1.0, num_rows=3), random_keys(3, seed=1)
    filters = make_filters([40], [0.9], [0.01], num_rows=3, vocab_size=1100)

    found = draw(logits, heat, keys, filters)

    assert 0 <= int(found[1]) < 1100
    assert torch.equal(found[::2], definition.draw(expected, heat, keys, filters)[::2])


def test_rows_that_pad_a_batch_end() -> None:
    logits = make_logits("smooth", 2, 300, seed=1)
    keys = NoiseKeys(*torch.zeros(3, 2, dtype=torch.int64, device=DEVICE).unbind())
    filters = make_filters([0], [0.0, 1.0], [0.0], num_rows=2, vocab_size=300)

    found = draw(logits, temperatures(COLDEST, num_rows=2), keys, filters)

    assert torch.equal(found, logits.argmax(-1))


def test_rows_of_a_wider_table_are_filtered_alone() -> None:
    table = make_logits("smooth", 5, 90, seed=2)
    heat, keys = temperatures(1.0, num_rows=5), random_keys(5, seed=2)
    filters = make_filters([30], [0.7], num_rows=5, vocab_size=80)

    found = draw(table[:, :80], heat, keys, filters)

    assert torch.equal(found, definition.draw(table[:, :80].contiguous(), heat, keys, filters))


def test_typical_p_is_left_to_the_definition() -> None:
    logits = make_logits("smooth", 20, 200, seed=2)
    heat, keys = temperatures(1.0, num_rows=20), random_keys(20, seed=2)
    others = make_filters(num_rows=20, vocab_size=200)
    filters = dataclasses.replace(
        others, typical_p=torch.full_like(others.typical_p, 0.3), has_typical_p=True
    )

    found = draw(logits, heat, keys, filters)

    assert torch.equal(found, definition.draw(logits, heat, keys, filters))
    assert not torch.equal(found, draw(logits, heat, keys))
