"""What a training run is, as numbers and names; no torch, no files but the TOML it is read from."""

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from model.config import Activation, GPTConfig
from training.errors import ConfigError

Optimizer = Literal["adamw", "muon"]
Schedule = Literal["cosine"]
Precision = Literal["auto", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]
Value = bool | int | float | str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """One training run. Raises ValueError, naming field, value and remedy.

    Two runs with equal configs on the same data, machine and number of threads are the same run.
    """

    # The model; `vocab_size` is the tokenizer's.
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    n_ctx: int = 256  # tokens a sequence
    bias: bool = True
    activation: Activation = "gelu_new"
    dropout: float = 0.0  # embeddings and residual branches
    attention_dropout: float = 0.0  # attention weights; on a CPU it halves the speed of a step

    # The steps: one step sees batch * accumulation sequences of n_ctx tokens.
    batch: int = 16  # sequences a micro-step
    accumulation: int = 1  # micro-steps a step
    max_steps: int = 2000
    seed: int = 1337  # of weights, order of the data and dropout

    # The optimizer: AdamW (Loshchilov and Hutter, 2017, arXiv:1711.05101) for all parameters, or
    # Muon (Jordan, 2024) for the matrices of the blocks beside AdamW for the rest.
    optimizer: Optimizer = "adamw"
    learning_rate: float = 1e-3  # at the end of the warmup
    min_learning_rate: float = 1e-4  # at max_steps
    warmup_steps: int = 100
    schedule: Schedule = "cosine"
    weight_decay: float = 0.1  # of matrices; vectors are not decayed
    beta1: float = 0.9  # AdamW's, as the next
    beta2: float = 0.99
    gradient_clip: float = 1.0  # largest norm of the gradient; 0: no limit
    max_skipped_steps: int = 5  # steps in a row with a loss that is not finite, then stop

    # What is watched and kept; none of it changes the weights.
    log_interval: int = 10  # steps
    eval_interval: int = 250  # steps
    checkpoint_interval: int = 500  # steps; every best one is saved as well
    keep_checkpoints: int = 2  # newest ones kept beside the best
    sample_interval: int = 500  # steps; 0: never
    sample_prompt: str = ""  # empty: the tokenizer's bos, else its id 0
    sample_tokens: int = 64

    # The machine.
    device: Device = "auto"
    precision: Precision = "auto"  # of the arithmetic; the weights are always float32
    compile: bool = False  # torch.compile

    def __post_init__(self) -> None:
        for name in (
            "batch",
            "accumulation",
            "max_steps",
            "max_skipped_steps",
            "log_interval",
            "eval_interval",
            "checkpoint_interval",
            "keep_checkpoints",
            "sample_tokens",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "gradient_clip", "sample_interval", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("attention_dropout", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and less than 1, got {getattr(self, name)}"
                )
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(
                f"min_learning_rate must lie between 0 and learning_rate {self.learning_rate}, "
                f"got {self.min_learning_rate}"
            )
        if self.seed >= 2**63:
            raise ValueError(f"seed must be less than 2**63, got {self.seed}")
        for name, kind in (
            ("optimizer", Optimizer),
            ("schedule", Schedule),
            ("precision", Precision),
            ("device", Device),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(kind))}, "
                    f"got {getattr(self, name)!r}"
                )
        self.model_config(vocab_size=1)  # GPTConfig checks the shape

    def model_config(self, *, vocab_size: int) -> GPTConfig:
        """The model this run trains from scratch."""
        return GPTConfig(
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
            n_ctx=self.n_ctx,
            vocab_size=vocab_size,
            activation=self.activation,
            bias=self.bias,
            dropout=self.dropout,
        )

    @property
    def sequences_per_step(self) -> int:
        """Sequences whose gradients make one step."""
        return self.batch * self.accumulation

    @property
    def tokens_per_step(self) -> int:
        """Tokens predicted in one step."""
        return self.sequences_per_step * self.n_ctx


KEYS = tuple(field.name for field in dataclasses.fields(TrainingConfig))

# What a checkpoint decides when training goes on from it.
SHAPE_KEYS = ("n_layer", "n_head", "n_embd", "n_ctx", "bias", "activation")

# What may change when a run is resumed. max_steps stretches the schedule from there on.
RESUMABLE_KEYS = (
    "max_steps",
    "log_interval",
    "eval_interval",
    "checkpoint_interval",
    "keep_checkpoints",
    "sample_interval",
    "sample_prompt",
    "sample_tokens",
    "max_skipped_steps",
    "compile",  # sums in another order, so no longer bit for bit
)

# What nanoGPT calls them, whose users come with its names in their fingers.
NANOGPT_NAMES: Mapping[str, str] = {
    "block_size": "n_ctx",
    "batch_size": "batch",
    "gradient_accumulation_steps": "accumulation",
    "max_iters": "max_steps",
    "lr_decay_iters": "max_steps",
    "min_lr": "min_learning_rate",
    "warmup_iters": "warmup_steps",
    "grad_clip": "gradient_clip",
    "dataset": "--data",
    "out_dir": "--out",
    "init_from": "--init or --resume",
    "dtype": "precision",
    "always_save_checkpoint": "checkpoint_interval with keep_checkpoints",
}

