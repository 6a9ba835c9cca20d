"""Runs small enough to train in a test, and what two of them have in common."""

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from training.config import Value
from training.display import LogDisplay
from training.loop import Trainer
from training.prepare import PrepareConfig, prepare
from training.start import resume_run, start_run
from training.stop_request import StopRequest

SETTINGS: Mapping[str, Value] = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "n_ctx": 16,
    "batch": 2,
    "max_steps": 6,
    "warmup_steps": 2,
    "log_interval": 1,
    "eval_interval": 100,
    "checkpoint_interval": 100,
    "sample_interval": 0,
    "sample_tokens": 4,
    "device": "cpu",
    "precision": "float32",
}


def text(num_characters: int = 1200, seed: int = 5) -> str:
    """Words in no order, a line break after each few."""
    chance = random.Random(seed)
    words = ["the", "dragon", "sat", "on", "a", "hill", "and", "sang", "Näh!", "softly"]
    lines: list[str] = []
    while sum(map(len, lines)) < num_characters:
        lines.append(" ".join(chance.choices(words, k=6)) + "\n")
    return "".join(lines)


def make_data(directory: Path, content: str | None = None, *, tokenizer: str = "char") -> Path:
    """A data directory, its source beside it."""
    source = directory.with_suffix(".txt")
    source.write_text(text() if content is None else content, encoding="utf-8")
    prepare(PrepareConfig(files=(source,), tokenizer=tokenizer), directory)
    return directory


def begin(
    run: Path,
    data: Path,
    differing: Mapping[str, Value] | None = None,
    *,
    init: Path | None = None,
    **settings: Value,
) -> Trainer:
    """A trainer at step 0, by SETTINGS and what differs from them."""
    return start_run(
        run,
        {**SETTINGS, **(differing or {}), **settings},
        data=data,
        init=init,
        display=LogDisplay(),
        stop=StopRequest(),
    )


def resume(run: Path, **settings: Value) -> Trainer:
    """A trainer that goes on from a run's newest checkpoint."""
    return resume_run(run, settings, data=None, display=LogDisplay(), stop=StopRequest())


def train(
    run: Path, data: Path, differing: Mapping[str, Value] | None = None, **settings: Value
) -> Trainer:
    """A run from beginning to end, on one thread: sums then have one order on any machine."""
    torch.set_num_threads(1)
    trainer = begin(run, data, {**(differing or {}), **settings})
    trainer.train()
    return trainer


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics without the clock's part in them.

    Not one that is being written: the system may show the part of it before a page ends.
    """
    *lines, _ = (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    records = [json.loads(line) for line in lines]
    for record in records:
        record.pop("tokens_per_second", None)
    return records


def losses(run: Path) -> list[float]:
    """The training losses of a run."""
    return [record["loss"] for record in metrics(run) if "loss" in record]


def contents(run: Path) -> dict[str, str]:
    """Everything in a run directory: a sha256 a file, a link's target; metrics without the clock.

    Weights, optimizer, counters, losses and samples of two runs are equal if and only if this is.
    """
    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file() and name != ".lock":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    found["metrics.jsonl"] = json.dumps(metrics(run))
    return found
