"""Where keys and values are stored, in blocks; who owns which block is `BlockManager`'s to say."""

import math
import mmap

import torch
from torch import Tensor

from model.config import GPTConfig
from weights.ledger import SCALE_BYTES

# Kernels on a CPU read whole vectors, and so past the end of the last row.
_SLACK_BYTES = 64


class KVCache:
    """Keys and values of all layers: two tensors (n_layer, num_blocks, H, block_size, D).

    A head's tokens of one block lie next to each other, so that attention reads them in one run.
    Block 0 is nobody's: padding may be written there. In int8, D codes are followed by the four
    bytes of their scale, a float32; only `CPUPagedAttention` reads and writes those.
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
        shape = (config.n_layer, num_blocks, config.n_head, block_size, row)
        self.k = _zeros(shape, dtype, torch.device(device))
        self.v = _zeros(shape, dtype, torch.device(device))
        self.block_size = block_size

    def write(self, layer: int, blocks: Tensor, offsets: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v (N, H, D) at `offsets` (N,) in `blocks` (N,) of one layer."""
        self.k[layer][blocks, :, offsets] = k
        self.v[layer][blocks, :, offsets] = v

    def clear(self, blocks: list[int]) -> None:
        """Zero blocks that may hold NaN, which even a weight of zero would not silence."""
        self.k[:, blocks] = 0
        self.v[:, blocks] = 0

    @property
    def num_bytes(self) -> int:
        """What it takes when every block is in use."""
        return self.k.nbytes + self.v.nbytes


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that on a CPU take memory only where something is written, and no time to make.

    `torch.zeros` writes them: gigabytes, and seconds of every start. Raises OSError or torch's
    errors where there is not enough.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = math.prod(shape)
    pages = mmap.mmap(-1, count * dtype.itemsize + _SLACK_BYTES, flags=mmap.MAP_PRIVATE)
    return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)
