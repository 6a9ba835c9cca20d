"""Sampling against a plain reference, statistics, and the promise that rows do not meet."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.draw import Filters
from engine.random_stream import NoiseKeys
from engine.sampler import SampledTokens, sample, token_logprobs
from engine.sampling_params import SamplingParams
from engine.sampling_row import SamplingRow
from tests.engine.plain_sampler import edit, sample_plainly

VOCAB_SIZES = [95, 257, 2048, 8193, 50257]
EOS = 3

# One of every kind of work, and mixtures.
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 0, "frequency_penalty": 0.7, "repetition_penalty": 1.3},
    {"temperature": 0, "logit_bias": {5: 100.0, 6: -100.0}, "logprobs": 0},
    {},
    {"temperature": 0.8},
    {"temperature": 2, "presence_penalty": 1.5},
    {"temperature": 1e-300},
    {"top_k": 1},
    {"top_k": 50, "temperature": 0.7},
    {"top_p": 0.95, "logprobs": 5},
    {"top_p": 0.3},
    {"top_p": 0},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"min_p": 0.1},
    {"typical_p": 0.5},
    {"typical_p": 0.9, "top_k": 30, "top_p": 0.9},
    {"allowed_token_ids": (2, 3, 50, 90)},
    {"min_tokens": 9, "stop_token_ids": (4, 5), "logit_bias": {4: 100.0, 7: 100.0}},
]


def make_row(
    seed: int = 0,
    *,
    choice: int = 0,
    prompt_ids: Sequence[int] = (1, 2, 2, 9),
    completion_ids: Sequence[int] = (9, 9, 11),
    **options: Any,
) -> SamplingRow:
    params = SamplingParams(seed=seed, max_tokens=100_000, **options)
    return SamplingRow(
        params,
        choice=choice,
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        eos_ids=[EOS],
    )


def make_logits(num_rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Like those of a language model: far below zero, some tokens far above the others."""
    generator = torch.Generator().manual_seed(seed)
    tail = torch.rand(num_rows, vocab_size, generator=generator).log() * -1.5
    return tail + torch.randn(num_rows, vocab_size, generator=generator) - 90


def mixed_rows(num_rows: int) -> list[SamplingRow]:
    return [make_row(100 + i, **KINDS[i % len(KINDS)]) for i in range(num_rows)]


def outcome(sampled: SampledTokens, place: int) -> tuple[object, ...]:
    """All that came of one row, comparable bit by bit."""
    return (
        int(sampled.token_ids[place]),
        bool(sampled.is_finite[place]),
        sampled.logprobs_by_row().get(place),
    )


# Rows do not meet.


@pytest.mark.parametrize("vocab_size", [95, 257, 2048])
def test_rows_together_equal_rows_alone(vocab_size: int) -> None:
    logits, rows = make_logits(64, vocab_size), mixed_rows(64)
    alone = [outcome(sample(logits[i : i + 1], [row]), 0) for i, row in enumerate(rows)]

    for size in range(1, 65):
        for first in {0, 64 - size} if size % 8 == 1 else {0}:
            together = sample(logits[first : first + size], rows[first : first + size])

            outcomes = [outcome(together, place) for place in range(size)]
            assert outcomes == alone[first : first + size], f"{size} rows from {first}"


@pytest.mark.parametrize("vocab_size", [8193, 50257])
def test_rows_together_equal_rows_alone_in_large_vocabularies(vocab_size: int) -> None:
    logits, rows = make_logits(40, vocab_size), mixed_rows(40)
    alone = [outcome(sample(logits[i : i + 1], [row]), 0) for i, row in enumerate(rows)]

    for places in (list(range(40)), list(range(39, -1, -1)), [7, 3, 10], [2, 9, 4, 15]):
        together = sample(logits[places], [rows[place] for place in places])

        assert [outcome(together, i) for i in range(len(places))] == [alone[i] for i in places]


