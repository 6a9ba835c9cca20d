import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model.attention import CausalAttention
from model.gpt import GPT
from model.score import log_likelihood
from tests.training.tiny import begin, losses, make_data, metrics, resume, text, train
from training.config import PRESETS, Value, resolve
from training.data import TokenSplit, load_dataset
from training.display import LogDisplay
from training.errors import ConfigError, DataError, DivergedError
from training.loss import evaluate, next_token_loss
from training.machine import resolve_machine
from training.start import start_run
from training.stop_request import StopRequest
from weights import checkpoint
from weights.layout import read_layout


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


def test_finetuning_starts_from_the_checkpoints_weights(data: Path, tmp_path: Path) -> None:
    train(tmp_path / "first", data, max_steps=60, learning_rate=3e-3, bias=False)
    init = tmp_path / "first" / "best"

    again = start_run(
        tmp_path / "second",
        {"max_steps": 5, "learning_rate": 1e-4, "warmup_steps": 1, "eval_interval": 1,
         "batch": 4, "log_interval": 1, "dropout": 0.1, "sample_interval": 0},
        data=data,
        init=init,
        display=LogDisplay(),
        stop=StopRequest(),
    )  # fmt: skip

    for name, parameter in checkpoint.load(init).named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter)
    assert again.config.n_layer == 2
    assert not again.config.bias
    assert again.model.config.dropout == 0.1
    again.train()
    first = [r["val_loss"] for r in metrics(tmp_path / "first") if "val_loss" in r]
    second = [r["val_loss"] for r in metrics(tmp_path / "second") if "val_loss" in r]
    assert second[0] < first[-1] + 0.02


def test_finetuning_refuses_a_shape_that_is_not_the_checkpoints(data: Path, tmp_path: Path) -> None:
    train(tmp_path / "first", data, max_steps=1)

    with pytest.raises(ConfigError, match=r"n_layer is 2 in .*best and 3 in the settings"):
        begin(tmp_path / "second", data, init=tmp_path / "first" / "best", n_layer=3)

    assert not (tmp_path / "second").exists()


def test_finetuning_refuses_data_of_another_tokenizer(data: Path, tmp_path: Path) -> None:
    train(tmp_path / "first", data, max_steps=1)
    other = make_data(tmp_path / "other", "xyz\n" * 100)

    with pytest.raises(ConfigError, match=r"is not the data's .*--tokenizer-dir"):
        begin(tmp_path / "second", other, init=tmp_path / "first" / "best")


def test_finetuning_killed_before_its_first_checkpoint_starts_from_it_again(
    data: Path, tmp_path: Path
) -> None:
    from_this = train(tmp_path / "first", data, max_steps=3)
    begin(tmp_path / "second", data, init=tmp_path / "first" / "best")  # and never trained

    resumed = resume(tmp_path / "second")

    assert resumed.state.step == 0
    assert torch.equal(resumed.model.wte.weight, from_this.model.wte.weight)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"n_ctx": 5000}, DataError, r"has \d+ tokens; n_ctx 5000 needs one more"),
        ({"sample_prompt": "Q?"}, ConfigError, r"sample_prompt cannot be used: .*'Q'"),
        ({"sample_prompt": "the " * 9}, ConfigError, r"sample_prompt has 36 tokens.*n_ctx 16"),
    ],
)
def test_what_cannot_run_is_refused_before_a_directory_is_made(
    data: Path, tmp_path: Path, settings: dict[str, Value], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        begin(tmp_path / "run", data, settings)

    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_absent_device_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no CUDA device is available here; use cpu"):
        begin(tmp_path / "run", data, device="cuda")


@pytest.mark.parametrize("name", PRESETS)
def test_machine_of_every_preset_is_decided(name: str) -> None:
    config = resolve_machine(resolve([PRESETS[name]]))

    assert config.device in ("cpu", "cuda")
    assert config.precision in ("float32", "bfloat16")


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
