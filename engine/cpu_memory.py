"""Memory of a CPU that is made once and used again; knows no model."""

import math
import mmap
from contextlib import suppress
from typing import Any

import numba
import numpy as np

from engine.cpu_math import Array


def huge_pages(shape: tuple[int, ...], dtype: Any) -> Array:
    """Zeros in pages as large as the system has them: fewer for the processor to look up.

    They take memory only where something is written. Raises OSError where there is not enough.
    """
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if not num_bytes:
        return np.zeros(shape, dtype)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system built without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype).reshape(shape)


@numba.extending.intrinsic
def borrow(context: Any, array: Any) -> Any:
    """The same array in a kernel, but nobody counts who refers to it: the caller keeps it alive.

    Each call of a function counts references to the arrays it is given, and threads would wait
    for each other's counting longer than the smaller tasks take.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = context.make_array(array)(context, builder, arguments[0])
        for owner in ("meminfo", "parent"):
            setattr(found, owner, getattr(found, owner).type(None))
        return found._getvalue()

    return array(array), generate


class Scratch:
    """Arrays for what lasts no longer than a step, kept from step to step.

    New ones would be new pages from the system each time, which take longer to come than the
    smaller kernels to run.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, Array] = {}

    def array(self, name: str, num_rows: int, width: int, dtype: Any) -> Array:
        """An array (num_rows, width) with anything in it: the last of its name is lost.

        Names keep their width and dtype. New memory is zeros, so columns never written stay so.
        """
        found = self._arrays.get(name)
        if found is None or len(found) < num_rows:
            # To the next power of two, so that growing ends soon.
            found = self._arrays[name] = huge_pages(
                (1 << (num_rows - 1).bit_length(), width), dtype
            )
        assert (found.shape[1], found.dtype) == (width, dtype)
        return found[:num_rows]
