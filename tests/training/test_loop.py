import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.training.tiny import begin, losses, make_data, metrics, text, train
from training.config import Value
from training.data import load_dataset
from training.display import LogDisplay
from training.errors import DivergedError
from training.start import start_run
from training.stop_request import StopRequest
from weights import checkpoint
from weights.layout import read_layout


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 8), (2, 4), (4, 2)])
def test_accumulated_micro_steps_equal_one_big_batch(
    data: Path, tmp_path: Path, batch: int, accumulation: int
) -> None:
    big = train(tmp_path / "big", data, batch=8)
    small = train(tmp_path / "small", data, batch=batch, accumulation=accumulation)

    assert losses(tmp_path / "small") == pytest.approx(losses(tmp_path / "big"), rel=1e-5)
    # The order of float32 sums differs; AdamW's first steps divide small gradients by their own
    # size, so that their rounding shows: an absolute tolerance of 5% of one step's length.
    for name, parameter in big.model.named_parameters():
        torch.testing.assert_close(small.model.get_parameter(name), parameter, rtol=1e-4, atol=5e-5)


def test_dropout_depends_on_step_and_micro_step_and_nothing_else(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", text(100))
    n_ctx = len(load_dataset(data).train) - 1  # a single window, the same for every step
    one = begin(tmp_path / "one", data, batch=1, n_ctx=n_ctx, dropout=0.5)
    two = begin(tmp_path / "two", data, batch=1, n_ctx=n_ctx, dropout=0.5, accumulation=2)

    losses_of_steps = [one.gradient(step)[0] for step in (0, 1, 2, 0)]

    assert len(set(losses_of_steps)) == 3
    assert losses_of_steps[3] == losses_of_steps[0]
    assert two.gradient(0)[0] != losses_of_steps[0]


def unigram_entropy(content: str) -> float:
    counts = Counter(content)
    return -sum(n / len(content) * math.log(n / len(content)) for n in counts.values())


def test_tiny_model_learns_a_repetitive_text(tmp_path: Path) -> None:
    content = "abcdefgh ijkl\n" * 120
    data = make_data(tmp_path / "data", content)

    train(tmp_path / "run", data, max_steps=80, learning_rate=1e-2, min_learning_rate=1e-3, batch=4)

    val_losses = [r["val_loss"] for r in metrics(tmp_path / "run") if "val_loss" in r]
    assert unigram_entropy(content) > 2.4
    assert val_losses[-1] < 0.3  # only where in the line a window begins is to be guessed


def test_first_loss_is_that_of_guessing(data: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", data, max_steps=1)

    guessing = math.log(load_dataset(data).tokenizer.vocab_size)
    assert losses(tmp_path / "run")[0] == pytest.approx(guessing, rel=0.05)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precisions_agree_on_the_losses(data: Path, tmp_path: Path, precision: str) -> None:
    train(tmp_path / "run", data, precision=precision)
    train(tmp_path / "reference", data)

    # bfloat16 has 8 bits; averaged over 32 tokens and two layers, well under a percent.
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "reference"), rel=5e-3)
    weights = checkpoint.load(tmp_path / "run" / "latest")
    assert weights.wte.weight.dtype == torch.float32


def test_metrics_say_what_each_step_did(data: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", data, max_steps=5, log_interval=2, eval_interval=3, accumulation=3)

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["step"], "val_loss" in r) for r in records] == [
        (2, False), (3, True), (4, False), (5, True),
    ]  # fmt: skip
    assert records[0]["tokens"] == 2 * 3 * 2 * 16
    assert set(records[0]) == {
        "step", "tokens", "loss", "learning_rate", "gradient_norm", "tokens_per_second",
        "num_skipped",
    }  # fmt: skip
    assert set(records[1]) == {"step", "tokens", "val_loss", "bits_per_byte"}


