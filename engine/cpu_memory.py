"""Memory of a CPU that is made once and used again; knows no model."""

import math
import mmap
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.types.containers import BaseTuple
from numba.np.arrayobj import populate_array

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
    if isinstance(kind, BaseTuple):
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


_kept_types: dict[str, Any] = {}  # numba's, by name
_kept_kinds: dict[str, list[object]] = {}  # what `_add_words` found, which tells types apart


def keep(name: str, value: tuple[Any, ...]) -> Array:
    """Turn a tuple of arrays, tuples, ints and float32s into one array, for `restore`.

    For what many calls of a kernel are given: from Python's objects, each would fetch hundreds of
    cold cache lines together. Values of a name are of one type in all processes, because kernels
    on the disk know types by their names. Whoever keeps a value keeps its arrays alive.
    """
    words: list[int] = []
    kinds: list[object] = []
    _add_words(value, words, kinds)
    if name not in _kept_types:
        # Asking numba each time would take longer than the smaller kernels do.
        _kept_types[name], _kept_kinds[name] = numba.typeof(value), kinds
    assert _kept_kinds[name] == kinds, "values of a name are of one type"
    return np.array(words, np.int64)


def _add_words(value: Any, words: list[int], kinds: list[object]) -> None:
    """Find what `_value_at` makes a value of, and what its parts are."""
    if isinstance(value, np.ndarray):
        words += (value.ctypes.data, *value.shape, *value.strides)
        kinds.append((value.dtype, value.ndim, value.flags.c_contiguous))
    elif isinstance(value, tuple):
        kinds.append(type(value))
        for part in value:
            _add_words(part, words, kinds)
    elif isinstance(value, np.float32):
        words.append(int(value.view(np.int32)))
        kinds.append(np.float32)
    else:
        words.append(value)
        kinds.append(int)


@numba.extending.intrinsic(prefer_literal=True)
def restore(context: Any, name: Any, place: Any) -> Any:
    """In a kernel, what `keep` made an array of, which lies at a place; borrowed."""
    kind = _kept_types[name.literal_value]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words = builder.inttoptr(arguments[1], ir.IntType(64).as_pointer())
        return _value_at(context, builder, kind, words, count())

    return kind(name, types.intp), generate


def _value_at(context: Any, builder: Any, kind: Any, words: Any, places: Iterator[int]) -> Any:
    """The value of a type out of the words at the next places, in the order of `_add_words`."""

    def next_word() -> Any:
        at = builder.gep(words, [ir.Constant(ir.IntType(32), next(places))])
        return builder.load(at)

    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder)
        item = context.get_data_type(kind.dtype)
        data = builder.inttoptr(next_word(), item.as_pointer())
        sizes = [[next_word() for _ in range(kind.ndim)] for _ in ("shape", "strides")]
        item_bytes = ir.Constant(ir.IntType(64), context.get_abi_sizeof(item))
        populate_array(array, data, *sizes, item_bytes, None, parent=None)
        return array._getvalue()
    if isinstance(kind, BaseTuple):
        parts = [_value_at(context, builder, part, words, places) for part in kind]
        return context.make_tuple(builder, kind, parts)
    word = next_word()
    if kind == types.float32:
        return builder.bitcast(builder.trunc(word, ir.IntType(32)), ir.FloatType())
    assert kind == types.int64
    return word


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
