"""The training loop: batches in, steps, and now and then an evaluation, a sample, a checkpoint.

Every random choice is a pure function of the seed and the step, so stopping and resuming need
weights, optimizer and counters alone, and looking (evaluation, samples) changes nothing.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from model.attention import CausalAttention
from model.generate import generate, sample
from model.gpt import GPT
from model.vocabulary import TokenizerError
from training.checkpointing import RunDirectory, RunFacts, TrainingState, copy_weights
from training.config import KEYS, RESUMABLE_KEYS, SHAPE_KEYS, TrainingConfig, Value, resolve
from training.data import Dataset, load_dataset, window_starts
from training.display import Display
from training.errors import ConfigError, DataError, DivergedError, RunError
from training.loss import evaluate, next_token_loss, read_windows
from training.optimizer import learning_rate_at, make_optimizer
from training.randomness import DROPOUT, SAMPLE, WEIGHTS, random_bits
from training.stop_request import StopRequest
from weights import checkpoint
from weights.errors import CheckpointError
from weights.layout import read_layout, read_tokenizer

_SAMPLE_TEMPERATURE = 0.8


class Trainer:
    """One run, from its state to its last step."""

    def __init__(
        self,
        config: TrainingConfig,
        *,
        dataset: Dataset,
        run: RunDirectory,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        state: TrainingState,
        display: Display,
        stop: StopRequest,
    ) -> None:
        self.config = config
        self.state = state
        self._dataset = dataset
        self._run = run
        self.model = model
        self._optimizer = optimizer
        self._display = display
        self._stop = stop
        self._device = model.wte.weight.device
        self._attend = CausalAttention(model.config, dropout=config.attention_dropout)
        self._loss: Callable[..., Tensor] = next_token_loss
        if config.compile:
            self._loss = torch.compile(next_token_loss)
        self._prompt = _sample_prompt(config, dataset)
        self._seconds = 0.0  # spent in steps since the last line of the metrics
        self._steps = 0

    def train(self) -> None:
        """Train to max_steps, or until a stop is asked for; either way the last state is saved.

        Raises a TrainingError; the last checkpoint then stands.
        """
        state, config = self.state, self.config
        with self._run.held():
            self._run.tidy(config, state)
            self._display.begin(state.step, config.max_steps)
            try:
                self._loop()
            except TorchDynamoException as error:
                reason = str(error).partition("\n")[0]
                raise ConfigError(
                    f"compile is true and the model cannot be compiled here: {reason}. Resume with "
                    "--compile false."
                ) from error
            except torch.OutOfMemoryError as error:
                raise RunError(
                    f"The device has too little memory for batch {config.batch}; halve --batch "
                    "and double --accumulation."
                ) from error
            finally:
                self._display.end()

    def _loop(self) -> None:
        state, config = self.state, self.config
        while True:
            improved = state.watched_step != state.step and self._watch()
            is_last = state.step == config.max_steps
            is_stopped = self._stop.signal_number is not None
            is_due = state.step > 0 and state.step % config.checkpoint_interval == 0
            if improved or is_due or is_last or is_stopped:
                self._save()
            if is_last or is_stopped:
                return
            self._step()

    def _step(self) -> None:
        """Make one step and write its line of the metrics, if it is due."""
        state, config = self.state, self.config
        start = time.perf_counter()
        learning_rate = learning_rate_at(state.step, config)
        loss, norm = self.gradient(state.step)
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        if is_finite:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
            state.num_skipped_in_a_row = 0
        else:
            state.num_skipped += 1
            state.num_skipped_in_a_row += 1
        self._optimizer.zero_grad()
        state.step += 1
        self._seconds += time.perf_counter() - start
        self._steps += 1
        if not is_finite or state.step % config.log_interval == 0:
            record = {
                "step": state.step,
                "tokens": state.step * config.tokens_per_step,
                "loss": loss if math.isfinite(loss) else None,
                "learning_rate": learning_rate,
                "gradient_norm": norm if math.isfinite(norm) else None,
                "tokens_per_second": self._steps * config.tokens_per_step / self._seconds,
                "num_skipped": state.num_skipped,
            }
            self._seconds, self._steps = 0.0, 0
            self._run.metrics.append(record)
            self._display.show(record)
        self._display.advance(state.step)
        if not is_finite:
            self._display.note(
                f"step {state.step} skipped: its loss is {loss} and its gradient's norm {norm}"
            )
            if state.num_skipped_in_a_row >= config.max_skipped_steps:
                raise DivergedError(
                    f"The loss was not finite for {state.num_skipped_in_a_row} steps in a row, the "
                    f"last being {state.step}. A smaller --learning_rate or a longer "
                    "--warmup_steps in a new run usually helps; the checkpoints before stand."
                )

    def gradient(self, step: int) -> tuple[float, float]:
        """Put the clipped gradient of one step into the parameters; returns loss and its norm."""
        config, model = self.config, self.model
        total = torch.zeros((), device=self._device)
        for micro_step in range(config.accumulation):
            first = (step * config.accumulation + micro_step) * config.batch
            starts = window_starts(
                first,
                config.batch,
                num_tokens=len(self._dataset.train),
                n_ctx=config.n_ctx,
                seed=config.seed,
            )
            tokens = read_windows(self._dataset.train, starts, config.n_ctx + 1, self._device)
            torch.manual_seed(random_bits(config.seed, DROPOUT, step, micro_step))
            with self._autocast():
                loss = self._loss(model, tokens, self._attend, self._dataset.tokenizer.vocab_size)
            loss = loss / config.tokens_per_step
            torch.autograd.backward(loss)
            total += loss.detach()
        limit = config.gradient_clip or math.inf
        norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
        # One transfer a step, and the decision whether it counts needs it.
        values: list[float] = torch.stack([total, norm.float()]).tolist()
        return values[0], values[1]

    def _watch(self) -> bool:
        """Evaluate and sample, where due; returns whether the validation loss is the best so far.

        Given up when a stop is asked for: the resumed run starts with it again.
        """
        state, config = self.state, self.config
        is_last = state.step == config.max_steps
        improved = False
        self.model.eval()
        try:
            if state.step % config.eval_interval == 0 or is_last:
                found = evaluate(
                    self.model,
                    self._dataset.val,
                    batch=config.batch,
                    vocab_size=self._dataset.tokenizer.vocab_size,
                    autocast=self._autocast,
                    is_stopped=lambda: self._stop.signal_number is not None,
                )
                if found is None:
                    return False
                improved = self._record_evaluation(*found)
            if config.sample_interval and (state.step % config.sample_interval == 0 or is_last):
                self._record_sample()
        finally:
            self.model.train()
        state.watched_step = state.step
        return improved

    def _record_evaluation(self, val_loss: float, bits_per_byte: float) -> bool:
        state = self.state
        is_finite = math.isfinite(val_loss)
        record = {
            "step": state.step,
            "tokens": state.step * self.config.tokens_per_step,
            "val_loss": val_loss if is_finite else None,
            "bits_per_byte": bits_per_byte if is_finite else None,
        }
        self._run.metrics.append(record)
        self._display.show(record)
        if not is_finite or (state.best_val_loss is not None and val_loss >= state.best_val_loss):
            return False
        state.best_step, state.best_val_loss = state.step, val_loss
        return True

    def _record_sample(self) -> None:
        config, tokenizer = self.config, self._dataset.tokenizer
        seed = random_bits(config.seed, SAMPLE, self.state.step)
        ids = generate(
            self.model,
            self._prompt,
            config.sample_tokens,
            choose=sample(_SAMPLE_TEMPERATURE, seed=seed),
            vocab_size=tokenizer.vocab_size,
            stop_token_ids=() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,),
        )
        try:
            text = config.sample_prompt + tokenizer.decode(ids)
        except FloatingPointError:  # the next steps say so too, and may end the run
            self._display.note(f"step {self.state.step}: no sample, the logits are not finite")
            return
        self._run.samples.append({"step": self.state.step, "text": text})
        self._display.show_sample(self.state.step, text)

    def _save(self) -> None:
        path = self._run.save(
            self.model,
            self._optimizer,
            self.state,
            tokenizer=self._dataset.tokenizer,
            keep=self.config.keep_checkpoints,
        )
        self._display.note(f"saved {path}")

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self._device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"
        )


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


def resolve_machine(config: TrainingConfig) -> TrainingConfig:
    """Decide what `auto` means for device and precision here; raises ConfigError."""
    device, precision = config.device, config.precision
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda and no CUDA device is available here; use cpu.")
    if precision == "auto":
        is_fast = torch.cuda.is_bf16_supported() if device == "cuda" else has_cpu_bfloat16()
        precision = "bfloat16" if is_fast else "float32"
    return dataclasses.replace(config, device=device, precision=precision)


def has_cpu_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself, by AVX-512 BF16 or AMX.

    With it, a step of the storyteller is 1.9 times as fast as in float32 (two cores of a Zen 5
    server); without it, bfloat16 is emulated and slower.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    except OSError:  # no Linux
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


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
    num_tokens = len(_sample_prompt(config, dataset))
    if num_tokens >= config.n_ctx:
        raise ConfigError(
            f"sample_prompt has {num_tokens} tokens; it must leave room in n_ctx {config.n_ctx}."
        )


def _sample_prompt(config: TrainingConfig, dataset: Dataset) -> list[int]:
    tokenizer = dataset.tokenizer
    if not config.sample_prompt:
        return [tokenizer.bos_token_id or 0]
    try:
        return tokenizer.encode(config.sample_prompt)
    except TokenizerError as error:
        raise ConfigError(f"sample_prompt cannot be used: {error}") from error
