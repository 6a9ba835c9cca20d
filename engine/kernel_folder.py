"""Where compiled kernels may be kept from one start to the next; knows no numba, no environment."""

import functools
import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

BESIDE_THE_CODE = Path(__file__).parent / "__pycache__"
_ROOM_BYTES = 32 * 2**20  # several times what the kernels of a precision take
_SOURCES = ("*cpu*.py", "vectors.py", "draw.py", "random_stream.py")  # what kernels are made of


@functools.cache
def kernels_name() -> str:
    """The folder, within another, of the kernels that are made of the sources as they are now.

    numba's cache looks at the file of a kernel alone: after an upgrade of what the kernel calls, it
    would go on with the old code.
    """
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in here.glob(pattern)):
        digest.update(path.read_bytes())
    return f"kernels-{digest.hexdigest()[:16]}"


def first_writable(folders: Iterable[Path]) -> Path | None:
    """The first of some folders in which files can be made, the folder itself if need be.

    One on a disk that is all but full counts only where our kernels lie in it already.
    """
    for folder in folders:
        # What lies in a folder that is closed to us is not there: `Path.exists` would raise.
        there = next((path for path in (folder, *folder.parents) if os.path.exists(path)), None)
        if there is None or not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            continue
        if shutil.disk_usage(there).free >= _ROOM_BYTES or any(folder.glob(f"{kernels_name()}/*")):
            return folder
    return None
