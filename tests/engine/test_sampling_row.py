"""What a row keeps of a sequence: the same however it was told."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling_params import SamplingParams
from engine.sampling_row import SamplingRow

IDS = st.lists(st.integers(0, 300), max_size=200)


def counts(row: SamplingRow) -> dict[int, float]:
    ids, numbers = row.seen
    assert len(set(ids.tolist())) == len(ids)
    return dict(zip(ids.tolist(), numbers.tolist(), strict=True))


@settings(deadline=None)
@given(IDS, IDS, st.integers(0, 200))
def test_row_told_in_parts_equals_row_told_at_once(
    prompt_ids: list[int], completion_ids: list[int], cut: int
) -> None:
    params = SamplingParams(repetition_penalty=1.2, max_tokens=1000)
    row = SamplingRow(params, prompt_ids=prompt_ids, completion_ids=completion_ids[:cut])

    row.extend(completion_ids[cut:])

    at_once = SamplingRow(params, prompt_ids=prompt_ids, completion_ids=completion_ids)
    assert counts(row) == counts(at_once)
    assert row.num_tokens == at_once.num_tokens == len(prompt_ids) + len(completion_ids)


@settings(deadline=None)
@given(IDS, IDS)
def test_completion_is_counted_and_the_prompt_only_seen(
    prompt_ids: list[int], completion_ids: list[int]
) -> None:
    params = SamplingParams(repetition_penalty=1.2, max_tokens=1000)

    row = SamplingRow(params, prompt_ids=prompt_ids, completion_ids=completion_ids)

    seen = set(prompt_ids) | set(completion_ids)
    assert counts(row) == {token_id: completion_ids.count(token_id) for token_id in seen}


def test_prompt_is_not_seen_without_a_repetition_penalty() -> None:
    params = SamplingParams(presence_penalty=1)

    row = SamplingRow(params, prompt_ids=[1, 2], completion_ids=[2, 3])

    assert counts(row) == {2: 1, 3: 1}


def test_row_without_penalties_keeps_no_ids() -> None:
    row = SamplingRow(SamplingParams(), prompt_ids=[1, 2], completion_ids=[3])

    assert counts(row) == {}
    assert row.num_completion_tokens == 1


def test_what_stops_is_banned_until_min_tokens() -> None:
    params = SamplingParams(min_tokens=2, stop_token_ids=(7,))
    row = SamplingRow(params, prompt_ids=[1], eos_ids=[0])

    banned = []
    for token_id in (5, 6, 8):
        banned.append(row.has_bans)
        row.extend([token_id])

    assert row.banned_ids.tolist() == [0, 7]
    assert banned == [True, True, False]


def test_eos_that_is_ignored_is_not_banned() -> None:
    params = SamplingParams(min_tokens=2, stop_token_ids=(7,), ignore_eos=True)

    row = SamplingRow(params, prompt_ids=[1], eos_ids=[0])

    assert row.banned_ids.tolist() == [7]


@pytest.mark.parametrize(("allowed", "banned"), [((0, 7), []), ((0, 7, 8), [0, 7])])
def test_ban_that_leaves_nothing_of_the_allowed_ids_is_lifted(
    allowed: tuple[int, ...], banned: list[int]
) -> None:
    params = SamplingParams(min_tokens=2, stop_token_ids=(7,), allowed_token_ids=allowed)

    row = SamplingRow(params, prompt_ids=[1], eos_ids=[0])

    assert row.banned_ids.tolist() == banned


def test_allowed_ids_are_sorted_and_unique() -> None:
    row = SamplingRow(SamplingParams(allowed_token_ids=(5, 3, 5)), prompt_ids=[1])

    assert row.allowed_ids is not None
    assert np.array_equal(row.allowed_ids, [3, 5])
