"""Arithmetic that the CPU kernels share, written so that it vectorises; knows no model.

Plain functions to Python: the kernels close over them, and where a compiled function is closed
over, numba's cache on disk never finds the kernel again.
"""

import hashlib
import math
import os
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

# What compiled kernels are made of.
_SOURCES = ("*cpu*.py", "*avx512*.py", "vectors.py", "draw.py", "random_stream.py")


def _keep_kernels_by_source() -> None:
    """Let compiled kernels be found again only as long as nothing they are made of has changed.

    numba's cache looks at the file of a kernel alone: after an upgrade of what the kernel calls, it
    would go on with the old code. So each state of the sources has a folder of its own, below
    NUMBA_CACHE_DIR, or else beside the code if that can be written, or else in the user's cache.
    """
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in here.glob(pattern)):
        digest.update(path.read_bytes())
    if numba.config.CACHE_DIR:
        base = Path(numba.config.CACHE_DIR)
    elif os.access(here, os.W_OK):
        base = here / "__pycache__"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvik"
    numba.config.CACHE_DIR = str(base / f"kernels-{digest.hexdigest()[:16]}")


_keep_kernels_by_source()

# What kernels may do to sums and products. Sums are reordered for vector registers, the same way
# for every row; infinities and NaN survive, or a broken row would pass for a good one.
FAST_MATH = {"contract", "nsz", "arcp", "reassoc"}

# How kernels are compiled that `engine.cpu_tasks` runs. They divide as processors do: a check for
# zero, as Python's division wants it, would keep a loop from being vectorised.
KERNEL: dict[str, Any] = {
    "nogil": True, "cache": True, "boundscheck": False, "fastmath": FAST_MATH,
    "error_model": "numpy",
}  # fmt: skip

_inlined = numba.extending.register_jitable(inline="always")


def view(tensor: Tensor) -> Array:
    """The tensor's memory for numba, which has no bfloat16: its bits instead."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    array: Array = tensor.numpy()
    return array


@_inlined
def narrow(value: Any) -> Any:
    """Round a float32 to bfloat16's bits, to nearest and ties to even; NaN stays one."""
    bits = np.float32(value).view(np.uint32)
    if value != value:
        return np.uint16(np.uint32(bits >> np.uint32(16)) | np.uint32(64))
    odd = np.uint32(bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@_inlined
def widen(bits: Any) -> Any:
    """The float32 that bfloat16's bits stand for."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@_inlined
def same(value: Any) -> Any:
    """A float32 as it is."""
    return value


@numba.njit(inline="always", fastmath={"contract", "nsz", "arcp"})
def exp(x: Any) -> Any:
    """Exponentiate x <= 0 to base e, within 2 units in the last place; plain arithmetic vectorises.

    Splits off the nearest multiple of ln 2 (in two parts, Cody and Waite) and takes the Taylor
    series of the rest, which is at most ln 2 / 2.
    """
    x = np.float32(-87) if x < np.float32(-87) else x  # NaN stays: comparing with it is false
    n = math.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = (x - np.float32(n) * np.float32(0.693359375)) + np.float32(n) * np.float32(2.12194440e-4)
    y = np.float32(1 / 5040)
    y = y * r + np.float32(1 / 720)
    y = y * r + np.float32(1 / 120)
    y = y * r + np.float32(1 / 24)
    y = y * r + np.float32(1 / 6)
    y = y * r + np.float32(1 / 2)
    y = (y * r + np.float32(1)) * r + np.float32(1)
    return y * np.uint32(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23)).view(np.float32)


@_inlined
def gelu_tanh(x: Any) -> Any:
    """GELU by its tanh form, x * sigmoid(2 u) with u = sqrt(2 / pi) * (x + 0.044715 x^3)."""
    u = np.float32(1.5957691216) * (x + np.float32(0.044715) * x * x * x)
    e = exp(-u if u > np.float32(0) else u)  # at most 1, of either sign
    top = np.float32(1) if u > np.float32(0) else e
    return x * (top / (np.float32(1) + e))


@_inlined
def gelu_erf(x: Any) -> Any:
    """GELU by its exact form, within 2e-7: x / 2 * erfc(-x / sqrt(2)).

    The complementary error function by Abramowitz and Stegun's formula 7.1.26.
    """
    z = np.float32(0.70710678) * (-x if x < np.float32(0) else x)
    t = np.float32(1) / (np.float32(1) + np.float32(0.3275911) * z)
    y = np.float32(1.061405429)
    y = y * t - np.float32(1.453152027)
    y = y * t + np.float32(1.421413741)
    y = y * t - np.float32(0.284496736)
    y = (y * t + np.float32(0.254829592)) * t * exp(-z * z)  # erfc(z)
    return x * (np.float32(1) - np.float32(0.5) * y if x > np.float32(0) else np.float32(0.5) * y)