def test_rows_that_are_not_finite_are_flagged_and_leave_the_others_alone() -> None:
    logits, rows = make_logits(3 * len(KINDS), 257), mixed_rows(3 * len(KINDS))
    alone = [outcome(sample(logits[i : i + 1], [row]), 0) for i, row in enumerate(rows)]
    broken = logits.clone()
    for place in range(0, len(rows), 3):
        kind = (place // 3) % 4
        broken[place] = -math.inf if kind == 0 else broken[place]
        if kind:
            broken[place, 200] = (math.nan, math.inf, math.nan)[kind - 1]
        if kind == 3:
            broken[place] = math.nan

    sampled = sample(broken, rows)

    for place in range(len(rows)):
        if place % 3:
            assert outcome(sampled, place) == alone[place]
        else:
            assert (int(sampled.token_ids[place]), bool(sampled.is_finite[place])) == (0, False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_one_number_that_is_not_finite_is_found_anywhere(vocab_size: int, value: float) -> None:
    places = [0, 63, 64, vocab_size // 2, vocab_size - 1]
    logits = make_logits(len(places) + 1, vocab_size)
    for row, place in enumerate(places):
        logits[row, place] = value

    sampled = sample(logits, [make_row(temperature=0)] * len(logits))

    assert sampled.is_finite.tolist() == [False] * len(places) + [True]


def test_some_minus_infinity_is_not_an_error() -> None:
    logits = make_logits(len(KINDS), 257)
    logits[:, 100:] = -math.inf
    rows = [make_row(i, **kind) for i, kind in enumerate(KINDS)]

    sampled = sample(logits, rows)

    assert bool(sampled.is_finite.all())
    assert int(sampled.token_ids.max()) < 100


def test_logits_are_left_as_they_are() -> None:
    logits, rows = make_logits(40, 257), mixed_rows(40)
    before = logits.clone()

    sample(logits, rows)

    assert torch.equal(logits, before)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_padding_is_never_drawn_and_never_counted(vocab_size: int) -> None:
    logits, rows = make_logits(len(KINDS), vocab_size), mixed_rows(len(KINDS))
    padded = torch.cat((logits, torch.full((len(logits), 47), 50.0)), 1)

    sampled, expected = sample(padded[:, :vocab_size], rows), sample(logits, rows)

    assert [outcome(sampled, i) for i in range(len(rows))] == [
        outcome(expected, i) for i in range(len(rows))
    ]


def test_no_rows_give_no_tokens() -> None:
    sampled = sample(torch.zeros(0, 257), [])

    assert sampled.token_ids.shape == sampled.is_finite.shape == (0,)


# The draw.


def test_token_depends_on_seed_choice_and_position() -> None:
    logits = make_logits(1, 2048).expand(400, -1) / 20  # flat: two draws seldom agree
    same = [make_row(5)] * 400
    seeds = [make_row(i) for i in range(400)]
    choices = [make_row(5, choice=i) for i in range(400)]
    positions = [make_row(5, completion_ids=[1] * i) for i in range(400)]

    def num_tokens(rows: list[SamplingRow]) -> int:
        return len(set(sample(logits, rows).token_ids.tolist()))

    assert num_tokens(same) == 1
    assert min(num_tokens(rows) for rows in (seeds, choices, positions)) > 250


def test_position_is_counted_over_prompt_and_completion() -> None:
    logits = make_logits(1, 2048) / 20
    rows = [
        make_row(5, prompt_ids=[1] * 10, completion_ids=[2] * 5),
        make_row(5, prompt_ids=[1] * 15, completion_ids=[]),
        make_row(5, prompt_ids=[1], completion_ids=[2] * 14),
    ]

    sampled = sample(logits.expand(3, -1), rows)

    assert len(set(sampled.token_ids.tolist())) == 1


PARAMETERS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0, 0.1, 0.7, 1.0, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 0, 1, 4, 30]),
        "top_p": st.sampled_from([1.0, 1.0, 0.0, 0.5, 0.95]),
        "min_p": st.sampled_from([0.0, 0.0, 0.05]),
        "typical_p": st.sampled_from([1.0, 1.0, 1.0, 0.7]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 2.0, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 1.5, -0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.2, 0.5, 1e-9]),
        "logit_bias": st.dictionaries(
            st.integers(0, 94), st.floats(-100, 100, width=32), max_size=5
        ),
        "allowed_token_ids": st.none() | st.lists(st.integers(0, 94), min_size=1).map(tuple),
        "min_tokens": st.sampled_from([0, 0, 3, 100]),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.lists(st.integers(0, 94), max_size=3).map(tuple),
    }
)
IDS = st.lists(st.integers(0, 94), max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    PARAMETERS,
    IDS,
    IDS,
    st.sampled_from(["smooth", "ties", "below zero", "gaps"]),
    st.integers(0, 10**6),
)
def test_token_is_the_one_the_plain_reference_draws(
    options: dict[str, Any],
    prompt_ids: list[int],
    completion_ids: list[int],
    shape: str,
    seed: int,
) -> None:
    logits = torch.randn(4, 95, generator=torch.Generator().manual_seed(seed)) * 3
    if shape == "ties":
        logits = logits.round()
    elif shape == "below zero":
        logits = logits - 110
    elif shape == "gaps":
        logits = logits.round() * 1e4
    rows = [
        make_row(seed + i, prompt_ids=prompt_ids, completion_ids=completion_ids, **options)
        for i in range(4)
    ]

    sampled = sample(logits, rows)

    for i, row in enumerate(rows):
        plain = sample_plainly(logits[i].numpy(), row.params, prompt_ids, completion_ids, [EOS])
        assume(plain.is_clear)
        expected = plain.draw(seed + i, 0, len(prompt_ids) + len(completion_ids))
        assert int(sampled.token_ids[i]) == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1, "temperature": 1.5},
        {"typical_p": 0.6},
        {"top_k": 20, "top_p": 0.9, "temperature": 1.3},
        {"top_p": 0.9, "min_p": 0.05},
        {"typical_p": 0.8, "min_p": 0.02, "temperature": 0.8},
        {"top_k": 30, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9, "temperature": 1.2},
        {"top_k": 25, "typical_p": 0.9, "frequency_penalty": 0.8, "logit_bias": {9: 2.0, 30: 5.0}},
        {
            "presence_penalty": 1.0,
            "frequency_penalty": -0.5,
            "repetition_penalty": 1.05,
            "logit_bias": {9: 3.0, 60: -2.0},
        },
        {"min_tokens": 10_000, "stop_token_ids": (0, 1)},
        {"allowed_token_ids": tuple(range(0, 95, 4))},
    ],
    ids=str,
)
def test_tokens_are_distributed_as_the_reference_says(options: dict[str, Any]) -> None:
    num_draws = 4000
    logits = make_logits(1, 95, seed=4) * 1.5
    rows = [make_row(seed, **options) for seed in range(num_draws)]

    drawn = sample(logits.expand(num_draws, -1), rows).token_ids

    plain = sample_plainly(logits[0].numpy(), rows[0].params, [1, 2, 2, 9], [9, 9, 11], [EOS])
    assert plain.is_clear
    check_distribution(drawn, plain.probabilities)


