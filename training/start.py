"""From settings, data and checkpoints to a trainer at its first or next step; makes no step."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from model.gpt import GPT
from training.checkpointing import RunDirectory, RunFacts, TrainingState, copy_weights
from training.config import KEYS, RESUMABLE_KEYS, SHAPE_KEYS, TrainingConfig, Value, resolve
from training.data import Dataset, load_dataset
from training.display import Display
from training.errors import ConfigError, DataError, RunError
from training.loop import Trainer, encode_sample_prompt
from training.machine import resolve_machine
from training.optimizer import make_optimizer
from training.randomness import WEIGHTS, random_bits
from training.stop_request import StopRequest
from weights import checkpoint
from weights.errors import CheckpointError
from weights.layout import read_layout, read_tokenizer


def start_run(
    path: Path,
    settings: Mapping[str, Value],
    *,
    data: Path,
    init: Path | None,
    display: Display,
    stop: StopRequest,
) -> Trainer:
    """Make a run directory and a trainer at step 0.

    Args:
        path: the run directory, which must not exist yet.
        settings: keys of TrainingConfig; the resolved config is frozen into the run directory.
        data: a directory that `kvik prepare` made.
        init: a checkpoint to start from instead of random weights; it decides the SHAPE_KEYS.
        display: hears of the progress.
        stop: asked between steps.

    Raises:
        ConfigError, DataError, RunError: then nothing was made.
    """
    dataset = load_dataset(data)
    if init is not None:
        settings = {**settings, **_shape(init, settings)}
    config = resolve_machine(resolve([settings]))
    _check_fits(config, dataset)
    try:
        model = _make_model(config, dataset, init)
    except CheckpointError as error:
        raise ConfigError(f"The run cannot start from {init}: {error}") from error
    facts = RunFacts(
        data=str(data), data_sha256=dataset.fingerprint, init=None if init is None else str(init)
    )
    return Trainer(
        config,
        dataset=dataset,
        run=RunDirectory.create(path, config, facts),
        model=model,
        optimizer=make_optimizer(model, config),
        state=TrainingState(),
        display=display,
        stop=stop,
    )


def resume_run(
    path: Path,
    settings: Mapping[str, Value],
    *,
    data: Path | None,
    display: Display,
    stop: StopRequest,
) -> Trainer:
    """Make a trainer that goes on from a run's newest checkpoint.

    Args:
        path: the run directory.
        settings: keys to change, of RESUMABLE_KEYS; others may be repeated as they were.
        data: where the data lies now; None is where it lay.
        display: hears of the progress.
        stop: asked between steps.

    Raises:
        ConfigError, DataError, RunError: then nothing was changed.
    """
    run = RunDirectory(path)
    frozen, facts = run.read()
    config = resolve([{key: getattr(frozen, key) for key in KEYS}, _changes(frozen, settings)])
    if config.device == "cuda" and not torch.cuda.is_available():
        raise RunError(
            f"{path} is trained on cuda, and no CUDA device is available here. Another device is "
            f"another run: begin it with --init {path / 'latest'}."
        )
    if data is None and not os.path.lexists(facts.data):
        raise DataError(
            f"{path} was started on the data in {facts.data}, which is not there; say with --data "
            "where it lies now."
        )
    dataset = load_dataset(Path(facts.data) if data is None else data)
    if dataset.fingerprint != facts.data_sha256:
        raise RunError(
            f"{dataset.directory} is not the data {path} was started on: data.json has sha256 "
            f"{dataset.fingerprint}, expected {facts.data_sha256}. Begin a new run with --init "
            f"{path / 'latest'} instead."
        )
    config = resolve_machine(config)
    _check_fits(config, dataset)
    newest = run.newest()
    source = Path(facts.init) if newest is None and facts.init is not None else newest
    try:
        model = _make_model(config, dataset, source)
    except CheckpointError as error:
        raise RunError(
            f"{path} cannot be resumed from {source}: {error} Remove it to resume from the "
            "checkpoint before it."
        ) from error
    optimizer = make_optimizer(model, config)
    state = TrainingState()
    if newest is not None:
        state, num_threads = run.load(newest, model, optimizer)
        if num_threads != torch.get_num_threads():
            display.note(
                f"the run used {num_threads} threads and has {torch.get_num_threads()} now: it "
                "goes on equally well, but not bit for bit"
            )
    if config.max_steps < state.step:
        raise ConfigError(
            f"max_steps must be at least {state.step}, which {path} has reached, got "
            f"{config.max_steps}."
        )
    return Trainer(
        config,
        dataset=dataset,
        run=run,
        model=model,
        optimizer=optimizer,
        state=state,
        display=display,
        stop=stop,
    )


def _make_model(config: TrainingConfig, dataset: Dataset, source: Path | None) -> GPT:
    """A model in training mode, float32, new or with a checkpoint's weights.

    Raises CheckpointError.
    """
    tokenizer = dataset.tokenizer
    if source is None:
        torch.manual_seed(random_bits(config.seed, WEIGHTS))
        return GPT(config.model_config(vocab_size=tokenizer.vocab_size)).to(config.device)
    layout = read_layout(source)
    known = read_tokenizer(layout)
    if known.fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"its tokenizer ({known.kind}, {known.vocab_size} ids) is not the data's "
            f"({tokenizer.kind}, {tokenizer.vocab_size} ids). Prepare the data with "
            f"--tokenizer-dir {source}."
        )
    model = GPT(dataclasses.replace(layout.config, dropout=config.dropout))
    copy_weights(checkpoint.load(source, dtype=torch.float32), model)
    return model.to(config.device)


def _shape(init: Path, settings: Mapping[str, Value]) -> dict[str, Value]:
    """The SHAPE_KEYS of a checkpoint; raises ConfigError if the settings say otherwise."""
    try:
        found = read_layout(init).config
    except CheckpointError as error:
        raise ConfigError(f"The run cannot start from {init}: {error}") from error
    shape: dict[str, Value] = {key: getattr(found, key) for key in SHAPE_KEYS}
    for key, value in shape.items():
        if settings.get(key, value) != value:
            raise ConfigError(
                f"{key} is {value} in {init} and {settings[key]} in the settings; leave out the "
                "preset or the key, the checkpoint decides."
            )
    return shape


def _changes(frozen: TrainingConfig, settings: Mapping[str, Value]) -> dict[str, Value]:
    """What a resumed run may take from new settings; raises ConfigError for the rest."""
    changes = {}
    for key, value in settings.items():
        if key in RESUMABLE_KEYS:
            changes[key] = value
        elif value != getattr(frozen, key) and value != "auto":
            raise ConfigError(
                f"{key} is {getattr(frozen, key)} in this run and cannot become {value} on the "
                f"way; what may change is {', '.join(RESUMABLE_KEYS)}."
            )
    return changes


def _check_fits(config: TrainingConfig, dataset: Dataset) -> None:
    """Check that windows can be had and the sample's prompt be read; raises Config-, DataError."""
    if len(dataset.train) <= config.n_ctx:
        raise DataError(
            f"The training split has {len(dataset.train)} tokens; n_ctx {config.n_ctx} needs one "
            "more than that many at least. Give more text or a smaller n_ctx."
        )
    if len(dataset.val) < 2:
        raise DataError("The validation split has a single token; give it more text.")
    num_tokens = len(encode_sample_prompt(config, dataset))
    if num_tokens >= config.n_ctx:
        raise ConfigError(
            f"sample_prompt has {num_tokens} tokens; it must leave room in n_ctx {config.n_ctx}."
        )
