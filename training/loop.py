"""The training loop: batches in, steps, and now and then an evaluation, a sample, a checkpoint.

Every random choice is a pure function of the seed and the step, so stopping and resuming need
weights, optimizer and counters alone, and looking (evaluation, samples) changes nothing. Where a
run comes from is `start.py`'s to know.
"""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from model.attention import CausalAttention
from model.generate import generate, sample
from model.gpt import GPT
from model.vocabulary import TokenizerError
from training.checkpointing import RunDirectory, TrainingState
from training.config import TrainingConfig
from training.data import Dataset, window_starts
from training.display import Display
from training.errors import ConfigError, DivergedError, RunError
from training.loss import evaluate, next_token_loss, read_windows
from training.optimizer import learning_rate_at
from training.randomness import DROPOUT, SAMPLE, random_bits
from training.stop_request import StopRequest

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
        self._prompt = encode_sample_prompt(config, dataset)
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


def encode_sample_prompt(config: TrainingConfig, dataset: Dataset) -> list[int]:
    """The ids that every sample begins with; raises ConfigError."""
    tokenizer = dataset.tokenizer
    if not config.sample_prompt:
        return [tokenizer.bos_token_id or 0]
    try:
        return tokenizer.encode(config.sample_prompt)
    except TokenizerError as error:
        raise ConfigError(f"sample_prompt cannot be used: {error}") from error
