"""Where keys and values are stored, in blocks; who owns which block is `BlockManager`'s to say."""

import math

import numpy as np
import torch
from torch import Tensor

from engine.cpu_memory import huge_pages
from model.config import GPTConfig
from weights.ledger import SCALE_BYTES

# Kernels on a CPU read whole vectors of 16 rows, and so past the end of the last one.
_SLACK_ROWS = 16

# Memory of a CPU that is got before it is needed: for so many full contexts, but no more than some
# bytes; and so much at a time, which takes milliseconds and keeps no request waiting.
_AHEAD_CONTEXTS = 16
_AHEAD_BYTES = 2**29
_PIECE_BYTES = 2**21

LARGEST_FLOAT8 = 448.0  # of float8_e4m3fn, which has no infinity


class KVCache:
    """Keys and values of all layers: `kv` (num_blocks, n_layer, 2, H, block_size, D).

    A head's tokens of one block lie next to each other, so that attention reads them in one run. A
    block's layers follow each other, so that new memory is needed a little at a time: the system
    takes milliseconds for each large page of it. `k` and `v` are views (n_layer, num_blocks, H,
    block_size, D). Block 0 is nobody's: padding may be written there.

    In int8, D codes are followed by the four bytes of their scale, a float32; only
    `CPUPagedAttention` reads and writes those. float8_e4m3fn has no scale: its steps are a
    sixteenth of a value wherever that lies between 2^-6 and 448, a scale would only move these
    ends, and keys and values of GPT-2 are far from both.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        row = config.head_size + (SCALE_BYTES if dtype == torch.int8 else 0)
        shape = (num_blocks, config.n_layer, 2, config.n_head, block_size, row)
        self.kv = _zeros(shape, dtype, torch.device(device))
        self.k, self.v = (self.kv[:, :, kind].transpose(0, 1) for kind in (0, 1))
        self.block_size = block_size
        blocks_of_contexts = _AHEAD_CONTEXTS * -(-config.n_ctx // block_size)
        self._num_ahead = min(blocks_of_contexts, _AHEAD_BYTES // self.kv[0].nbytes)
        self._num_ready = 0  # blocks from the first on that have memory

    def prepare(self, num_used: int) -> bool:
        """Have the system give a little memory for the blocks behind the `num_used` first ones.

        Nobody may have written there yet. Returns False once there is enough for a while.
        """
        if self.kv.device.type != "cpu":
            return False  # it has its memory from the start
        first = max(num_used, self._num_ready)
        if first >= min(len(self.kv), num_used + self._num_ahead):
            return False
        self._num_ready = first + max(1, _PIECE_BYTES // self.kv[0].nbytes)
        _bits(self.kv)[first : self._num_ready] = 0
        return True

    def write(self, layer: int, blocks: Tensor, offsets: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v (N, H, D) at `offsets` (N,) in `blocks` (N,) of one layer."""
        for stored, new in ((self.k, k), (self.v, v)):
            _bits(stored[layer])[blocks, :, offsets] = _bits(self._as_stored(new))

    def read(self, layer: int, tables: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (..., H, block_size, D) in float32 of blocks (...), any shape of them."""
        k, v = (_bits(t[layer])[tables].view(t.dtype).float() for t in (self.k, self.v))
        return k, v

    def clear(self, blocks: list[int]) -> None:
        """Zero blocks that may hold NaN, which even a weight of zero would not silence."""
        _bits(self.kv)[blocks] = 0

    @property
    def num_bytes(self) -> int:
        """What it takes when every block is in use."""
        return self.kv.nbytes

    def _as_stored(self, values: Tensor) -> Tensor:
        if self.kv.dtype == torch.float8_e4m3fn:  # too large is largest, and NaN stays what it is
            values = values.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8)
        return values.to(self.kv.dtype)


def _bits(values: Tensor) -> Tensor:
    """The same memory in a type that torch can index: it cannot index 8-bit floats everywhere."""
    return values.view(torch.uint8) if values.itemsize == 1 else values


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that on a CPU take memory only where something is written, and no time to make.

    `torch.zeros` writes them: gigabytes, and seconds of every start. Raises OSError or torch's
    errors where there is not enough.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = math.prod(shape)
    num_bytes = count * dtype.itemsize
    slack = _SLACK_ROWS * (shape[-1] * dtype.itemsize + 64)
    pages = huge_pages((num_bytes + slack,), np.uint8)
    return torch.from_numpy(pages[:num_bytes]).view(dtype).view(shape)
