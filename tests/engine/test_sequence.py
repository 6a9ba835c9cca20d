import pytest

from engine.errors import PromptTooLong
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence


def make_sequence(
    *,
    num_prompt_tokens: int = 3,
    num_delivered: int = 0,
    choice: int = 0,
    priority: int = 0,
    seq_id: int = 0,
    params: SamplingParams | None = None,
) -> Sequence:
    return Sequence(
        seq_id=seq_id,
        request_id="r",
        prompt_ids=range(num_prompt_tokens),
        completion_ids=range(100, 100 + num_delivered),
        params=params or SamplingParams(max_tokens=4),
        n_ctx=8,
        choice=choice,
        priority=priority,
    )


def test_a_new_sequence_waits_with_nothing_computed() -> None:
    sequence = make_sequence()

    assert sequence.state == "waiting"
    assert not sequence.is_finished
    assert sequence.num_computed_tokens == 0
    assert sequence.token_ids == [0, 1, 2]


def test_delivered_tokens_are_completion_and_leave_the_prompt_as_it_was() -> None:
    fresh, resumed = make_sequence(), make_sequence(num_delivered=2)

    assert resumed.num_prompt_tokens == fresh.num_prompt_tokens == 3
    assert resumed.max_num_tokens == fresh.max_num_tokens == 7
    assert resumed.completion_ids == [100, 101]
    assert resumed.num_completion_tokens == 2
    assert resumed.num_tokens == 5


def test_drawing_ends_at_the_context() -> None:
    assert make_sequence(num_prompt_tokens=6).max_num_tokens == 8


def test_a_prompt_may_fill_the_context_but_not_exceed_it() -> None:
    assert make_sequence(num_prompt_tokens=8).max_num_tokens == 8

    with pytest.raises(PromptTooLong, match=r"^The prompt has 9 tokens; this model's context is 8"):
        make_sequence(num_prompt_tokens=9)


def test_a_sequence_takes_its_own_copy_of_the_ids() -> None:
    prompt_ids = [1, 2]
    sequence = Sequence(
        seq_id=0, request_id="r", prompt_ids=prompt_ids, params=SamplingParams(), n_ctx=8
    )

    sequence.token_ids.append(3)

    assert prompt_ids == [1, 2]


def test_smaller_priority_goes_first_and_then_arrival() -> None:
    late_but_urgent = make_sequence(seq_id=9, priority=-1)
    first, second = make_sequence(seq_id=1), make_sequence(seq_id=2)

    assert sorted([s.order for s in (second, first, late_but_urgent)]) == [
        late_but_urgent.order,
        first.order,
        second.order,
    ]


def test_prompt_logprobs_are_wanted_once_for_all_choices_and_until_the_first_draw() -> None:
    params = SamplingParams(max_tokens=4, prompt_logprobs=0)

    assert make_sequence(params=params).wants_prompt_logprobs
    assert not make_sequence(params=params, choice=1).wants_prompt_logprobs
    assert not make_sequence(params=params, num_delivered=1).wants_prompt_logprobs
    assert not make_sequence().wants_prompt_logprobs
