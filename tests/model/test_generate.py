import itertools
import math

import pytest
import torch
from torch import Tensor

from model.attention import CausalAttention
from model.generate import generate, greedy, sample
from model.gpt import GPT
from tests.tiny_models import tiny_config, tiny_gpt

PROMPT = [5, 260, 7]


def next_logits(model: GPT, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        x = torch.tensor([tokens])
        hidden = model(x, torch.arange(len(tokens))[None], CausalAttention(model.config))
        return model.logits(hidden)[0, -1]


def test_greedy_continuation_takes_the_most_probable_token_each_time(model: GPT) -> None:
    tokens = list(PROMPT)
    for _ in range(6):
        tokens.append(int(next_logits(model, tokens).argmax()))

    continuation = list(generate(model, PROMPT, 6))

    assert continuation == tokens[3:]


def test_the_prompt_is_left_as_it_was(model: GPT) -> None:
    prompt = list(PROMPT)

    list(generate(model, prompt, 4))

    assert prompt == PROMPT


def test_generation_ends_when_the_context_is_full(model: GPT) -> None:
    continuation = list(generate(model, PROMPT, 1000))

    assert len(continuation) == model.config.n_ctx - len(PROMPT)


def test_a_prompt_that_fills_the_context_is_not_continued(model: GPT) -> None:
    assert list(generate(model, [1] * model.config.n_ctx, 5)) == []


@pytest.mark.parametrize("length", [0, 17])
def test_a_prompt_that_is_empty_or_too_long_is_refused(model: GPT, length: int) -> None:
    message = rf"The prompt has {length} tokens; this model takes 1 to 16\."

    with pytest.raises(ValueError, match=message):
        list(generate(model, [1] * length, 5))


def test_generation_ends_after_a_stop_token(model: GPT) -> None:
    whole = list(generate(model, PROMPT, 10))
    stop = whole[4]

    cut = list(generate(model, PROMPT, 10, stop_token_ids=[stop]))

    assert cut == whole[: whole.index(stop) + 1]


def test_padding_ids_are_never_chosen(model: GPT) -> None:
    continuations = [
        list(generate(model, PROMPT, 13, vocab_size=8, choose=choose))
        for choose in (greedy, sample(2.0, seed=0), sample(2.0, seed=0, top_k=5))
    ]

    assert all(token_id < 8 for token_id in itertools.chain(*continuations))


def test_the_padding_of_the_vocabulary_does_not_change_what_is_chosen() -> None:
    padded = tiny_gpt(tiny_config(vocab_size=300))
    cut = tiny_gpt(tiny_config(vocab_size=300))
    cut.wte.weight = torch.nn.Parameter(cut.wte.weight[:270].detach().clone())

    tokens = [list(generate(model, PROMPT, 9, vocab_size=270)) for model in (padded, cut)]

    assert tokens[0] == tokens[1]


def test_nothing_outside_runs_in_inference_mode_between_two_tokens(model: GPT) -> None:
    continuation = generate(model, PROMPT, 3)

    next(continuation)

    assert not torch.is_inference_mode_enabled()


def test_the_same_seed_gives_the_same_tokens(model: GPT) -> None:
    first, again, other = (
        list(generate(model, PROMPT, 13, choose=sample(1.5, seed=seed))) for seed in (7, 7, 8)
    )

    assert first == again
    assert first != other


def test_one_candidate_is_greedy(model: GPT) -> None:
    continuation = list(generate(model, PROMPT, 9, choose=sample(2.0, seed=0, top_k=1)))

    assert continuation == list(generate(model, PROMPT, 9))


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-40, 1e-8])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits = torch.tensor([-101.0, -99.5, -99.4, -180.0])

    assert sample(temperature, seed=1)(logits) == 2


@pytest.mark.parametrize("temperature", [-1, math.nan, math.inf])
def test_an_impossible_temperature_is_refused(temperature: float) -> None:
    message = f"temperature must be at least 0 and finite, got {temperature}"

    with pytest.raises(ValueError, match=message):
        sample(temperature, seed=0)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (1.0, 2), (1.0, 99)])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature: float, top_k: int) -> None:
    logits = torch.tensor([1.0, 2.0, 0.0, -3.0])
    expected = torch.softmax(logits / temperature, dim=-1)
    if top_k == 2:
        expected[2:] = 0
        expected /= expected.sum()
    choose = sample(temperature, seed=0, top_k=top_k)

    drawn = torch.tensor([choose(logits) for _ in range(4000)]).bincount(minlength=4)

    # Four deviations of a share near 1/2 among 4000.
    torch.testing.assert_close(drawn / 4000, expected, rtol=0, atol=4 * 0.5 / math.sqrt(4000))


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    assert greedy(torch.tensor([0.0, 3.0, 3.0])) == 1