PRESETS: Mapping[str, Mapping[str, Value]] = {
    # The model that ships with Kvik: an hour on two CPU cores with bfloat16.
    "storyteller": {
        "n_layer": 6,
        "n_head": 4,
        "n_embd": 256,
        "n_ctx": 512,
        "dropout": 0.15,
        "batch": 8,
        "max_steps": 4000,
        "optimizer": "muon",
        "learning_rate": 4e-3,
        "min_learning_rate": 1e-4,
        "warmup_steps": 100,
        "sample_prompt": "Once upon a time",
    },
    # nanoGPT's shakespeare_char as its README shrinks it for a CPU.
    "nanogpt-cpu": {
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 128,
        "n_ctx": 64,
        "bias": False,
        "activation": "gelu",
        "batch": 12,
        "max_steps": 2000,
    },
    # nanoGPT's config/train_shakespeare_char.py.
    "nanogpt-char": {
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
        "n_ctx": 256,
        "bias": False,
        "activation": "gelu",
        "dropout": 0.2,
        "attention_dropout": 0.2,
        "batch": 64,
        "max_steps": 5000,
    },
    # GPT-2 124M by nanoGPT's config/train_gpt2.py: 491,520 tokens a step, on one device here.
    "gpt2": {
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "n_ctx": 1024,
        "batch": 12,
        "accumulation": 40,
        "max_steps": 600_000,
        "learning_rate": 6e-4,
        "min_learning_rate": 6e-5,
        "warmup_steps": 2000,
        "beta2": 0.95,
        "eval_interval": 1000,
        "checkpoint_interval": 1000,
        "sample_interval": 1000,
    },
}


def parse_arguments(arguments: Sequence[str]) -> dict[str, Value]:
    """Read `--key value` and `--key=value` pairs of a command line; raises ConfigError."""
    values: dict[str, Value] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise ConfigError(f"Expected --key value, found {argument!r}.")
        name, equals, text = argument[2:].partition("=")
        key = check_key(name.replace("-", "_"), shown=f"--{name}")
        if not equals:
            if not rest:
                raise ConfigError(f"--{name} needs a value.")
            text = rest.pop(0)
        if key in values:
            raise ConfigError(f"--{name} is given twice.")
        values[key] = parse_value(key, text)
    return values


def parse_value(key: str, text: str) -> Value:
    """Read the value of a known key from text; raises ConfigError."""
    kind = get_type_hints(TrainingConfig)[key]
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is int:
            return int(text.replace("_", ""))
        if kind is float:
            return float(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{key} must be {_expected(kind)}, got {text!r}.") from None
    return text


def read_toml(path: Path) -> dict[str, Value]:
    """Read training keys from a TOML file; raises ConfigError, naming file and key."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error
    hints = get_type_hints(TrainingConfig)
    values: dict[str, Value] = {}
    for name, value in document.items():
        key = check_key(name, shown=f"{name} in {path}")
        kind = hints[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not (str if get_origin(kind) is Literal else kind):
            raise ConfigError(f"{path}: {key} must be {_expected(kind)}, got {value!r}.")
        values[key] = value
    return values


def check_key(key: str, *, shown: str) -> str:
    """Return a key that exists; raises ConfigError, suggesting the nearest one."""
    if key in KEYS:
        return key
    if key in NANOGPT_NAMES:
        raise ConfigError(
            f"{shown} is no key of a training run; what nanoGPT calls so is {NANOGPT_NAMES[key]} "
            "here."
        )
    near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.7)
    remedy = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(KEYS)}."
    remedy += " docs/training.md explains them."
    raise ConfigError(f"{shown} is no key of a training run; {remedy}")


def preset_values(name: str | None) -> Mapping[str, Value]:
    """The keys a preset sets, none without a name; raises ConfigError for one that is unknown."""
    if name is None:
        return {}
    if name not in PRESETS:
        raise ConfigError(f"There is no preset {name!r}; there are {', '.join(PRESETS)}.")
    return PRESETS[name]


def resolve(layers: Iterable[Mapping[str, Value]]) -> TrainingConfig:
    """Lay settings over the defaults, later ones first in rank; raises ConfigError."""
    values: dict[str, Any] = {}
    for layer in layers:
        values |= layer
    try:
        return TrainingConfig(**values)
    except ValueError as error:
        raise ConfigError(f"{error}.") from error


def format_toml(config: TrainingConfig) -> str:
    """The config as a TOML file that `read_toml` reads back to the same config."""
    lines = []
    for key in KEYS:
        # JSON's true, numbers and strings are TOML's too, but for a bare U+007F.
        value = json.dumps(getattr(config, key), ensure_ascii=False).replace("\x7f", "\\u007f")
        lines.append(f"{key} = {value}")
    return "\n".join(lines) + "\n"


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
