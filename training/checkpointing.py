"""A run directory on disk: what it was asked, its checkpoints and its journals.

    RUN/config.toml                       the resolved config
    RUN/run.json                          data and starting point, with their sha256
    RUN/metrics.jsonl, samples.jsonl      one JSON object a line
    RUN/checkpoints/step-00001000/        a checkpoint `kvik serve` loads, and what resuming needs
    RUN/latest, RUN/best                  links to two of them

A checkpoint is written once, as a whole, and never changed. The links only repeat what the
checkpoints say, so a kill between any two system calls loses nothing but the work since the last.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.gpt import GPT
from model.tokenizer import Tokenizer
from training.config import TrainingConfig, format_toml, read_toml, resolve
from training.errors import RunError
from weights import checkpoint
from weights.errors import CheckpointError
from weights.new_directory import new_directory
from weights.tensor_values import write_file

CONFIG_FILE = "config.toml"
FACTS_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "training_state.json"

_PREFIX = "step-"
_STATE_KEYS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # AdamW's three, Muon's one


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What a run was started on; a resumed run must be on the same."""

    data: str  # the data directory, as it was named
    data_sha256: str
    init: str | None  # the checkpoint it started from, as it was named


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """Everything that changes from step to step beside weights and optimizer."""

    step: int = 0  # steps done
    watched_step: int = 0  # the last step whose evaluation and sample, where due, are done
    best_step: int | None = None
    best_val_loss: float | None = None
    num_skipped: int = 0  # steps left out in all, their gradient not being finite
    num_skipped_in_a_row: int = 0


class Journal:
    """A file of one JSON object a line, each with the step it belongs to."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line; what was added before a checkpoint is on the disk with it, see `sync`.

        Raises RunError; a line torn by it is dropped on resuming.
        """
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(line)
        except OSError as error:
            raise RunError(
                f"{self._path} cannot be written: {error.strerror}. The last checkpoint stands."
            ) from error

    def sync(self) -> None:
        """Bring every line to the disk."""
        if self._path.exists():
            with self._path.open("rb") as stream:
                os.fsync(stream.fileno())

    def keep(self, state: TrainingState) -> None:
        """Drop the lines a run in this state has not written yet, and one a kill left torn."""
        if not self._path.exists():
            return
        kept = []
        # A file's own lines: `splitlines` would cut at characters that a sample may have.
        with self._path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                    is_training = "val_loss" not in record and "text" not in record
                    limit = state.step if is_training else state.watched_step
                    if line.endswith("\n") and record["step"] <= limit:
                        kept.append(line)
                except (ValueError, TypeError, KeyError):
                    continue
        replace_file(self._path, "".join(kept))


