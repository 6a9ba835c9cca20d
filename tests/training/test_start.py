from pathlib import Path

import pytest
import torch

from tests.training.tiny import begin, make_data, metrics, resume, train
from training.config import Value
from training.display import LogDisplay
from training.errors import ConfigError, DataError
from training.start import start_run
from training.stop_request import StopRequest
from weights import checkpoint


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
