"""Attention over the paged cache in plain torch: the reference of every faster one."""

import torch
from torch import Tensor

from engine.batch import ModelInput
from engine.kv_cache import KVCache
from model.config import GPTConfig


class PagedAttention:
    """An `Attend` over block tables, for any device; each row sees its sequence up to itself.

    Writes the keys and values of the whole batch before any row reads, so rows may share blocks
    that this very step fills. Reads nothing back to the host and has the same shapes whatever the
    sequences' lengths, as a captured graph needs. It gathers (N, L, H, D): obvious, and wasteful
    for long prompts. Paging as in PagedAttention (Kwon et al., 2023, arXiv:2309.06180).
    """

    def __init__(self, config: GPTConfig, cache: KVCache, batch: ModelInput) -> None:
        self._cache = cache
        self._batch = batch
        self._scales = [config.attention_scale(layer) for layer in range(config.n_layer)]
        length = batch.block_tables.shape[1] * cache.block_size
        places = torch.arange(length, device=batch.positions.device)
        self._visible = places <= batch.positions[:, None]  # (N, L)
        self._tables = batch.block_tables[batch.row_sequences]  # (N, blocks)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend in layer `layer`: q, k, v (N, H, D) -> (N, H, D)."""
        cache, batch = self._cache, self._batch
        cache.write(layer, batch.slot_blocks, batch.slot_offsets, k, v)
        # (N, blocks, H, block_size, D) -> (N, H, L, D)
        keys, values = (t.transpose(1, 2).flatten(2, 3) for t in cache.read(layer, self._tables))
        scores = torch.einsum("nhd,nhld->nhl", q.float(), keys) * self._scales[layer]
        scores = scores.masked_fill(~self._visible[:, None], -torch.inf)
        return torch.einsum("nhl,nhld->nhd", scores.softmax(-1), values).to(q.dtype)
