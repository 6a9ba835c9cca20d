"""The network as a step runs it: rows in, hidden states and logits out, whatever computes them.

One kernel where there is one, else module by module; knows no requests and draws nothing.
"""

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attention import PagedAttention
from engine.attention_cpu import CPUPagedAttention
from engine.batch import Array, NetworkOutput, Rows
from engine.cuda_graph import AttentionFactory
from engine.kv_cache import KVCache
from engine.linear_cpu import FusedLinear, PackedWeights
from engine.network_cpu import FusedNetwork
from model.config import Activation
from model.gpt import GPT, Block


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


class Linear(nn.Module):
    """A linear layer of a CPU by our kernels, in the precision of its input.

    Unlike torch's own, it gives a row the same bytes in any company.
    """

    def __init__(self, linear: nn.Linear, activation: Activation | None = None) -> None:
        """Pack its weights; the caller may drop it."""
        super().__init__()
        self._product = FusedLinear(linear.weight, linear.bias, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, in) to (N, out)."""
        y: Tensor = self._product(x)
        return y.to(x.dtype)


class Head(nn.Module):
    """The tied output head as torch has it: hidden states to float32 logits in any precision.

    It takes the last LayerNorm along, which only rows need whose logits are wanted.
    """

    def __init__(self, weight: Tensor, norm: nn.LayerNorm) -> None:
        """Take the embedding's rows that are no padding."""
        super().__init__()
        self._norm = norm
        # Products in the precision of the model are rounded to it, which is too coarse for logits.
        self._weight = weight.detach().float()

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden (R, C) to logits (R, vocab_size) in float32."""
        return F.linear(self._norm(hidden).float(), self._weight)


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
    device = weight.device
    if use_triton:
        from engine.attention_triton import TritonAttention
        from engine.block_triton import fuse

        fused = fuse(model, vocab_size, same_bytes=same_bytes)
        return ModularNetwork(model, fused, cache, attention or TritonAttention(device))
    if fuses and attention is None and device.type == "cpu":
        return FusedNetwork(model, cache, vocab_size, quantizes=quantizes)
    assert not quantizes, "loading refuses weights of 8 bits here"
    on_cpu = device.type == "cpu"
    if attention is None:
        attention = CPUPagedAttention if on_cpu else PagedAttention
    embedding = weight[:vocab_size]
    head = FusedLinear(embedding, norm=model.ln_f) if on_cpu else Head(embedding, model.ln_f)
    setattr(model, "ln_f", nn.Identity())  # noqa: B010  it is the head's now
    if on_cpu:
        _replace_linear_layers(model)
    return ModularNetwork(model, head, cache, attention)


def _replace_linear_layers(model: GPT) -> None:
    """Have a model's projections multiplied by our kernels, the activation fused into the first."""
    for block in model.h:
        assert isinstance(block, Block)
        for name in ("c_attn", "c_proj"):
            setattr(block.attn, name, Linear(getattr(block.attn, name)))
        c_fc, c_proj = block.mlp.c_fc, block.mlp.c_proj
        wide = Linear(c_fc, model.config.activation)
        setattr(block, "mlp", nn.Sequential(wide, Linear(c_proj)))  # noqa: B010  it is typed MLP


def _count_bytes(value: object, held: dict[int, int]) -> None:
    """Add the tensors and arrays in a value, by where they lie, with the bytes of each."""
    if isinstance(value, Tensor):
        held[value.data_ptr()] = value.nbytes
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
