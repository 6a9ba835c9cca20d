"""The noise against its published generator, a plain reference, and what noise must be."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.random_stream import LOUD, MAX_NOISE, MIN_NOISE, NoiseKeys, gumbel, philox
from tests.engine import plain_sampler

WORDS = st.integers(0, 2**32 - 1)
SEEDS = st.integers(-(2**63), 2**63 - 1)


def keys(*rows: tuple[int, int, int]) -> NoiseKeys:
    """Keys from (seed, choice, position)."""
    seed, choice, position = torch.tensor(rows).unbind(1)
    return NoiseKeys(seed, choice, position)


def noise_of(key: tuple[int, int, int], token_id: int) -> Tensor:
    """The noise of one token, the last that is asked for."""
    return keys(key).all_noise(token_id + 1)[0, token_id]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    # kat_vectors of Random123, "philox4x32 10".
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: list[int], key: list[int], expected: str
) -> None:
    c0, c1, c2, c3 = torch.tensor(counter)[:, None]
    k0, k1 = torch.tensor(key)[:, None]

    words = philox((c0, c1, c2, c3), (k0, k1))

    assert " ".join(f"{int(word):08x}" for word in words) == expected


@settings(deadline=None)
@given(st.lists(st.tuples(*[WORDS] * 6), min_size=1, max_size=20))
def test_philox_equals_arbitrary_precision(cases: list[tuple[int, ...]]) -> None:
    c0, c1, c2, c3, k0, k1 = torch.tensor(cases).unbind(1)

    words = torch.stack(philox((c0, c1, c2, c3), (k0, k1)), 1)

    assert words.tolist() == [list(plain_sampler.philox(case[:4], case[4:])) for case in cases]


@settings(deadline=None)
@given(SEEDS, st.integers(0, 20), st.integers(0, 5000), st.integers(0, 60000))
def test_noise_equals_a_plain_reference(
    seed: int, choice: int, position: int, token_id: int
) -> None:
    expected = plain_sampler.gumbel(plain_sampler.noise_bits(seed, choice, position, token_id))

    assert float(noise_of((seed, choice, position), token_id)) == float(np.float32(expected))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(SEEDS, st.integers(0, 9), st.integers(0, 999)), min_size=1, max_size=5),
    st.sampled_from([1, 15, 16, 17, 257, 2048]),
)
def test_noise_is_the_same_in_every_shape(rows: list[tuple[int, int, int]], size: int) -> None:
    all_noise = keys(*rows).all_noise(size)

    assert all_noise.shape == (len(rows), size)
    token_ids = [0, size // 2, size - 1]
    for noise, row in zip(all_noise, rows, strict=True):
        assert torch.equal(noise, keys(row).all_noise(size)[0])
        for token_id in token_ids:
            assert torch.equal(noise[token_id], noise_of(row, token_id))


def test_noise_is_finite_and_grows_with_its_bits() -> None:
    noise = gumbel(torch.arange(2**23))

    assert bool((noise.diff() > 0).all())
    assert MIN_NOISE < float(noise[0]) < MIN_NOISE + 1e-3
    assert MAX_NOISE - 1e-3 < float(noise[-1]) < MAX_NOISE


def test_noise_is_rounded_from_the_exact_value() -> None:
    k = np.arange(0, 2**23, 17)
    exact = -np.log(-np.log((k.astype(np.longdouble) + 0.5) / 2**23))

    assert np.array_equal(gumbel(torch.from_numpy(k)).numpy(), exact.astype(np.float32))


def test_loud_noise_exceeds_all_other_noise() -> None:
    quietest_loud = gumbel(torch.tensor(LOUD << 15))
    loudest_other = gumbel(torch.tensor((LOUD << 15) - 1))

    assert LOUD == 255
    assert quietest_loud > loudest_other


def test_noise_is_distributed_as_gumbel() -> None:
    # Equally probable bins over 128 rows of 2048 tokens; chi-square has 255 degrees of freedom.
    noise = keys(*[(3, 0, position) for position in range(128)]).all_noise(2048).flatten()
    shares = torch.exp(-torch.exp(-noise.double()))  # the distribution function: uniform

    counts = torch.histc(shares, 256, 0, 1)

    expected = noise.numel() / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert 255 - 5 * math.sqrt(510) < chi_square < 255 + 5 * math.sqrt(510)


@pytest.mark.parametrize(
    "other",
    [
        (8, 0, 5),  # seed
        (7 + 2**32, 0, 5),  # the seed's upper half
        (-7, 0, 5),
        (7, 1, 5),  # choice
        (7, 0, 6),  # position
        (7, 5, 0),  # choice and position exchanged
    ],
)
def test_noise_of_other_keys_is_uncorrelated(other: tuple[int, int, int]) -> None:
    one, two = keys((7, 0, 5), other).all_noise(50_000).double()

    correlation = float(torch.corrcoef(torch.stack((one, two)))[0, 1])

    assert abs(correlation) < 5 / math.sqrt(50_000)


@pytest.mark.parametrize("distance", [1, 2, 4, 8, 16, 64])
def test_noise_of_near_tokens_is_uncorrelated(distance: int) -> None:
    noise = keys((7, 0, 5)).all_noise(50_000)[0].double()

    pairs = torch.stack((noise[:-distance], noise[distance:]))

    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 5 / math.sqrt(50_000)


def test_noise_runs_without_reading_the_host() -> None:
    some = keys((1, 2, 3), (4, 5, 6))
    meta = NoiseKeys(some.seed.to("meta"), some.choice.to("meta"), some.position.to("meta"))

    assert meta.all_noise(257).shape == (2, 257)
