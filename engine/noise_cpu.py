"""The noise of tokens in a CPU's kernels: `engine.random_stream`, bit by bit; knows no logits.

Of most noise only the top byte is computed, which is a sixteenth of a block of the generator. The
loud tokens, those with the highest top byte (one in 256), get all their bits.
"""

import math
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import types

from engine.cpu_ir import SIZE, call
from engine.cpu_math import EXACT
from engine.random_stream import GROUP, LOUD, MULTIPLIERS, WEYL

_CHUNK = np.uintp(64)  # groups that are looked through for loud tokens while they are near
_GROUP = np.uintp(GROUP)
_LOUD = np.uint64(LOUD)
_ONES = np.uint64(0x0101010101010101)  # in each byte
_SIGNS, _REST = _ONES << np.uint64(7), ~(_ONES << np.uint64(7))
_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_M0, _M1 = (np.uint64(value) for value in MULTIPLIERS)
_W0, _W1 = (np.uint64(value) for value in WEYL)

_compiled = numba.njit(**EXACT)
# Long as it is, LLVM would not bring such a function into the loops that call it.
_inlined = numba.njit(inline="always")


class Key(NamedTuple):
    """What a row's noise depends on beside the token id, each uint64."""

    seed: Any
    choice: Any
    position: Any


class Noise(NamedTuple):
    """What is known of a row's noise."""

    key: Any
    tops: Any  # (2, groups) uint64: the top bytes of the first 8 tokens of 16, and of the others
    loud: Any  # (n,) uint32: the loud tokens
    bits: Any  # (n,) uint64: their 23 bits


@numba.extending.intrinsic
def _lowest_bit(context: Any, word: Any) -> Any:
    """The place of the lowest bit of a word that is not 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return call(builder, "llvm.cttz.i64", SIZE, arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uintp(types.uint64), generate


@_inlined
def _words_at(key: Any, index: Any, part: Any) -> Any:
    """Compute the generator's four words at a counter, two and two together, the first lowest."""
    c0, c1, c2, c3 = index, key.position, key.choice, part
    k0, k1 = key.seed & _MASK, key.seed >> _HALF
    for _ in range(10):
        # What lies above a word's 32 bits is left there until the end.
        p0, p1 = (c0 & _MASK) * _M0, (c2 & _MASK) * _M1
        c0, c1 = (p1 >> _HALF) ^ c1 ^ k0, p1
        c2, c3 = (p0 >> _HALF) ^ c3 ^ k1, p0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return (c0 & _MASK) | (c1 << _HALF), (c2 & _MASK) | (c3 << _HALF)


@_compiled
def bits_of(key: Any, token: Any, top: Any) -> Any:
    """Compute the 23 bits of a token whose top byte is known."""
    early, late = _words_at(key, np.uint64(token >> np.uintp(3)), np.uint64(1))
    four = late if token & np.uintp(4) else early
    low = (four >> np.uint64((token & np.uintp(3)) << np.uintp(4))) & np.uint64(0xFFFF)
    return (np.uint64(top) << np.uint64(15)) | (low >> np.uint64(1))


@_compiled
def gumbel_of(bits: Any) -> Any:
    """Turn the bits of a token into its noise, float64 of a float32."""
    u = (np.float64(np.int64(bits)) + 0.5) * 2.0**-23
    return np.float64(np.float32(-math.log(-math.log(u))))


@_compiled
def top_byte(tops: Any, token: Any) -> Any:
    """Look up the top byte of a token."""
    eight = tops[(token >> np.uintp(3)) & np.uintp(1), token // _GROUP]
    return (eight >> np.uint64((token & np.uintp(7)) << np.uintp(3))) & _LOUD


@_inlined
def _are_loud(tops: Any) -> Any:
    """The highest bit of each byte that is 255."""
    return ((tops & _REST) + _ONES) & tops & _SIGNS


@_compiled
def make_noise(key: Any, size: Any) -> Any:
    """Compute the top bytes of `size` tokens, and all bits of the loud ones."""
    num_groups = (size + _GROUP - np.uintp(1)) // _GROUP
    tops = np.empty((2, num_groups), np.uint64)
    # Room for all and one that is none; of its memory only what is written is ever taken.
    loud = np.empty(size + np.uintp(1), np.uint32)
    are_loud = np.empty(_CHUNK, np.uint64)
    count = np.uintp(0)
    for start in range(np.uintp(0), num_groups, _CHUNK):
        stop = min(start + _CHUNK, num_groups)
        for i in range(start, stop):
            early, late = _words_at(key, np.uint64(i), np.uint64(0))
            tops[0, i], tops[1, i] = early, late
            are_loud[i - start] = _are_loud(early) >> np.uint64(7) | _are_loud(late)
        for i in range(start, stop):
            found = are_loud[i - start]
            while found != 0:
                bit = _lowest_bit(found)
                # Tokens 0 and 8 have the first and the last bit of a byte, 1 and 9 of the next.
                token = i * _GROUP + (bit >> np.uintp(3)) + (bit & np.uintp(1)) * np.uintp(8)
                loud[count] = token
                count += np.uintp(token < size)
                found &= found - np.uint64(1)
    loud = loud[:count]
    bits = np.empty(count, np.uint64)
    for j in range(count):
        bits[j] = bits_of(key, np.uintp(loud[j]), _LOUD)
    return Noise(key, tops, loud, bits)
