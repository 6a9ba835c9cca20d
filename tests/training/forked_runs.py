"""Trains in child processes that SIGKILL themselves at a given file operation; a program.

Usage: python -m tests.training.forked_runs DATA OUT FIRST STRIDE

Takes points FIRST, FIRST + STRIDE, ... until a run ends before its point, and prints how many
there were. Each leaves OUT/<point>, killed once and resumed to its end. Forks share one import
of torch, so that a hundred kills take seconds; nothing is computed in the parent.
"""

import os
import signal
import sys
import traceback
from pathlib import Path

import torch

from tests.training.tiny import begin, resume
from training.config import Value

# Every kind of file operation a few times: evaluations, samples, saves with and without pruning.
SETTINGS: dict[str, Value] = {
    "max_steps": 7,
    "accumulation": 2,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "eval_interval": 2,
    "checkpoint_interval": 3,
    "keep_checkpoints": 1,
    "sample_interval": 4,
}

# Of sys.addaudithook; os.replace reports itself as os.rename. What compiled code writes (the
# safetensors library) lies between two of them.
FILE_OPERATIONS = {
    "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "shutil.rmtree",
}  # fmt: skip


def kill_at(point: int, place: str) -> None:
    """Arm this process: SIGKILL right before its file operation number `point` below `place`."""
    seen = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event not in FILE_OPERATIONS:
            return
        # shutil.rmtree names what it removes by a bare name and the descriptor of its directory.
        is_removed = event in ("os.remove", "os.rmdir") and arguments[1] != -1
        if is_removed or any(place in str(argument) for argument in arguments):
            if seen == point:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(watch)


def in_child(run: Path, data: Path, point: int | None) -> int:
    """Start or resume a run in a child; returns its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        trainer = resume(run) if run.exists() else begin(run, data, SETTINGS)
        if point is not None:
            kill_at(point, str(run))
        trainer.train()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def broken_checkpoints(run: Path) -> list[Path]:
    """What is named like a checkpoint and is not a whole one."""
    links = [link for link in (run / "latest", run / "best") if link.is_symlink()]
    return [
        path
        for path in [*links, *(run / "checkpoints").glob("step-*")]
        if len(list(path.glob("*.safetensors"))) != 2 or not (path / "training_state.json").exists()
    ]


def main() -> None:
    """See above."""
    data, out, point, stride = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5])
    num_kills = 0
    while True:
        run = out / str(point)
        status = in_child(run, data, point)
        if status == 0:
            break
        if status != signal.SIGKILL:
            sys.exit(f"point {point}: status {status} instead of a kill")
        if broken := broken_checkpoints(run):
            sys.exit(f"point {point}: the kill left {', '.join(map(str, broken))}")
        if status := in_child(run, data, None):
            sys.exit(f"point {point}: resuming failed with status {status}")
        num_kills += 1
        point += stride
    sys.stdout.write(f"{num_kills}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)])  # imports torch's compiler, a second for every fork else
    main()
