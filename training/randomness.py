"""Every random choice of a run, as a function of its seed and place; keeps no state."""

import numpy as np
from numpy.typing import NDArray

# The word behind the seed, so that each of these draws from a stream of its own.
WEIGHTS, DROPOUT, SAMPLE = 1, 2, 3


def random_bits(*words: int) -> int:
    """63 random bits as a pure function of some integers, by rounds of splitmix64."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        state = mix(state + np.uint64(word % 2**64))
    return int(state[0] >> np.uint64(1))


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One round of splitmix64 (Steele, Lea and Flood, 2014), elementwise, modulo 2**64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
