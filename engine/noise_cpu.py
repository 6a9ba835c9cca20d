"""The noise of tokens in a CPU's kernels: `engine.random_stream`, token by token; knows no logits.

Of most noise only the top byte is computed, which is a sixteenth of a block of the generator.
"""

import math
from typing import Any

import numba
import numpy as np

from engine.cpu_math import EXACT
from engine.random_stream import MULTIPLIERS, WEYL

_CHUNK = np.uintp(256)  # groups whose words stay in the nearest cache
_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_M0, _M1 = (np.uint64(value) for value in MULTIPLIERS)
_W0, _W1 = (np.uint64(value) for value in WEYL)

_compiled = numba.njit(**EXACT)
_inlined = numba.njit(inline="always")


@_inlined
def noise_of(seed: Any, choice: Any, position: Any, token: Any, top: Any) -> Any:
    """Compute the noise of a token from its top byte, float64 of a float32."""
    k0, k1 = seed & _MASK, seed >> _HALF
    c0, c1, c2, c3 = np.uint64(token >> np.uintp(3)), position, choice, np.uint64(1)
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = (p0 >> _HALF) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    word = (token & np.uintp(7)) >> np.uintp(1)
    low = (c0 if word == 0 else c1) if word < 2 else (c2 if word == 2 else c3)
    low = (low >> np.uint64((token & np.uintp(1)) << np.uintp(4))) & np.uint64(0xFFFF)
    k = (np.uint64(top) << np.uint64(15)) | (low >> np.uint64(1))
    u = (np.float64(np.int64(k)) + 0.5) * 2.0**-23
    return np.float64(np.float32(-math.log(-math.log(u))))


@_inlined
def find_top_bytes(seed: Any, choice: Any, position: Any, groups: Any, words: Any) -> None:
    """Compute the top bytes of groups (n,): words (4, n), four bytes each.

    Round by round over some groups at a time: ten rounds in one loop would be more to compile.
    """
    size = np.uintp(len(groups))
    for start in range(np.uintp(0), size, _CHUNK):
        stop = min(start + _CHUNK, size)
        for i in range(start, stop):
            words[0, i] = groups[i]
            words[1, i] = np.uint32(position)
            words[2, i] = np.uint32(choice)
            words[3, i] = np.uint32(0)
        k0, k1 = seed & _MASK, seed >> _HALF
        for _ in range(10):
            for i in range(start, stop):
                p0, p1 = np.uint64(words[0, i]) * _M0, np.uint64(words[2, i]) * _M1
                words[0, i] = np.uint32((p1 >> _HALF) ^ np.uint64(words[1, i]) ^ k0)
                words[1, i] = np.uint32(p1)
                words[2, i] = np.uint32((p0 >> _HALF) ^ np.uint64(words[3, i]) ^ k1)
                words[3, i] = np.uint32(p0)
            k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
