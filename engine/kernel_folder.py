"""Where compiled kernels may be kept from one start to the next; knows no numba, no environment."""

import os
from collections.abc import Iterable
from pathlib import Path

BESIDE_THE_CODE = Path(__file__).parent / "__pycache__"


def first_writable(folders: Iterable[Path]) -> Path | None:
    """The first of some folders in which files can be made, the folder itself if need be."""
    for folder in folders:
        # What lies in a folder that is closed to us is not there: `Path.exists` would raise.
        there = next((path for path in (folder, *folder.parents) if os.path.exists(path)), None)
        if there is not None and there.is_dir() and os.access(there, os.W_OK | os.X_OK):
            return folder
    return None
