"""The two formulations of the draw against each other and against the definitions."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.draw import (
    CHUNK,
    Filters,
    chunk_peaks,
    draw,
    kept_tokens,
    lowest_argmax,
    mass,
    sum_of,
)
from engine.draw_gathered import draw_gathered
from engine.random_stream import NoiseKeys
from engine.sampling_params import SamplingParams
from tests.engine.plain_sampler import filter_tokens

SIZES = [1, 63, 64, 65, 95, 257, 2048]

# Shapes of logits: name, and how a row is made of standard normal numbers.
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "smooth": lambda x: 2 * x - 80,
    "flat": lambda x: 0.2 * x - 80,
    "equal": lambda x: 0 * x - 110,
    "ties": lambda x: (1.5 * x).round() - 110,
    "peaked": lambda x: 6 * x,
    "gaps": lambda x: 1e4 * x.round(),
    "holes": lambda x: torch.where(x > 1, x, -math.inf).index_fill(-1, torch.tensor(0), 0.0),
    "enormous": lambda x: 1e38 * x.clamp(-3, 3),
}


def make_logits(shape: str, num_rows: int, vocab_size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return SHAPES[shape](torch.randn(num_rows, vocab_size, generator=generator))


def make_keys(num_rows: int, seed: int) -> NoiseKeys:
    positions = torch.arange(num_rows)
    return NoiseKeys(torch.full_like(positions, seed), torch.zeros_like(positions), positions)


def make_filters(
    num_rows: int,
    vocab_size: int,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
) -> Filters:
    def repeat(value: float) -> Tensor:
        return torch.full((num_rows,), value, dtype=torch.float64)

    top_k = min(top_k or vocab_size, vocab_size)
    return Filters(
        torch.full((num_rows,), top_k),
        repeat(top_p),
        repeat(min_p),
        repeat(typical_p),
        largest_top_k=top_k if top_k < vocab_size else 0,
        has_top_p=top_p < 1,
        has_typical_p=typical_p < 1,
    )


def pad(logits: Tensor) -> Tensor:
    width = -(-logits.shape[1] // CHUNK) * CHUNK
    padded = torch.full((len(logits), width), -math.inf)
    padded[:, : logits.shape[1]] = logits
    return padded


FILTERS = st.fixed_dictionaries(
    {
        "top_k": st.sampled_from([0, 0, 1, 2, 5, 40, 300]),
        "top_p": st.sampled_from([1.0, 1.0, 0.0, 1e-6, 0.1, 0.5, 0.9, 0.95, 0.999, 1 - 1e-12]),
        "min_p": st.sampled_from([0.0, 0.0, 1e-9, 0.02, 0.5, 1.0]),
        "typical_p": st.sampled_from([1.0, 1.0, 1.0, 0.0, 0.2, 0.9]),
    }
)
TEMPERATURES = st.sampled_from([1e-30, 1e-6, 0.1, 0.8, 1.0, 2.0])


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from(SIZES),
    TEMPERATURES,
    FILTERS,
    st.integers(0, 10**6),
)
def test_gathered_draw_equals_the_definition(
    shape: str, size: int, temperature: float, options: dict[str, Any], seed: int
) -> None:
    num_rows = 8
    logits = make_logits(shape, num_rows, size, seed)
    heat = torch.full((num_rows,), temperature, dtype=torch.float64)
    keys = make_keys(num_rows, seed)
    filters = make_filters(num_rows, size, **options)

    drawn = draw_gathered(pad(logits), heat, keys, filters)

    assert drawn.tolist() == draw(logits, heat, keys, filters).tolist()


@pytest.mark.parametrize("shape", ["smooth", "flat", "equal", "ties", "peaked"])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_gathered_draw_without_filters_equals_the_definition(
    shape: str, temperature: float
) -> None:
    # Many rows: what the gathered draw leaves out must not win even once in hundreds of draws.
    logits = make_logits(shape, 500, 1000, 5)
    heat = torch.full((500,), temperature, dtype=torch.float64)

    drawn = draw_gathered(pad(logits), heat, make_keys(500, 6))

    assert torch.equal(drawn, draw(logits, heat, make_keys(500, 6)))


@pytest.mark.parametrize("size", [8193, 50257])
@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_gathered_draw_equals_the_definition_over_large_vocabularies(
    size: int, top_p: float
) -> None:
    logits = torch.cat([make_logits(shape, 2, size, 1) for shape in ("smooth", "ties", "peaked")])
    heat = torch.full((6,), 0.8, dtype=torch.float64)
    filters = make_filters(6, size, top_p=top_p)

    drawn = draw_gathered(pad(logits), heat, make_keys(6, 2), filters)

    assert torch.equal(drawn, draw(logits, heat, make_keys(6, 2), filters))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["smooth", "flat", "equal", "ties", "peaked", "gaps"]),
    st.sampled_from([2, 5, 30, 95]),
    st.sampled_from([1e-6, 0.1, 0.8, 1.0, 2.0]),
    FILTERS,
    st.integers(0, 10**6),
)
def test_kept_tokens_equal_the_definitions(
    shape: str, size: int, temperature: float, options: dict[str, Any], seed: int
) -> None:
    logits = make_logits(shape, 1, size, seed)
    row = logits[0].double().numpy()
    params = SamplingParams(temperature=temperature, **options)
    expected, is_clear = filter_tokens((row - row.max()) / temperature, params)
    assume(is_clear)

    filters = make_filters(1, size, **options)
    kept = kept_tokens(logits, torch.tensor([temperature], dtype=torch.float64), filters)

    # A token of no mass may be kept or not: it cannot be drawn.
    possible = (row - row.max()) / temperature > -25
    assert np.array_equal(kept[0].numpy() & possible, expected & possible)


@pytest.mark.parametrize("top_k", [1, 3, 70])
def test_top_k_keeps_exactly_k_of_equals_and_the_lowest_ids(top_k: int) -> None:
    logits = torch.zeros(1, 200).index_fill(1, torch.tensor([150]), 1.0)
    one = torch.ones(1, dtype=torch.float64)

    kept = kept_tokens(logits, one, make_filters(1, 200, top_k=top_k))
    drawn = draw_gathered(
        pad(logits.expand(1000, -1)),
        one.expand(1000),
        make_keys(1000, 1),
        make_filters(1000, 200, top_k=top_k),
    )

    expected = sorted([150, *range(top_k - 1)])
    assert kept[0].nonzero()[:, 0].tolist() == expected
    assert set(drawn.tolist()) == set(expected)


@pytest.mark.parametrize(("top_p", "expected"), [(0.5, 2), (0.51, 3), (0.75, 3), (0.0, 1)])
def test_top_p_keeps_no_more_than_reaches_it(top_p: float, expected: int) -> None:
    logits = torch.full((1, 4), -110.0)  # four equals: the masses are exact

    kept = kept_tokens(logits, torch.ones(1, dtype=torch.float64), make_filters(1, 4, top_p=top_p))

    assert kept[0].tolist() == [True] * expected + [False] * (4 - expected)


@pytest.mark.parametrize("shape", ["smooth", "flat", "equal", "peaked"])
def test_masses_add_up_to_the_same_in_any_order(shape: str) -> None:
    logits = make_logits(shape, 1, 50257, 3)
    order = torch.randperm(50257, generator=torch.Generator().manual_seed(1))
    one = torch.ones(1, dtype=torch.float64)

    masses = mass(logits, logits.amax(-1), one)

    total = int(sum_of(masses))
    assert total == sum(int(value) for value in masses[0].tolist()) < 2**53
    assert total == int(sum_of(masses[:, order])) == int(masses[0].double().cumsum(-1)[-1])


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_few_tokens_of_a_large_vocabulary_need_their_noise(top_p: float) -> None:
    class CountingKeys(NoiseKeys):
        num_tokens = 0

        def select(self, rows: Tensor) -> NoiseKeys:
            CountingKeys.num_tokens = max(CountingKeys.num_tokens, len(rows))
            return super().select(rows)

    logits = pad(make_logits("smooth", 8, 50257, 3))
    keys = make_keys(8, 3)
    counting = CountingKeys(keys.seed, keys.choice, keys.position)

    draw_gathered(
        logits,
        torch.ones(8, dtype=torch.float64),
        counting,
        make_filters(8, 50257, top_p=top_p),
    )

    assert 0 < CountingKeys.num_tokens < 0.03 * logits.numel()


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from([*SIZES, 8193]),
    st.integers(0, 10**6),
)
def test_lowest_argmax_finds_the_lowest_of_equals(shape: str, size: int, seed: int) -> None:
    logits = make_logits(shape, 3, size, seed)

    ids, best = lowest_argmax(logits)

    rows = logits.tolist()
    assert best.tolist() == [max(row) for row in rows]
    assert ids.tolist() == [row.index(max(row)) for row in rows]


@pytest.mark.parametrize("size", SIZES)
def test_chunk_peaks_show_whatever_is_not_finite(size: int) -> None:
    for place in {0, size // 2, size - 1}:
        logits = torch.randn(2, size)
        logits[0, place] = math.nan

        peaks = chunk_peaks(logits)

        assert math.isnan(float(peaks[0].amax()))
        assert bool(peaks[1].isfinite().all())
