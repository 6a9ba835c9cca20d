"""Directories that are there as a whole or not at all; knows not what is written into them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weights.errors import CheckpointError


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Write a directory that is either there as a whole or not at all.

    Yields a temporary sibling to write in; when the block ends well, every file is brought to the
    disk and the sibling renamed to `path`; when it does not, the sibling is removed. A kill leaves
    at most the sibling, whose name starts with a dot. Raises CheckpointError if `path` exists.
    """
    path = Path(os.path.abspath(path))
    if os.path.lexists(path):
        raise CheckpointError(f"{path} exists already; name another place or remove it first.")
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process that had our id
        partial.mkdir()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be made: {error.strerror}.") from error
    try:
        yield partial
        _publish(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _publish(partial: Path, path: Path) -> None:
    """Bring a directory's files to the disk, then give it its name."""
    try:
        for folder, _, names in os.walk(partial):
            for name in names:
                _flush(Path(folder) / name)
            _flush(Path(folder))
        if os.path.lexists(path):  # rename would replace an empty directory made meanwhile
            raise CheckpointError(f"{path} was made by someone else meanwhile.")
        partial.rename(path)
        _flush(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}.") from error


def _flush(path: Path) -> None:
    """Bring a file or a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
