"""What torch.save wrote, read as data: tensors and plain values, nothing that runs."""

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from weights.errors import CheckpointError

START_BYTES = 32  # enough to tell every kind of file
_ZIP_START = b"PK\x03\x04"
# Before 1.6: several pickles, the first of which is this number.
_LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)

_OTHER_STARTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file: fetch it with git lfs pull",
    b"\x80": "a pickle, and not one of torch.save's; it was not executed",
    b"GGUF": "a GGUF file",
    b"lmgg": "a GGML file",
    b"\x89HDF": "an HDF5 file, as TensorFlow writes it",
}


def is_torch_file(start: bytes) -> bool:
    """Whether a file that begins so was written by torch.save."""
    return start.startswith((_ZIP_START, _LEGACY_START))


def name_kind(start: bytes) -> str:
    """What a file is that is not supported, as far as its first bytes tell."""
    for magic, kind in _OTHER_STARTS.items():
        if start.startswith(magic):
            return kind
    return f"of no known kind; its first bytes are {start[:8].hex(' ') or 'missing'}"


def read_torch_file(path: Path) -> Any:
    """Load a file with torch's restricted unpickler, its tensors mapped, not read, where possible.

    Raises CheckpointError, naming what it asked for, if it needs more than tensors and plain
    values; nothing it names is imported or run.
    """
    with path.open("rb") as stream:
        start = stream.read(START_BYTES)
    if not is_torch_file(start):
        raise CheckpointError(f"{path} is {name_kind(start)}. Expected a file of torch.save.")
    is_zip = start.startswith(_ZIP_START)
    if is_zip:
        _check_archive(path)
    try:
        with warnings.catch_warnings():
            # That a newer pickle protocol may have what torch does not read: then it says so.
            warnings.simplefilter("ignore", UserWarning)
            # Files of torch before 1.6 are no archives and cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is more than tensors and plain values: {_reason(error)}. It was not executed. "
            "If you trust where it comes from, load it there and save its tensors and settings "
            "again, without other objects."
        ) from error
    except MemoryError as error:
        raise CheckpointError(f"{path} needs more memory than there is.") from error
    # What a damaged file makes torch's readers raise is theirs to choose.
    except (RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError,
            AssertionError, OSError) as error:  # fmt: skip
        raise CheckpointError(
            f"{path} cannot be read as a file of torch.save: {_first_line(error)}. Is it cut off?"
        ) from error


def _check_archive(path: Path) -> None:
    """Refuse an archive that unpacks to more than it is; torch.save does not compress."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [e.filename for e in archive.infolist() if e.compress_type or e.flag_bits & 1]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} is a damaged archive: {_first_line(error)}. Is it cut off?"
        ) from error
    if packed:
        raise CheckpointError(
            f"{path} holds a compressed or encrypted entry, {packed[0]}; torch.save writes none."
        )


def _reason(error: pickle.UnpicklingError) -> str:
    """What the restricted unpickler stumbled over, out of its long message."""
    inner = error.__context__ or error  # torch wraps it in advice to load it all the same
    asked = re.search(r"(?:GLOBAL|class) (\S+)", str(inner))
    return f"it asks for {asked[1]}" if asked else _first_line(inner)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200].rstrip(". ")