@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.9, "min_p": 1e-4}, {"top_k": 50, "temperature": 0.7}], ids=str
)
@pytest.mark.parametrize("axis", ["seed", "choice", "position"])
def test_each_part_of_the_key_alone_gives_that_distribution(
    axis: str, options: dict[str, Any]
) -> None:
    """Over a vocabulary of many chunks; other seeds, siblings, or the tokens of one completion."""
    num_draws = 4000
    logits = make_logits(1, 2048, seed=4)
    rows = [
        make_row(
            i if axis == "seed" else 7,
            choice=i if axis == "choice" else 0,
            completion_ids=[1] * (i if axis == "position" else 3),
            **options,
        )
        for i in range(num_draws)
    ]

    drawn = sample(logits.expand(num_draws, -1), rows).token_ids

    plain = sample_plainly(logits[0].numpy(), rows[0].params, [1, 2, 2, 9], [9, 9, 11], [EOS])
    assert plain.is_clear
    check_distribution(drawn, plain.probabilities)


def check_distribution(drawn: Tensor, probabilities: np.ndarray) -> None:
    """Chi-square lies within 4.5 deviations of its mean; seeds are fixed: chance had one go."""
    expected = len(drawn) * probabilities
    counts = np.bincount(drawn.numpy(), minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    # Chi-square over tokens expected ten times or more; the others share a bin.
    common = expected >= 10
    observed = np.append(counts[common], counts[~common].sum())
    hoped = np.append(expected[common], expected[~common].sum())
    observed, hoped = observed[hoped > 0], hoped[hoped > 0]
    chi_square = ((observed - hoped) ** 2 / hoped).sum()
    degrees = max(len(hoped) - 1, 1)
    assert chi_square < degrees + 4.5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"frequency_penalty": -0.7},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.6},
        {"logit_bias": {9: -2.5}},
        {
            "presence_penalty": -0.3,
            "frequency_penalty": 0.4,
            "repetition_penalty": 1.1,
            "logit_bias": {9: 1.25},
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("logit", [-90.0, 3.0])
def test_penalties_move_a_logit_as_far_as_the_reference_says(
    logit: float, options: dict[str, Any]
) -> None:
    # Token 9 stands in the prompt once and in the completion twice; token 30 nowhere.
    logits = torch.full((2, 95), -500.0)
    logits[:, 9] = logit
    row = make_row(temperature=0, **options)
    moved = edit(logits[0].numpy(), row.params, [1, 2, 2, 9], [9, 9, 11], [EOS])[9]
    logits[:, 30] = torch.tensor([moved + 1e-3, moved - 1e-3])

    sampled = sample(logits, [row, row])

    assert moved != logit
    assert sampled.token_ids.tolist() == [30, 9]


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_greedy_takes_the_lowest_of_equals(vocab_size: int) -> None:
    logits = torch.full((3, vocab_size), -110.0)
    logits[1, [vocab_size - 1, vocab_size // 2]] = -90
    logits[2, vocab_size - 1] = -100

    sampled = sample(logits, [make_row(temperature=0)] * 3)

    assert sampled.token_ids.tolist() == [0, vocab_size // 2, vocab_size - 1]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30, 1e-9])
def test_tiny_temperature_is_as_good_as_greedy(temperature: float) -> None:
    logits = make_logits(20, 2048)
    rows = [make_row(i, temperature=temperature) for i in range(20)]

    assert torch.equal(sample(logits, rows).token_ids, logits.argmax(-1))


def test_single_candidate_is_drawn_at_any_temperature() -> None:
    rows = [make_row(i, temperature=2, allowed_token_ids=(40,)) for i in range(20)]

    assert sample(make_logits(20, 95), rows).token_ids.tolist() == [40] * 20


def test_bans_that_would_leave_nothing_are_lifted() -> None:
    rows = [
        make_row(i, min_tokens=99, allowed_token_ids=(EOS, 5), stop_token_ids=(5,))
        for i in range(20)
    ]

    sampled = sample(make_logits(20, 95) / 50, rows)

    assert set(sampled.token_ids.tolist()) == {EOS, 5}


def test_penalty_beyond_float32_bans_no_row_entirely() -> None:
    rows = [
        make_row(i, prompt_ids=range(95), repetition_penalty=value, temperature=temperature)
        for i, value in enumerate((1e-300, 1e300))
        for temperature in (0, 1)
    ]

    for logits in (make_logits(4, 95), make_logits(4, 95) + 180):
        sampled = sample(logits, rows)

        assert bool(sampled.is_finite.all())
        assert bool((sampled.token_ids < 95).all())


# Logprobs.


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_logprobs_equal_float64(vocab_size: int, num_top: int) -> None:
    logits = make_logits(3, vocab_size)
    targets = torch.tensor([0, vocab_size // 2, vocab_size - 1])

    scored = token_logprobs(logits, targets, num_top)

    exact = logits.double().log_softmax(-1)
    # float32: a rounding of a logit near 100 is 4e-6, of the sum the same again.
    torch.testing.assert_close(
        scored.logprobs.double(), exact.gather(1, targets[:, None])[:, 0], rtol=0, atol=2e-5
    )
    tops = exact.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(scored.top_ids, tops.indices[:, :num_top])
    torch.testing.assert_close(
        scored.top_logprobs.double(), tops.values[:, :num_top], rtol=0, atol=2e-5
    )


def test_most_probable_tokens_are_ordered_by_id_among_equals() -> None:
    logits = torch.full((1, 300), -110.0)
    logits[0, [250, 7]] = -100

    scored = token_logprobs(logits, torch.tensor([0]), 5)

    assert scored.top_ids.tolist() == [[7, 250, 0, 1, 2]]


def test_certain_token_has_logprob_zero() -> None:
    logits = torch.full((1, 300), -1e4)
    logits[0, 250] = 1e4

    scored = token_logprobs(logits, torch.tensor([250]), 2)

    assert scored.logprobs.tolist() == [0.0]
    assert scored.top_ids.tolist() == [[250, 0]]


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    scored = token_logprobs(torch.randn(2, 5), torch.tensor([0, 1]), 20)

    assert [sorted(ids) for ids in scored.top_ids.tolist()] == [[0, 1, 2, 3, 4]] * 2


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    logits = make_logits(2, 257)
    rows = [
        make_row(logprobs=3, logit_bias={5: 100.0}, temperature=0.1, top_k=1),
        make_row(logprobs=1, allowed_token_ids=(9,), repetition_penalty=2.0),
    ]

    sampled = sample(logits, rows)

    assert sampled.token_ids.tolist() == [5, 9]
    (first, first_ids, first_tops), (second, second_ids, second_tops) = token_logprobs(
        logits, torch.tensor([5, 9]), 3
    ).tolist()
    assert sampled.logprobs_by_row() == {
        0: (first, first_ids, first_tops),
        1: (second, second_ids[:1], second_tops[:1]),
    }


def test_only_rows_that_ask_get_logprobs() -> None:
    rows = [make_row(), make_row(logprobs=0), make_row(), make_row(logprobs=4)]

    sampled = sample(make_logits(4, 95), rows)

    by_row = sampled.logprobs_by_row()
    assert {row: len(ids) for row, (_, ids, _) in by_row.items()} == {1: 0, 3: 4}
    assert sample(make_logits(2, 95), rows[::2]).logprobs_by_row() == {}


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_prompt_logprobs_do_not_depend_on_the_number_of_positions(vocab_size: int) -> None:
    num_rows = 64 if vocab_size < 8000 else 20
    logits = make_logits(num_rows, vocab_size)
    targets = torch.arange(num_rows)
    together = token_logprobs(logits, targets, 3).tolist()

    for size in range(1, num_rows):
        assert token_logprobs(logits[:size], targets[:size], 3).tolist() == together[:size]


# Machines.


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sampling_reads_nothing_from_the_device(kind: dict[str, Any]) -> None:
    # A meta tensor has no values: whatever reads one back to the host raises.
    sampled = sample(torch.empty(3, 257, device="meta"), [make_row(i, **kind) for i in range(3)])

    assert sampled.token_ids.shape == (3,)
    assert sampled.token_ids.device.type == "meta"


def test_a_device_draws_by_its_own_kernel() -> None:
    draws: list[tuple[int, bool]] = []

    def draw(
        logits: torch.Tensor, temperature: torch.Tensor, keys: NoiseKeys, filters: Filters | None
    ) -> torch.Tensor:
        draws.append((len(logits), filters is not None))
        return logits.argmax(-1)

    rows = [make_row(), make_row(temperature=0.5), make_row(logit_bias={3: 1.0}, top_p=0.5)]
    sample(torch.empty(3, 257, device="meta"), rows, draw=draw)

    assert draws == [(3, False), (1, True)], "all of them, then the edited ones once more"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_gpu_samples_what_the_cpu_samples(vocab_size: int) -> None:
    logits, rows = make_logits(64, vocab_size), mixed_rows(64)

    on_gpu = sample(logits.cuda(), rows)

    assert torch.equal(on_gpu.token_ids.cpu(), sample(logits, rows).token_ids)