def test_gradient_is_clipped_to_its_limit(data: Path, tmp_path: Path) -> None:
    trainer = begin(tmp_path / "run", data, gradient_clip=0.01)

    _, norm = trainer.gradient(0)

    squares = sum(float(p.grad.square().sum()) for p in trainer.model.parameters()
                  if p.grad is not None)  # fmt: skip
    assert norm > 0.1
    assert math.sqrt(squares) == pytest.approx(0.01, rel=1e-3)


class Poison(LogDisplay):
    """Spoils a weight before certain steps, so that their losses are not finite, and mends it."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps
        self.notes: list[str] = []
        self.weight = torch.zeros(1)

    def advance(self, step: int) -> None:
        self.weight.data[0] = math.nan if step + 1 in self.steps else 1.0

    def note(self, message: str) -> None:
        self.notes.append(message)


def poisoned(
    run: Path, data: Path, steps: set[int], *, sample_interval: int = 0
) -> tuple[Poison, torch.nn.Module]:
    display = Poison(steps)
    settings: dict[str, Value] = {
        "n_layer": 1, "n_head": 2, "n_embd": 16, "n_ctx": 16, "batch": 2, "max_steps": 12,
        "max_skipped_steps": 3, "log_interval": 100, "checkpoint_interval": 4,
        "sample_interval": sample_interval, "precision": "float32", "device": "cpu",
    }  # fmt: skip
    trainer = start_run(run, settings, data=data, init=None, display=display, stop=StopRequest())
    display.weight = trainer.model.ln_f.weight
    trainer.train()
    return display, trainer.model


def test_step_without_a_finite_loss_is_left_out_counted_and_reported(
    data: Path, tmp_path: Path
) -> None:
    display, model = poisoned(tmp_path / "run", data, {3, 4, 8})

    skipped = [note for note in display.notes if "skipped" in note]
    assert [note.split(":")[0] for note in skipped] == [
        "step 3 skipped", "step 4 skipped", "step 8 skipped",
    ]  # fmt: skip
    records = [r for r in metrics(tmp_path / "run") if "loss" in r]
    assert [(r["step"], r["loss"], r["num_skipped"]) for r in records] == [
        (3, None, 1), (4, None, 2), (8, None, 3),
    ]  # fmt: skip
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_run_stops_when_no_loss_is_finite_any_more(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"not finite for 3 steps in a row, the last being 8"):
        poisoned(tmp_path / "run", data, {6, 7, 8})

    assert read_layout(tmp_path / "run" / "latest").config.n_layer == 1


def test_sample_of_a_model_that_is_not_finite_is_left_out_and_reported(
    data: Path, tmp_path: Path
) -> None:
    display, _ = poisoned(tmp_path / "run", data, {3, 4}, sample_interval=1)

    lines = (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert [note for note in display.notes if "no sample" in note] == [
        "step 2: no sample, the logits are not finite",
        "step 3: no sample, the logits are not finite",
    ]


def test_only_the_newest_checkpoints_and_the_best_are_kept(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, data, max_steps=9, checkpoint_interval=1, keep_checkpoints=2, eval_interval=4,
          learning_rate=1.0, min_learning_rate=1.0, warmup_steps=0)  # fmt: skip

    val_losses = {r["step"]: r["val_loss"] for r in metrics(run) if "val_loss" in r}
    best = min(val_losses, key=val_losses.__getitem__)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == sorted({f"step-{step:08}" for step in (8, 9, best)})
    assert (run / "best").resolve().name == f"step-{best:08}"
    assert (run / "latest").resolve().name == "step-00000009"


def test_samples_are_written_from_the_prompt(data: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", data, max_steps=4, sample_interval=2, sample_prompt="the ",
          sample_tokens=7)  # fmt: skip

    lines = (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    assert [sample["step"] for sample in samples] == [2, 4]
    assert all(sample["text"].startswith("the ") for sample in samples)
    assert all(len(sample["text"]) == 4 + 7 for sample in samples)
