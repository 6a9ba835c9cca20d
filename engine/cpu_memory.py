"""Memory of a CPU that is made once and used again; knows no model."""

import math
import mmap
from contextlib import suppress
from typing import Any

import numba
import numpy as np
from numba.core import types

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


def _without_owners(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """The value of an array or a tuple, which nobody counts who refers to its arrays."""
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        for owner in ("meminfo", "parent"):
            setattr(array, owner, getattr(array, owner).type(None))
        return array._getvalue()
    if isinstance(kind, types.BaseTuple):
        for place, part in enumerate(kind):
            found = _without_owners(context, builder, part, builder.extract_value(value, place))
            value = builder.insert_value(value, found, place)
    return value


@numba.extending.intrinsic
def borrow(context: Any, array: Any) -> Any:
    """The same array in a kernel, but nobody counts who refers to it: the caller keeps it alive.

    Each call of a function counts references to the arrays it is given, and threads would wait
    for each other's counting longer than the smaller tasks take.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _without_owners(context, builder, array, arguments[0])

    return array(array), generate


_KEPT_BYTES = 2**14
_kept_types: dict[str, Any] = {}  # numba's, by name


def keep(name: str, value: tuple[Any, ...]) -> Array:
    """Turn a tuple of arrays, tuples and numbers into one array, of which `restore` makes it again.

    For what many calls of a kernel are given: from Python's objects, each would fetch hundreds of
    cold cache lines together. Values of a name are of one type in all processes, because kernels
    on the disk know types by their names. Whoever keeps a value keeps its arrays alive.
    """
    assert _kept_types.setdefault(name, numba.typeof(value)) == numba.typeof(value)
    kept = np.zeros(_KEPT_BYTES, np.uint8)
    num_bytes = _store(value, kept.ctypes.data)
    assert num_bytes <= _KEPT_BYTES
    return kept


@numba.extending.intrinsic
def _write(context: Any, value: Any, place: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found, at = arguments
        builder.store(found, builder.inttoptr(at, found.type.as_pointer()), align=8)
        return context.get_constant(types.intp, context.get_abi_sizeof(found.type))

    return types.intp(value, types.intp), generate


@numba.njit(cache=True)
def _store(value: Any, place: Any) -> Any:
    return _write(value, place)


@numba.extending.intrinsic(prefer_literal=True)
def restore(context: Any, name: Any, place: Any) -> Any:
    """In a kernel, what `keep` made an array of, which lies at a place; borrowed."""
    kind = _kept_types[name.literal_value]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = context.get_value_type(kind).as_pointer()
        value = builder.load(builder.inttoptr(arguments[1], pointer), align=8)
        return _without_owners(context, builder, kind, value)

    return kind(name, types.intp), generate


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
