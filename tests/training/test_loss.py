import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model.attention import CausalAttention
from model.gpt import GPT
from model.score import log_likelihood
from tests.training.tiny import metrics, train
from training.config import resolve
from training.data import TokenSplit, load_dataset
from training.loss import evaluate, next_token_loss
from weights import checkpoint


def no_autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=False)


def naive_loss(model: GPT, split: TokenSplit) -> float:
    """Mean -log p of every token but the first, one at a time, from the window it lies in."""
    ids = torch.from_numpy(split.read(0, len(split)))
    n_ctx = model.config.n_ctx
    attend = CausalAttention(model.config)
    total = 0.0
    for place in range(1, len(ids)):
        first = (place - 1) // n_ctx * n_ctx
        if first + n_ctx > len(ids) - 1:  # the last window is filled up from the left
            first = max(0, len(ids) - 1 - n_ctx)
        context = ids[first:place]
        with torch.no_grad():
            hidden = model(context, torch.arange(len(context)), attend)
            total -= float(F.log_softmax(model.logits(hidden[-1]).double(), -1)[ids[place]])
    return total / (len(ids) - 1)


@pytest.mark.parametrize("n_ctx", [16, 17, 120, 500], ids=lambda n: f"n_ctx {n}")
@pytest.mark.parametrize("batch", [1, 3])
def test_validation_loss_is_that_of_every_token_scored_once(
    data: Path, n_ctx: int, batch: int
) -> None:
    torch.manual_seed(4)
    dataset = load_dataset(data)
    vocab_size = dataset.tokenizer.vocab_size
    config = resolve([{"n_layer": 1, "n_head": 2, "n_embd": 16, "n_ctx": n_ctx}])
    model = GPT(config.model_config(vocab_size=vocab_size)).eval()

    found = evaluate(model, dataset.val, batch=batch, vocab_size=vocab_size, autocast=no_autocast)

    assert found is not None
    # float32 sums of a hundred terms against float64 ones.
    expected = naive_loss(model, dataset.val)
    assert found[0] == pytest.approx(expected, rel=1e-5)
    nats = expected * (len(dataset.val) - 1)
    assert found[1] == pytest.approx(nats / math.log(2) / dataset.val.num_bytes, rel=1e-5)


def test_validation_loss_is_what_kvik_score_says(data: Path) -> None:
    torch.manual_seed(4)
    dataset = load_dataset(data)
    config = resolve([{"n_layer": 1, "n_head": 2, "n_embd": 16, "n_ctx": 32}])
    model = GPT(config.model_config(vocab_size=64)).eval()  # padded: its last ids are no tokens
    first, *rest = dataset.val.read(0, len(dataset.val)).tolist()
    vocab_size = dataset.tokenizer.vocab_size

    found = evaluate(model, dataset.val, batch=2, vocab_size=vocab_size, autocast=no_autocast)
    total, num_scored = log_likelihood(model, rest, bos_token_id=first, vocab_size=vocab_size)

    assert found is not None
    assert found[0] == pytest.approx(-total / num_scored, rel=1e-5)


def test_recorded_validation_loss_is_that_of_the_checkpoint(data: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", data, eval_interval=3, checkpoint_interval=3, dropout=0.3)
    dataset = load_dataset(data)

    for record in metrics(tmp_path / "run"):
        if "val_loss" in record:
            saved = tmp_path / "run" / "checkpoints" / f"step-{record['step']:08}"
            expected = naive_loss(checkpoint.load(saved), dataset.val)
            assert record["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_loss_of_a_window_is_cross_entropy_of_the_next_token() -> None:
    torch.manual_seed(2)
    config = resolve([{"n_layer": 1, "n_head": 1, "n_embd": 8, "n_ctx": 6}])
    model = GPT(config.model_config(vocab_size=9)).eval()
    tokens = torch.randint(0, 9, (3, 7))
    attend = CausalAttention(model.config)
    with torch.no_grad():
        p = model.logits(model(tokens[:, :-1], torch.arange(6), attend)).softmax(-1)

    found = next_token_loss(model, tokens, attend, 9, 2)

    expected = -sum(math.log(p[b, t, tokens[b, t + 1]]) for b in range(3) for t in range(2, 6))
    assert found.item() == pytest.approx(expected, rel=1e-5)
