"""Regular files and the JSON objects in them, read within bounds; knows not what they mean."""

import json
import reprlib
import stat
from pathlib import Path
from typing import Any

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 120


class FileError(Exception):
    """A file that cannot be read as what it should be; the message names it."""


def shown(value: object) -> str:
    """The repr of a value that came from a file, cut short: it may be huge or a thousand deep."""
    return _SHOWN.repr(value)


def regular_file_size(path: Path) -> int:
    """The size of the regular file behind `path` and whatever links lead there.

    Opening a pipe or a device instead would hang or worse. Raises FileError.
    """
    try:
        status = path.stat()
    except OSError as error:
        reason = "is a dangling link" if path.is_symlink() else f"is missing ({error.strerror})"
        raise FileError(f"{path} {reason}.") from error
    except ValueError as error:  # a NUL or half a surrogate pair, which no file name has
        raise FileError(f"{str(path)!r} cannot be the name of a file.") from error
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{path} is not a regular file.")
    return status.st_size


def read_bytes(path: Path, *, max_bytes: int) -> bytes:
    """Read a regular file of at most `max_bytes`; raises FileError."""
    size = regular_file_size(path)
    if size <= max_bytes:
        try:
            with path.open("rb") as stream:
                # Not read(): some files that claim to be empty, such as those of /proc, never end.
                raw = stream.read(max_bytes + 1)
        except OSError as error:
            raise FileError(f"{path} cannot be read: {error.strerror}.") from error
        size = len(raw)
    if size > max_bytes:
        raise FileError(f"{path} has {size} bytes; at most {max_bytes} are expected.")
    return raw


def read_text(path: Path, *, max_bytes: int) -> str:
    """Read a file of UTF-8 text, line ends as they are; raises FileError."""
    try:
        return read_bytes(path, max_bytes=max_bytes).decode()
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8 text: byte {error.start} does not fit.") from error


def read_object(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """Read a JSON object; raises FileError."""
    try:
        value = json.loads(read_text(path, max_bytes=max_bytes))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise FileError(f"{path} must hold a JSON object, found {type(value).__name__}.")
    return value
