"""How the CPU kernels are compiled and kept, and what they all share; knows no model.

Plain functions to Python: the kernels close over them, and where a compiled function is closed
over, numba's cache on disk never finds the kernel again.
"""

import hashlib
import importlib
import logging
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba.core import event
from numpy.typing import NDArray
from torch import Tensor

from engine.cpu_features import compiled_for
from engine.kernel_folder import BESIDE_THE_CODE, first_writable, kernels_name

logger = logging.getLogger(__name__)

Array = NDArray[Any]


def _do_without_blas() -> None:
    """Import the part of numba that looks for a BLAS, and let it find none.

    It would import scipy.linalg, where that is installed: a third of a second and 40 MB of every
    start, for products that no kernel of ours leaves to others.
    """
    name = "scipy.linalg"
    is_absent = name not in sys.modules
    if is_absent:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        importlib.import_module("numba.np.arraymath")
    finally:
        if is_absent:
            del sys.modules[name]


def _keep_kernels_by_source() -> "tempfile.TemporaryDirectory[str] | None":
    """Let compiled kernels be found again only as long as nothing they are made of has changed.

    Each state of the sources has a folder of its own, below NUMBA_CACHE_DIR, or else beside the
    code. Where neither can be written, kernels lie in a folder that is returned, and goes with the
    process.
    """
    asked = [Path(numba.config.CACHE_DIR)] if numba.config.CACHE_DIR else []
    base = first_writable([*asked, BESIDE_THE_CODE])
    passing = None
    if base is None:
        passing = tempfile.TemporaryDirectory(prefix="kvik-kernels-")
        base = Path(passing.name)
        logger.warning(
            "compiled kernels cannot be kept, so every start compiles them anew; let "
            "NUMBA_CACHE_DIR name a folder that can be written and has room folder=%s",
            *(asked or [BESIDE_THE_CODE]),
        )
    numba.config.CACHE_DIR = str(base / kernels_name())
    return passing


def kept_mark(*what: str) -> Path:
    """The file that says that all kernels for something are compiled and kept; it may be absent."""
    digest = hashlib.sha256("\n".join((*what, compiled_for())).encode())
    return Path(numba.config.CACHE_DIR) / f"complete-{digest.hexdigest()[:16]}"


_do_without_blas()
_passing_folder = _keep_kernels_by_source()

# What kernels may do to sums and products. Sums are reordered for vector registers, the same way
# for every row; infinities and NaN survive, or a broken row would pass for a good one.
FAST_MATH = {"contract", "nsz", "arcp", "reassoc"}

# How kernels are compiled that `engine.cpu_tasks` runs. They divide as processors do: a check for
# zero, as Python's division wants it, would keep a loop from being vectorised.
KERNEL: dict[str, Any] = {
    "nogil": True, "cache": True, "boundscheck": False, "fastmath": FAST_MATH,
    "error_model": "numpy",
}  # fmt: skip

# And kernels in which each operation is rounded by itself, as it is written.
EXACT: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy"}


class _Announcement(event.Listener):  # type: ignore[misc]
    """Says when the first kernel is compiled that was not found compiled."""

    def __init__(self) -> None:
        self._has_spoken = False

    def on_start(self, event: Any) -> None:
        if not self._has_spoken:
            self._has_spoken = True
            logger.warning(
                "compiling kernels for this machine, for some 20 seconds%s",
                "; the next start finds them" if _passing_folder is None else "",
            )

    def on_end(self, event: Any) -> None:
        pass


def announce_compiling() -> AbstractContextManager[object]:
    """Within this, say so once if kernels have to be compiled, which keeps people waiting."""
    listening: AbstractContextManager[object] = event.install_listener(
        "numba:compile", _Announcement()
    )
    return listening


def view(tensor: Tensor) -> Array:
    """The tensor's memory for numba, which has no bfloat16: its bits instead."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    array: Array = tensor.numpy()
    return array


@numba.extending.register_jitable(inline="always")
def widen(bits: Any) -> Any:
    """The float32 that bfloat16's bits stand for."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@numba.extending.register_jitable(inline="always")
def same(value: Any) -> Any:
    """A float32 as it is."""
    return value
