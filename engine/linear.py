"""Matrix products as the engine runs them: weights packed once at load, where that pays.

On a CPU with AVX-512, the network is one kernel of our own (`network_avx512.py`). Without, oneDNN
takes the weights, packed in a layout of its own choosing, which `F.linear` would
rearrange for every product. Both give a row the same bytes however many rows come with it, which
`F.linear` does not (`tests/engine/test_linear.py` looks at every count).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.fused_avx512 import BFLOAT16, FLOAT32, INT8
from engine.linear_avx512 import has_avx512
from model.config import Activation
from model.gpt import ACTIVATIONS, GPT, Block

# oneDNN's names of our activations: (attribute, algorithm).
_FUSED: dict[Activation | None, tuple[str, str]] = {
    None: ("none", ""),
    "gelu_new": ("gelu", "tanh"),
    "gelu": ("gelu", "none"),
    "relu": ("relu", ""),
}


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this machine has packed products for a dtype."""
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if device.type != "cpu" or not has_onednn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def can_fuse(device: torch.device, dtype: torch.dtype, *, quantizes: bool = False) -> bool:
    """Whether this machine has our own kernels for a dtype, with weights of 8 bits if asked for."""
    kinds = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
    if device.type != "cpu" or dtype not in kinds:
        return False
    return has_avx512(INT8 if quantizes else kinds[dtype])


class PackedLinear(nn.Module):
    """y = activation(x W^T + b) by oneDNN with W packed; float32 or bfloat16, see `can_pack`."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, activation: Activation | None = None
    ) -> None:
        """Pack weight (out, in); the caller may drop its own copy."""
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = None if bias is None else bias.detach()
        self._attribute, self._algorithm = _FUSED[activation]
        self._least_rows = self._find_least_rows(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, in) to (N, out)."""
        num_rows = len(x)
        if num_rows < self._least_rows:
            x = torch.cat((x, x.new_zeros(self._least_rows - num_rows, x.shape[1])))
        return self._multiply(x)[:num_rows]

    def _multiply(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, self._attribute, [], self._algorithm
        )
        return y

    def _find_least_rows(self, weight: Tensor) -> int:
        """The fewest rows that get the bytes they would get among many.

        In float32, a row alone goes another way through oneDNN and ends in other last bits; with
        some versions and shapes up to 15 do. So it is tried with 31, 15, 7, 3 rows and 1.
        """
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(64, weight.shape[1], generator=generator).to(weight.dtype)
        among_many = self._multiply(x)
        for least in (32, 16, 8, 4, 2):
            if not torch.equal(self._multiply(x[: least - 1]), among_many[: least - 1]):
                return least
        return 1


class PackedMLP(nn.Module):
    """The MLP of a block in two packed products, the activation fused into the first."""

    def __init__(self, c_fc: nn.Linear, c_proj: nn.Linear, activation: Activation) -> None:
        super().__init__()
        self.c_fc = PackedLinear(c_fc.weight, c_fc.bias, activation)
        self.c_proj = PackedLinear(c_proj.weight, c_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, C) to (N, C)."""
        y: Tensor = self.c_proj(self.c_fc(x))
        return y


class Head(nn.Module):
    """The tied output head: hidden states to float32 logits, in any precision of the model.

    It takes the last LayerNorm along, which only rows need whose logits are wanted.
    """

    def __init__(
        self,
        weight: Tensor,
        vocab_size: int,
        *,
        norm: nn.LayerNorm | None = None,
    ) -> None:
        """Take the embedding's rows below `vocab_size`; those above are padding."""
        super().__init__()
        self._norm = norm
        # Products in the precision of the model are rounded to it, which is too coarse for logits.
        weight = weight.detach()[:vocab_size].float()
        is_packed = can_pack(weight.device, weight.dtype)
        self._product = PackedLinear(weight, None) if is_packed else None
        self._weight = None if is_packed else weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden (R, C) to logits (R, vocab_size) in float32."""
        if self._norm is not None:
            hidden = self._norm(hidden)
        hidden = hidden.float()
        if self._weight is not None:
            return F.linear(hidden, self._weight)
        assert self._product is not None
        logits: Tensor = self._product(hidden)
        return logits


def pack(model: GPT) -> None:
    """Replace the projections of a GPT's blocks in place by packed ones, where there are such."""
    weight = model.wte.weight
    if not can_pack(weight.device, weight.dtype):
        return
    for block in model.h:
        assert isinstance(block, Block)
        for name in ("c_attn", "c_proj"):
            linear = getattr(block.attn, name)
            setattr(block.attn, name, PackedLinear(linear.weight, linear.bias))
        packed = PackedMLP(block.mlp.c_fc, block.mlp.c_proj, model.config.activation)
        setattr(block, "mlp", packed)  # noqa: B010  its declared type is the plain one


assert set(_FUSED) - {None} == set(ACTIVATIONS), "every activation has its fused form"
