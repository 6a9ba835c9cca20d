"""Saves that die or fail at one point each, in a process each; prints what every one left behind.

Run as `python -m tests.weights.kill_points DIRECTORY`. It has a process of its own because it
forks: torch is imported once, and there are no threads that a fork would lose.
"""

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.byte_pairs import byte_pair_tokenizer
from tests.tiny_models import tiny_config, tiny_gpt
from weights.checkpoint import load, save
from weights.errors import CheckpointError
from weights.layout import read_layout, read_tokenizer

TEXT_FILES = [
    "model.safetensors.index.json",
    "config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was found after one save ended."""

    point: str
    end: str  # "killed", "done", or the error that the save raised
    new: str  # "absent", "whole", or what is wrong with it
    is_previous_intact: bool
    beside: list[str]  # what else lies there


class Campaign:
    """A directory with a checkpoint, and another that is saved beside it again and again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._model = tiny_gpt(tiny_config(n_layer=1), seed=1)
        self._tokenizer = byte_pair_tokenizer()
        save(tiny_gpt(seed=2), directory / "previous", tokenizer=self._tokenizer)
        self._previous = _digest(directory / "previous")

    def outcomes(self) -> Iterator[Outcome]:
        """Save once for every point."""
        for point, prepare in self._points():
            end = self._in_another_process(partial(self._save, prepare))
            yield self._look(point, end)
            for path in self._directory.iterdir():
                if path.name != "previous":
                    shutil.rmtree(path)

    def _points(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Every point, with what a process does before it saves so as to die or fail there."""
        num_events = int(self._in_another_process(self._count_events))
        shutil.rmtree(self._directory / "new")
        for number in range(num_events):
            yield f"killed at event {number}", partial(kill_at_event, self._directory, number)
        for dies in (True, False):
            verb = "killed" if dies else "full"
            for limit in (0, 1, 8, 9, 500, 5_000, 17_000):
                yield f"{verb} at {limit} bytes", partial(limit_files, limit, dies)
            for name in TEXT_FILES:
                for limit in (0, 1, 100):
                    action = partial(limit_files, limit, dies)
                    yield f"{verb} at {limit} bytes of {name}", partial(when_opened, name, action)
        yield "nothing", lambda: None

    def _save(self, prepare: Callable[[], None]) -> str:
        prepare()
        try:
            save(
                self._model,
                self._directory / "new",
                tokenizer=self._tokenizer,
                max_shard_bytes=18_000,
            )
        except CheckpointError as error:
            return str(error)
        return "done"

    def _count_events(self) -> str:
        events: list[str] = []
        watch(
            lambda event, path: (
                events.append(event) if path.is_relative_to(self._directory) else None
            )
        )
        self._save(lambda: None)
        return str(len(events))

    @staticmethod
    def _in_another_process(work: Callable[[], str]) -> str:
        """What `work` returns, or "killed"."""
        receive, send = os.pipe()
        if (child := os.fork()) == 0:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.write(send, work().encode())
            os._exit(0)
        os.close(send)
        with os.fdopen(receive) as stream:
            said = stream.read()
        _, status = os.waitpid(child, 0)
        return "killed" if os.WIFSIGNALED(status) else said

    def _look(self, point: str, end: str) -> Outcome:
        names = {path.name for path in self._directory.iterdir()}
        return Outcome(
            point=point,
            end=end,
            new=self._judge() if "new" in names else "absent",
            is_previous_intact=_digest(self._directory / "previous") == self._previous,
            beside=sorted(names - {"new", "previous"}),
        )

    def _judge(self) -> str:
        new = self._directory / "new"
        try:
            model = load(new)
            tokenizer = read_tokenizer(read_layout(new))
        except Exception as error:
            return repr(error)
        expected = dict(self._model.named_parameters())
        is_equal = all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
        is_equal &= tokenizer.fingerprint == self._tokenizer.fingerprint
        return "whole" if is_equal else "another model"


def _digest(directory: Path) -> str:
    files = sorted(directory.iterdir())
    return hashlib.sha256(b"".join(f.name.encode() + f.read_bytes() for f in files)).hexdigest()


def watch(hear: Callable[[str, Path], object]) -> None:
    """Hear, from now on, of every call that the interpreter audits and that names a path."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        path = arguments[0] if arguments else None
        if isinstance(path, str | os.PathLike):
            hear(event, Path(path))

    sys.addaudithook(hook)


def kill_at_event(directory: Path, number: int) -> None:
    """Die at the audited call of this number among those that touch the directory."""
    seen = 0

    def hear(event: str, path: Path) -> None:
        nonlocal seen
        if path.is_relative_to(directory):
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    watch(hear)


def limit_files(limit: int, dies: bool) -> None:
    """Let no file grow beyond `limit` bytes: whoever tries dies, or is told so."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if dies else signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


def when_opened(name: str, action: Callable[[], None]) -> None:
    """Act when a file of this name is opened."""
    watch(lambda event, path: action() if event == "open" and path.name == name else None)


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump([asdict(outcome) for outcome in Campaign(Path(sys.argv[1])).outcomes()], sys.stdout)
