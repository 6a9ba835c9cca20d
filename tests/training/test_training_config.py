from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.config import (
    KEYS,
    PRESETS,
    TrainingConfig,
    format_toml,
    parse_arguments,
    parse_value,
    preset_values,
    read_toml,
    resolve,
)
from training.errors import ConfigError


def test_later_settings_win(tmp_path: Path) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text("n_embd = 64\nbatch = 3\n")
    arguments = parse_arguments(["--batch", "5", "--learning-rate=2e-3"])

    config = resolve([preset_values("nanogpt-cpu"), read_toml(toml), arguments])

    assert config.n_layer == PRESETS["nanogpt-cpu"]["n_layer"]
    assert config.n_embd == 64
    assert config.batch == 5
    assert config.learning_rate == 2e-3
    assert config.beta1 == TrainingConfig().beta1


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_config(name: str) -> None:
    config = resolve([preset_values(name)])

    assert {key: getattr(config, key) for key in PRESETS[name]} == dict(PRESETS[name])


def test_nanogpt_presets_are_nanogpts() -> None:
    char, cpu = resolve([PRESETS["nanogpt-char"]]), resolve([PRESETS["nanogpt-cpu"]])

    assert (char.n_layer, char.n_head, char.n_embd, char.n_ctx, char.batch) == (6, 6, 384, 256, 64)
    assert (char.max_steps, char.dropout, char.beta2, char.warmup_steps) == (5000, 0.2, 0.99, 100)
    assert (char.learning_rate, char.min_learning_rate) == (1e-3, 1e-4)
    assert (cpu.n_layer, cpu.n_head, cpu.n_embd, cpu.n_ctx, cpu.batch) == (4, 4, 128, 64, 12)
    assert (cpu.max_steps, cpu.dropout, cpu.activation, cpu.bias) == (2000, 0.0, "gelu", False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], "--learning_rat is no key .* did you mean learning_rate?"),
        (["--batch_size=64"], "--batch_size is no key .* what nanoGPT calls so is batch here"),
        (["--out_dir", "x"], "--out_dir is no key .* what nanoGPT calls so is --out here"),
        (["--n-layers=3"], "--n-layers is no key .* did you mean n_layer?"),
        (["--zzz", "3"], "--zzz is no key .* the keys are n_layer, "),
        (["--batch"], "--batch needs a value"),
        (["--batch", "3", "--batch", "4"], "--batch is given twice"),
        (["batch", "3"], "Expected --key value, found 'batch'"),
        (["--batch", "3.5"], "batch must be a whole number, got '3.5'"),
        (["--learning_rate", "fast"], "learning_rate must be a number, got 'fast'"),
        (["--compile", "yes"], "compile must be true or false, got 'yes'"),
    ],
)
def test_wrong_argument_is_refused_with_its_remedy(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arguments(arguments)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("batchsize = 3", "batchsize in .*run.toml is no key .* did you mean batch?"),
        ("batch = 3.0", "run.toml: batch must be a whole number, got 3.0"),
        ("batch = true", "run.toml: batch must be a whole number, got True"),
        ("device = 3", "run.toml: device must be one of auto, cpu, cuda, got 3"),
        ("batch = ", "run.toml is not valid TOML"),
        ("[model]\nn_layer = 3", "model in .*run.toml is no key"),
    ],
)
def test_wrong_toml_is_refused_with_its_remedy(tmp_path: Path, toml: str, message: str) -> None:
    (tmp_path / "run.toml").write_text(toml)

    with pytest.raises(ConfigError, match=message):
        read_toml(tmp_path / "run.toml")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch", 0, "batch must be at least 1, got 0"),
        ("n_head", 5, "n_embd must be a multiple of n_head"),
        ("dropout", 1.0, "dropout must be at least 0 and less than 1, got 1.0"),
        ("beta2", 1.0, "beta2 must be at least 0 and less than 1, got 1.0"),
        ("learning_rate", 0.0, "learning_rate must be positive, got 0.0"),
        ("learning_rate", float("nan"), "learning_rate must be positive, got nan"),
        ("min_learning_rate", 1.0, "min_learning_rate must lie between 0 and learning_rate 0.001"),
        ("weight_decay", -0.1, "weight_decay must be 0 or more, got -0.1"),
        ("seed", 2**63, "seed must be less than"),
        ("optimizer", "sgd", "optimizer must be one of adamw, muon, got 'sgd'"),
        ("precision", "float16", "precision must be one of auto, float32, bfloat16"),
        ("activation", "swish", "activation must be one of gelu_new, gelu, relu"),
    ],
)
def test_impossible_value_is_refused_by_name(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve([{key: value}])  # type: ignore[dict-item]


def test_unknown_preset_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="no preset 'gpt3'; there are storyteller, "):
        preset_values("gpt3")


@given(
    prompt=st.text(st.characters(exclude_categories=["Cs"])),
    learning_rate=st.floats(1e-12, 1e3),
    is_biased=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
def test_frozen_config_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    prompt: str,
    learning_rate: float,
    is_biased: bool,
    seed: int,
) -> None:
    path = tmp_path_factory.mktemp("frozen") / "config.toml"
    config = TrainingConfig(
        sample_prompt=prompt,
        learning_rate=learning_rate,
        min_learning_rate=0.0,
        bias=is_biased,
        seed=seed,
    )

    path.write_text(format_toml(config), encoding="utf-8")

    assert resolve([read_toml(path)]) == config


def test_every_key_is_read_from_text() -> None:
    config = TrainingConfig()

    for key in KEYS:
        assert parse_value(key, str(getattr(config, key)).lower()) == getattr(config, key)
