"""The kernels of a CPU against the definition of the draw, and that against plainer ones."""

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
    UNIT_BITS,
    Filters,
    chunk_peaks,
    draw,
    kept_tokens,
    lowest_argmax,
    mass,
    sum_of,
)
from engine.random_stream import NoiseKeys
from engine.sampler_cpu import Options, score
from engine.sampler_cpu import choose as choose_by_kernel
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


def choose(
    logits: Tensor,
    temperature: Tensor | None = None,
    keys: NoiseKeys | None = None,
    filters: Filters | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel, asked as `draw` is."""
    if temperature is None or keys is None:
        return choose_by_kernel(logits)
    if filters is None:
        filters = make_filters(len(logits), logits.shape[1])
    columns = (
        temperature, keys.seed, keys.choice, keys.position, filters.top_k, filters.top_p,
        filters.min_p.log(), filters.typical_p,
    )  # fmt: skip
    return choose_by_kernel(logits, Options(*(column.contiguous().numpy() for column in columns)))


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
        has_typical_p=typical_p < 1,
    )


FILTERS = st.fixed_dictionaries(
    {
        "top_k": st.sampled_from([0, 0, 1, 2, 5, 40, 300]),
        "top_p": st.sampled_from([1.0, 1.0, 0.0, 1e-6, 0.1, 0.5, 0.9, 0.95, 0.999, 1 - 1e-12]),
        "min_p": st.sampled_from([0.0, 0.0, 1e-9, 0.02, 0.5, 1.0]),
        "typical_p": st.sampled_from([1.0, 1.0, 1.0, 0.0, 0.2, 0.9]),
    }
)
TEMPERATURES = st.sampled_from([1e-30, 1e-6, 0.1, 0.8, 1.0, 2.0])


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from(SIZES),
    TEMPERATURES,
    FILTERS,
    st.integers(0, 10**6),
)
def test_kernel_draws_as_the_definition(
    shape: str, size: int, temperature: float, options: dict[str, Any], seed: int
) -> None:
    num_rows = 8
    logits = make_logits(shape, num_rows, size, seed)
    heat = torch.full((num_rows,), temperature, dtype=torch.float64)
    keys = make_keys(num_rows, seed)
    filters = make_filters(num_rows, size, **options)

    drawn, is_finite = choose(logits, heat, keys, filters)

    assert drawn.tolist() == draw(logits, heat, keys, filters).tolist()
    assert bool(is_finite.all())


@pytest.mark.parametrize("shape", ["smooth", "flat", "equal", "ties", "peaked"])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_kernel_draws_without_filters_as_the_definition(shape: str, temperature: float) -> None:
    # Many rows: what the kernel leaves out must not win even once in hundreds of draws.
    logits = make_logits(shape, 500, 1000, 5)
    heat = torch.full((500,), temperature, dtype=torch.float64)

    drawn, _ = choose(logits, heat, make_keys(500, 6))

    assert torch.equal(drawn, draw(logits, heat, make_keys(500, 6)))


@pytest.mark.parametrize("size", [8193, 50257])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_p": 0.95},
        {"top_p": 0.2},
        {"top_k": 50},
        {"top_k": 3000, "top_p": 0.9},
        {"min_p": 0.01, "top_p": 0.99},
        {"typical_p": 0.9},
        {"typical_p": 0.3, "top_k": 100, "min_p": 1e-3},
    ],
    ids=str,
)
def test_kernel_draws_over_large_vocabularies_as_the_definition(
    size: int, options: dict[str, Any]
) -> None:
    shapes = ("smooth", "flat", "ties", "peaked", "equal", "holes")
    logits = torch.cat([make_logits(shape, 4, size, 1) for shape in shapes])
    heat = torch.full((24,), 0.8, dtype=torch.float64)
    filters = make_filters(24, size, **options)

    drawn, _ = choose(logits, heat, make_keys(24, 2), filters)

    assert torch.equal(drawn, draw(logits, heat, make_keys(24, 2), filters))


@pytest.mark.parametrize("shape", ["smooth", "flat", "equal", "ties", "peaked"])
@pytest.mark.parametrize("size", [95, 8193])
def test_top_p_is_decided_to_the_last_unit_of_mass(shape: str, size: int) -> None:
    logits = make_logits(shape, 100, size, 4)
    heat = torch.full((100,), 0.8, dtype=torch.float64)
    keys = make_keys(100, 5)
    unfiltered = draw(logits, heat, keys)
    # What comes before the winner, as a share of all: the least that top_p must not be.
    masses = mass(logits, logits.amax(-1), heat).double()
    best = logits.gather(1, unfiltered[:, None])
    comes_before = torch.arange(size) < unfiltered[:, None]
    before = (masses * ((logits > best) | ((logits == best) & comes_before))).sum(-1)
    share = before / masses.sum(-1)

    for factor in (1 - 1e-3, 1 - 1e-12, 1.0, 1 + 1e-12, 1 + 1e-3):
        filters = make_filters(100, size)
        filters.top_p.copy_((share * factor).clamp(max=1 - 1e-12))

        drawn, _ = choose(logits, heat, keys, filters)

        assert torch.equal(drawn, draw(logits, heat, keys, filters))
        if factor == 1 + 1e-12:
            assert torch.equal(drawn[before > 0], unfiltered[before > 0])
        if factor == 1 - 1e-12:
            assert bool((drawn != unfiltered)[before > 0].all())


@pytest.mark.parametrize("places", [[0], [511], [0, 511], [63, 64], [127, 128, 130]])
def test_kernel_draws_at_the_edges_of_blocks_as_the_definition(places: list[int]) -> None:
    logits = torch.full((200, 512), -math.inf)
    logits[:, places] = -5.0
    heat = torch.ones(200, dtype=torch.float64)
    filters = make_filters(200, 512, top_p=0.6)

    drawn, _ = choose(logits, heat, make_keys(200, 3))
    filtered, _ = choose(logits, heat, make_keys(200, 3), filters)

    assert torch.equal(drawn, draw(logits, heat, make_keys(200, 3)))
    assert torch.equal(filtered, draw(logits, heat, make_keys(200, 3), filters))
    assert set(drawn.tolist()) == set(places)


def test_kernel_takes_any_key() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = NoiseKeys(
        torch.randint(-(2**63), 2**63 - 1, (300,), generator=generator),
        torch.randint(2**32, (300,), generator=generator),
        torch.randint(2**32, (300,), generator=generator),
    )
    logits, heat = make_logits("flat", 300, 700, 1), torch.ones(300, dtype=torch.float64)

    drawn, _ = choose(logits, heat, keys)

    assert torch.equal(drawn, draw(logits, heat, keys))


def test_rows_of_different_options_are_drawn_side_by_side() -> None:
    logits = torch.cat([make_logits(shape, 8, 700, 2) for shape in ("smooth", "ties")])
    keys = make_keys(16, 4)
    heat = torch.tensor([0.0, 0.5, 1.0, 2.0] * 4, dtype=torch.float64)
    filters = Filters(
        torch.tensor([700, 5, 700, 700] * 4),
        torch.tensor([0.5, 1.0, 0.9, 1.0] * 4, dtype=torch.float64),
        torch.tensor([0.0, 0.0, 0.05, 0.0] * 4, dtype=torch.float64),
        torch.tensor([1.0, 1.0, 1.0, 0.8] * 4, dtype=torch.float64),
        has_typical_p=True,
    )

    chosen, _ = choose(logits, heat, keys, filters)

    drawn = draw(logits, heat.clamp(min=1e-30), keys, filters)
    assert torch.equal(chosen, drawn.where(heat > 0, lowest_argmax(logits)[0]))


def test_rows_of_a_wider_table_are_chosen_from_alone() -> None:
    table = make_logits("smooth", 6, 90, 3)
    heat = torch.ones(6, dtype=torch.float64)
    expected = draw(table[:, :80].contiguous(), heat, make_keys(6, 1))

    for logits in (table[:, :80], table.T.contiguous().T[:, :80]):
        assert torch.equal(choose(logits, heat, make_keys(6, 1))[0], expected)
        assert torch.equal(choose(logits)[0], lowest_argmax(table[:, :80])[0])


def test_both_zeros_are_one_logit() -> None:
    logits = torch.full((300, 100), -math.inf)
    logits[:, [10, 70]] = torch.tensor([-0.0, 0.0])
    logits[150:, [10, 70]] = torch.tensor([0.0, -0.0])
    heat = torch.ones(300, dtype=torch.float64)
    filters = make_filters(300, 100, top_k=1)

    assert set(choose(logits)[0].tolist()) == {10}
    assert set(choose(logits, heat, make_keys(300, 1), filters)[0].tolist()) == {10}
    assert torch.equal(
        choose(logits, heat, make_keys(300, 1))[0], draw(logits, heat, make_keys(300, 1))
    )


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf], ids=["nan", "-nan", "inf"])
@pytest.mark.parametrize("size", [1, 64, 95, 2048])
def test_rows_without_a_finite_best_are_told(size: int, value: float) -> None:
    for place in {0, size // 2, size - 1}:
        logits = make_logits("smooth", 3, size, 1)
        logits[1, place] = value
        logits[2] = -math.inf
        heat = torch.ones(3, dtype=torch.float64)

        chosen, is_finite = choose(logits)
        drawn, still_finite = choose(
            logits, heat, make_keys(3, 1), make_filters(3, size, top_p=0.5)
        )

        assert is_finite.tolist() == still_finite.tolist() == [True, False, False]
        assert chosen.tolist()[1:] == drawn.tolist()[1:] == [0, 0]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from([*SIZES, 8193]),
    st.integers(0, 64),
    st.integers(0, 10**6),
)
def test_scores_equal_a_sort(shape: str, size: int, num_top: int, seed: int) -> None:
    logits = make_logits(shape, 3, size, seed)
    num_top = min(num_top, size)
    token_ids = torch.tensor([0, size // 2, size - 1])

    logprobs, top_ids, top_logprobs = score(logits, token_ids, num_top)

    ordered = logits.sort(dim=-1, descending=True, stable=True)
    exact = logits.double().log_softmax(-1).float()
    assert torch.equal(top_ids, ordered.indices[:, :num_top])
    for found, ids in ((logprobs[:, None], token_ids[:, None]), (top_logprobs, top_ids)):
        # float32 numbers, out of masses within 5e-6.
        torch.testing.assert_close(found, exact.gather(1, ids), rtol=1e-6, atol=1e-5)


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
    drawn, _ = choose(
        logits.expand(1000, -1),
        one.repeat(1000),
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


@pytest.mark.parametrize("temperature", [0.1, 0.8, 2.0])
def test_mass_is_the_exponential_in_units(temperature: float) -> None:
    logits = torch.linspace(-60, 0, 100_001)[None] * temperature - 90
    heat = torch.tensor([temperature], dtype=torch.float64)

    masses = mass(logits, logits.amax(-1), heat)[0].double()

    x = (logits[0].double() + 90) / temperature
    exact = x.exp() * 2.0**UNIT_BITS
    assert bool(((masses - exact).abs() <= 1e-5 * exact + 0.6).all())
    assert masses[-1] == 2.0**UNIT_BITS
    assert torch.equal(masses, masses.round())


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from([*SIZES, 8193]),
    st.integers(0, 10**6),
)
def test_lowest_argmax_finds_the_lowest_of_equals(shape: str, size: int, seed: int) -> None:
    logits = make_logits(shape, 3, size, seed)

    ids, best = lowest_argmax(logits)
    chosen, _ = choose(logits)

    rows = logits.tolist()
    assert best.tolist() == [max(row) for row in rows]
    assert ids.tolist() == chosen.tolist() == [row.index(max(row)) for row in rows]


@pytest.mark.parametrize("size", SIZES)
def test_chunk_peaks_show_whatever_is_not_finite(size: int) -> None:
    for place in {0, size // 2, size - 1}:
        logits = torch.randn(2, size)
        logits[0, place] = math.nan

        peaks = chunk_peaks(logits)

        assert math.isnan(float(peaks[0].amax()))
        assert bool(peaks[1].isfinite().all())
