"""What a run leaves behind is a checkpoint for others."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvik.command_line import app
from model.attention import CausalAttention
from tests.training.tiny import make_data, text, train
from weights import checkpoint

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=["gelu_new, biases", "gelu, no biases"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("export")
    data = make_data(directory / "data", text(4000), tokenizer="bpe:280")
    is_plain = request.param.startswith("gelu_new")
    train(
        directory / "run",
        data,
        max_steps=20,
        learning_rate=1e-2,
        bias=is_plain,
        activation="gelu_new" if is_plain else "gelu",
    )
    return directory / "run"


def test_best_checkpoint_loads_in_transformers_with_equal_logits(run: Path) -> None:
    ours = checkpoint.load(run / "best")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(run / "best").eval()
    tokens = torch.randint(0, 280, (2, 16), generator=torch.Generator().manual_seed(1))

    with torch.no_grad():
        expected = theirs(tokens).logits
        found = ours.logits(ours(tokens, torch.arange(16), CausalAttention(ours.config)))

    # Two float32 implementations; logits of a trained model reach 10.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert expected.abs().max() > 1


def test_best_checkpoint_brings_its_tokenizer(run: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "best")

    assert tokenizer.vocab_size == 280
    assert tokenizer.eos_token_id == 279


def test_best_checkpoint_continues_a_prompt_on_the_command_line(run: Path) -> None:
    command = ["generate", "the dragon", "--model", str(run / "best"), "--max-tokens", "5"]

    result = CliRunner().invoke(app, command)

    assert result.exit_code == 0, result.output
    assert result.output.startswith("the dragon")


def test_best_checkpoint_converts_to_bfloat16_for_shipping(run: Path, tmp_path: Path) -> None:
    command = ["convert", str(run / "best"), str(tmp_path / "small"), "--dtype", "bfloat16"]

    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, command)

    assert result.exit_code == 0, result.output
    assert checkpoint.load(tmp_path / "small").wte.weight.dtype == torch.bfloat16
    assert not (tmp_path / "small" / "optimizer.safetensors").exists()