class RunDirectory:
    """A run's place on the disk, held by one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = Journal(path / METRICS_FILE)
        self.samples = Journal(path / SAMPLES_FILE)
        self._checkpoints = path / "checkpoints"

    @classmethod
    def create(cls, path: Path, config: TrainingConfig, facts: RunFacts) -> "RunDirectory":
        """Make a run directory; raises RunError if there is something at `path`."""
        if os.path.lexists(path):
            remedy = (
                "go on with it by --resume, or name another place"
                if (path / CONFIG_FILE).exists()
                else "name another place"
            )
            raise RunError(f"{path} exists already; {remedy}.")
        try:
            with new_directory(path) as partial:
                (partial / "checkpoints").mkdir()
                (partial / CONFIG_FILE).write_text(format_toml(config), encoding="utf-8")
                (partial / FACTS_FILE).write_text(
                    json.dumps(dataclasses.asdict(facts), indent=2) + "\n", encoding="utf-8"
                )
        except (OSError, CheckpointError) as error:
            raise RunError(f"{path} cannot be made: {error}") from error
        return cls(path)

    def read(self) -> tuple[TrainingConfig, RunFacts]:
        """What the run was asked; raises RunError or ConfigError."""
        try:
            document = json.loads((self.path / FACTS_FILE).read_bytes())
            facts = RunFacts(**document)
        except OSError as error:
            raise RunError(
                f"{self.path} is no run directory: {FACTS_FILE} cannot be read "
                f"({error.strerror}). Leave out --resume to begin one."
            ) from error
        except (ValueError, TypeError) as error:
            raise RunError(
                f"{self.path / FACTS_FILE} is not built as expected: {error}."
            ) from error
        return resolve([read_toml(self.path / CONFIG_FILE)]), facts

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from training in it; raises RunError if one does already."""
        try:
            lock = (self.path / ".lock").open("a")
        except OSError as error:
            raise RunError(f"{self.path} cannot be written: {error.strerror}.") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(f"Another process is training in {self.path}.") from error
            yield

    def newest(self) -> Path | None:
        """The newest checkpoint, whatever the links say: a kill may have come before them."""
        found = self._listed()
        return found[-1] if found else None

    def save(
        self,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        state: TrainingState,
        *,
        tokenizer: Tokenizer,
        keep: int,
    ) -> Path:
        """Write the checkpoint of this step, point the links at it, remove what is too old.

        The `keep` newest stay, and the best. Raises RunError; the checkpoints before are untouched.
        """
        path = self._checkpoint(state.step)
        try:
            self.metrics.sync()
            self.samples.sync()
            if not path.exists():  # or else an interrupted run got as far before its evaluation
                with new_directory(path) as partial:
                    checkpoint.write(model, partial, tokenizer=tokenizer, dtype=torch.float32)
                    tensors = _optimizer_tensors(model, optimizer)
                    write_file(tensors, partial / OPTIMIZER_FILE)
                    document = {
                        "state": dataclasses.asdict(state),
                        "threads": torch.get_num_threads(),
                        "sha256": {
                            file.name: _sha256(file)
                            for file in sorted(partial.iterdir())
                            if file.suffix == ".safetensors"
                        },
                    }
                    (partial / STATE_FILE).write_text(
                        json.dumps(document, indent=2) + "\n", encoding="utf-8"
                    )
            self._relink("latest", path)
            if state.best_step is not None:
                self._relink("best", self._checkpoint(state.best_step))
            self._prune(keep, state.best_step)
        except (OSError, CheckpointError, SafetensorError) as error:
            newest = self.newest()
            raise RunError(
                f"Step {state.step} could not be saved: {str(error).rstrip('.')}. "
                + (f"The last checkpoint is {newest}." if newest else "There is no checkpoint yet.")
            ) from error
        return path

    def load(
        self, path: Path, model: GPT, optimizer: torch.optim.Optimizer
    ) -> tuple[TrainingState, int]:
        """Bring the optimizer of a model loaded from a checkpoint to where it was then.

        Returns the state, and the number of threads used until then. Raises RunError, naming the
        file; the remedy is to go back to the checkpoint before.
        """
        try:
            document = json.loads((path / STATE_FILE).read_bytes())
            for name, digest in document["sha256"].items():
                if (found := _sha256(path / name)) != digest:
                    raise RunError(
                        f"{path / name} has sha256 {found}; expected {digest}. Remove {path} to "
                        "resume from the checkpoint before it."
                    )
            tensors = load_file(path / OPTIMIZER_FILE)
            for name, parameter in model.named_parameters():
                optimizer.state[parameter] = {
                    key: tensors.pop(f"{name}:{key}").to(parameter.device)
                    for key in _STATE_KEYS
                    if f"{name}:{key}" in tensors
                }
            state = TrainingState(**document["state"])
            threads = int(document["threads"])
        except (
            OSError,
            CheckpointError,
            SafetensorError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            raise RunError(
                f"{path} cannot be resumed from: {str(error).rstrip('.')}. Remove it to resume "
                "from the checkpoint before it."
            ) from error
        return state, threads

    def tidy(self, config: TrainingConfig, state: TrainingState) -> None:
        """Bring the directory to the state a run resumes from: what came after it is dropped.

        Raises RunError.
        """
        try:
            for leftover in self._checkpoints.glob(f".{_PREFIX}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            self.metrics.keep(state)
            self.samples.keep(state)
            replace_file(self.path / CONFIG_FILE, format_toml(config))
        except OSError as error:
            raise RunError(f"{self.path} cannot be written: {error.strerror}.") from error

    def _checkpoint(self, step: int) -> Path:
        return self._checkpoints / f"{_PREFIX}{step:08}"

    def _listed(self) -> list[Path]:
        """The checkpoints there are, oldest first."""
        return sorted(self._checkpoints.glob(f"{_PREFIX}*"))

    def _relink(self, name: str, target: Path) -> None:
        link = self.path / name
        fresh = self.path / f".{name}.new"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target.relative_to(self.path))
        fresh.replace(link)

    def _prune(self, keep: int, best_step: int | None) -> None:
        best = None if best_step is None else self._checkpoint(best_step)
        for old in self._listed()[:-keep]:
            if old != best:
                # Renamed first: a kill in the midst must not leave half a checkpoint by that name.
                removed = old.rename(old.with_name(f".{old.name}.removed"))
                shutil.rmtree(removed)


def copy_weights(source: GPT, target: GPT) -> None:
    """Copy every parameter of one model into another of the same shape."""
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            parameter.copy_(source.get_parameter(name))


def replace_file(path: Path, text: str) -> None:
    """Replace a file's contents in one step."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(path)


def _optimizer_tensors(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name; empty before the first step that counted."""
    return {
        f"{name}:{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
