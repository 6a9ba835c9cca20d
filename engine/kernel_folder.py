"""Where compiled kernels may be kept from one start to the next; knows no numba, no environment."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

BESIDE_THE_CODE = Path(__file__).parent / "__pycache__"
_ROOM_BYTES = 32 * 2**20  # several times what the kernels of a precision take


def first_writable(folders: Iterable[Path]) -> Path | None:
    """The first of some folders in which files can be made, the folder itself if need be.

    One on a disk that is all but full counts only where kernels lie in it already.
    """
    for folder in folders:
        # What lies in a folder that is closed to us is not there: `Path.exists` would raise.
        there = next((path for path in (folder, *folder.parents) if os.path.exists(path)), None)
        if there is None or not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            continue
        if shutil.disk_usage(there).free >= _ROOM_BYTES or any(folder.glob("kernels-*")):
            return folder
    return None
