"""Values kept for kernels come back as they were, and only as the type that a name stands for."""

from typing import Any, NamedTuple

import numba
import numpy as np
import pytest

from engine.cpu_math import KERNEL
from engine.cpu_memory import keep, restore


class Parts(NamedTuple):
    numbers: Any  # (R, C) float32
    added: int
    share: np.float32


@numba.njit(**{**KERNEL, "cache": False})  # type: ignore[untyped-decorator]
def total(kept: Any) -> Any:
    parts, bits = restore("test parts", np.intp(kept.ctypes.data))
    found = np.float64(0)
    for row in range(parts.numbers.shape[0]):
        for column in range(parts.numbers.shape[1]):
            found += parts.numbers[row, column]
    return found * parts.share + parts.added + bits[1]


def kept_parts(numbers: Any, bits: Any) -> Any:
    return keep("test parts", (Parts(numbers, 7, np.float32(0.5)), bits))


def test_a_kernel_finds_what_was_kept_for_it() -> None:
    numbers, bits = np.ones((3, 5), np.float32), np.array([1, 100], np.uint16)

    assert total(kept_parts(numbers, bits)) == 3 * 5 * 0.5 + 7 + 100
    longer = np.ones((4, 5), np.float32)  # of another size, but the same type
    assert total(kept_parts(longer, bits)) == 4 * 5 * 0.5 + 7 + 100


@pytest.mark.parametrize(
    "numbers",
    [np.ones(15, np.float32), np.ones((3, 5)), np.ones((3, 5), np.float32).T],
    ids=["other dimensions", "other numbers", "other strides"],
)
def test_a_name_stands_for_one_type(numbers: Any) -> None:
    bits = np.zeros(2, np.uint16)
    kept_parts(np.ones((3, 5), np.float32), bits)

    with pytest.raises(AssertionError, match="of one type"):
        kept_parts(numbers, bits)
