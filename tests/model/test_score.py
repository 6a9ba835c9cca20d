import math

import pytest
import torch

from model.attention import CausalAttention
from model.gpt import GPT
from model.score import Score, log_likelihood, score
from model.tokenizer import BytePairTokenizer, CharacterTokenizer
from tests.tiny_models import random_tokens, tiny_config, tiny_gpt

VOCAB_SIZE = 270  # of the 280 rows; the rest is padding
BOS = 267


def rolling_log_likelihood(model: GPT, tokens: list[int], bos: int | None) -> float:
    """The rolling log-likelihood of EleutherAI's lm-evaluation-harness, one token at a time.

    Its rule, from `get_rolling_token_windows` with a context of one token and
    `make_disjoint_window`: windows of n_ctx predictions follow each other; each sees the token
    before it; the last one reaches back until it sees n_ctx tokens in all.
    """
    n_ctx = model.config.n_ctx
    stream = tokens if bos is None else [bos, *tokens]
    total = 0.0
    for place in range(1, len(stream)):
        window = (place - 1) // n_ctx
        is_last = window == (len(stream) - 2) // n_ctx
        begin = max(0, len(stream) - 1 - n_ctx) if is_last else window * n_ctx
        seen = torch.tensor(stream[begin:place])
        with torch.inference_mode():
            hidden = model(seen, torch.arange(len(seen)), CausalAttention(model.config))[-1]
            logits = hidden @ model.wte.weight[:VOCAB_SIZE].T
        total += float(logits.log_softmax(-1)[stream[place]])
    return total


# Around the ends of one, two and three windows of 8.
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 20, 24, 25])
@pytest.mark.parametrize("bos", [BOS, None])
def test_a_text_of_any_length_scores_as_the_harness_would(length: int, bos: int | None) -> None:
    if bos is None:
        length += 1
    model = tiny_gpt(tiny_config(n_ctx=8))
    tokens = (random_tokens(model.config, length, seed=length) % VOCAB_SIZE).tolist()

    total, num_scored = log_likelihood(model, tokens, bos_token_id=bos, vocab_size=VOCAB_SIZE)

    assert num_scored == (length if bos is not None else length - 1)
    assert total == pytest.approx(rolling_log_likelihood(model, tokens, bos), abs=1e-3)


@pytest.mark.parametrize(("tokens", "bos"), [([], None), ([5], None), ([], BOS)])
def test_a_text_without_a_token_to_score_is_refused(
    model: GPT, tokens: list[int], bos: int | None
) -> None:
    with pytest.raises(ValueError, match="The text is too short: there is no token to score"):
        log_likelihood(model, tokens, bos_token_id=bos, vocab_size=VOCAB_SIZE)


def test_progress_adds_up_to_the_tokens_scored(model: GPT) -> None:
    heard: list[int] = []
    tokens = random_tokens(model.config, 41).tolist()

    _, num_scored = log_likelihood(
        model, tokens, bos_token_id=BOS, vocab_size=280, advance=heard.append
    )

    assert heard == [16, 16, 9]
    assert sum(heard) == num_scored


def test_padding_takes_no_part_in_the_normalisation(model: GPT) -> None:
    tokens = (random_tokens(model.config, 12) % VOCAB_SIZE).tolist()

    narrow, _ = log_likelihood(model, tokens, bos_token_id=BOS, vocab_size=VOCAB_SIZE)
    wide, _ = log_likelihood(model, tokens, bos_token_id=BOS, vocab_size=280)

    assert narrow > wide


def test_a_score_is_told_in_the_units_of_its_tokens_and_of_its_bytes() -> None:
    found = Score(log_likelihood=-6 * math.log(2), num_scored=3, num_bytes=12)

    assert found.loss == pytest.approx(2 * math.log(2))
    assert found.perplexity == pytest.approx(4)
    assert found.bits_per_byte == pytest.approx(0.5)


def test_a_hopeless_score_still_has_a_perplexity() -> None:
    assert math.isfinite(Score(log_likelihood=-1e9, num_scored=1, num_bytes=1).perplexity)


def test_the_bytes_of_a_score_are_those_of_the_text(
    model: GPT, tokenizer: BytePairTokenizer
) -> None:
    text = "The then, café!"

    found = score(model, tokenizer, tokenizer.encode(text), bos_token_id=BOS)

    assert found.num_bytes == len(text.encode())


def test_the_bytes_of_a_token_that_is_only_context_do_not_count() -> None:
    tokenizer = CharacterTokenizer("abé")

    found = score(
        tiny_gpt(tiny_config(vocab_size=3)), tokenizer, tokenizer.encode("éab"), bos_token_id=None
    )

    assert (found.num_scored, found.num_bytes) == (2, 2)
