"""The network as a step runs it: rows in, hidden states and logits out, whatever computes them.

One kernel where there is one, else module by module; knows no requests and draws nothing.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from engine.attention import PagedAttention
from engine.attention_cpu import CPUPagedAttention
from engine.batch import Array, NetworkOutput, Rows
from engine.cuda_graph import AttentionFactory
from engine.kv_cache import KVCache
from engine.linear import Head, can_fuse, pack
from engine.linear_avx512 import PackedWeights
from engine.network_avx512 import FusedNetwork
from model.gpt import GPT


class Network(Protocol):
    """A model and its head over a paged cache."""

    def run(
        self, rows: Rows, chosen: Array | None = None, *, wants_best: bool = False
    ) -> NetworkOutput:
        """Compute rows N, and the logits of the `chosen` ones (R,): None chooses all.

        What it returns may be gone when the next call comes. `wants_best` asks for the best
        tokens, which may be granted or not.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits (R, vocab_size) of hidden states (R, C) of the last `run`."""
        ...

    @property
    def weights_bytes(self) -> int:
        """What model and head hold, in whatever form they were packed; shared memory once."""
        ...


class ModularNetwork:
    """A model whose modules are called one by one, on any device."""

    def __init__(
        self,
        model: GPT,
        head: nn.Module,
        cache: KVCache,
        attention: AttentionFactory,
    ) -> None:
        """Take a model and its head as they are; `attention` is made anew for each step."""
        self.model = model
        self.head = head
        self.attention = attention
        self._cache = cache

    @torch.inference_mode()
    def run(
        self, rows: Rows, chosen: Array | None = None, *, wants_best: bool = False
    ) -> NetworkOutput:
        """See `Network`."""
        batch = rows.to(self._cache.k.device, self._cache.block_size)
        attend = self.attention(self.model.config, self._cache, batch)
        hidden: Tensor = self.model(batch.tokens, batch.positions, attend)  # (N, C)
        if chosen is None:
            return NetworkOutput(hidden, self.logits(hidden))
        if not len(chosen):
            return NetworkOutput(hidden, hidden.new_empty((0, 0), dtype=torch.float32))
        some = hidden[torch.from_numpy(chosen).to(hidden.device)]
        return NetworkOutput(hidden, self.logits(some))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """See `Network`."""
        logits: Tensor = self.head(hidden)
        return logits

    @property
    def weights_bytes(self) -> int:
        """See `Network`."""
        held: dict[int, int] = {}
        for module in (*self.model.modules(), *self.head.modules()):
            for values in (module._parameters, module._buffers, module.__dict__):
                _count_bytes(values, held)
        return sum(held.values())


def make_network(
    model: GPT,
    cache: KVCache,
    *,
    vocab_size: int,
    attention: AttentionFactory | None,
    use_triton: bool,
    quantizes: bool,
    same_bytes: bool,
    fuses: bool,
) -> FusedNetwork | ModularNetwork:
    """Take over a model, whose layers are replaced in place where that pays.

    With `fuses`, and unless another attention than this machine's is given, it may be one kernel.
    Weights of 8 bits (`quantizes`) are for that kernel alone.
    """
    weight = model.wte.weight
    device, dtype = weight.device, weight.dtype
    if use_triton:
        from engine.attention_triton import TritonAttention
        from engine.block_triton import fuse

        fused = fuse(model, vocab_size, same_bytes=same_bytes)
        return ModularNetwork(model, fused, cache, attention or TritonAttention(device))
    if fuses and attention is None and can_fuse(device, dtype, quantizes=quantizes):
        return FusedNetwork(model, cache, vocab_size, quantizes=quantizes)
    assert not quantizes, "loading refuses weights of 8 bits here"
    if attention is None:
        attention = CPUPagedAttention if device.type == "cpu" else PagedAttention
    head = Head(weight, vocab_size, norm=model.ln_f)
    setattr(model, "ln_f", nn.Identity())  # noqa: B010  it is the head's now
    pack(model)
    return ModularNetwork(model, head, cache, attention)


def _count_bytes(value: object, held: dict[int, int]) -> None:
    """Add the tensors and arrays in a value, by where they lie, with the bytes of each."""
    if isinstance(value, Tensor):
        is_packed = value.is_mkldnn  # opaque: it does not tell where it lies
        held[id(value) if is_packed else value.data_ptr()] = value.numel() * value.itemsize
    elif isinstance(value, np.ndarray):
        held[value.ctypes.data] = value.nbytes
    elif isinstance(value, PackedWeights):
        _count_bytes(value.weights, held)
    elif isinstance(value, dict):
        for part in value.values():
            _count_bytes(part, held)
    elif isinstance(value, list | tuple):
        for part in value:
            _count_bytes(part, held)
