"""The network's layers on a GPU: the same mathematics as `model/gpt.py` in seven kernels a layer.

While decoding these are LayerNorm, the product to q, k and v, attention with the writing of K and
V (`attention_triton.py`), the product back with its residual, LayerNorm, the product into the MLP
with its activation, and the product out of it with its residual. The residual is added where the
product is stored, not in the next LayerNorm: it is read and written once either way, and a layer
stays a function of its input.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from engine.linear_triton import LibraryLinear, TritonLinear
from model.attention import Attend
from model.config import Activation
from model.gpt import GPT, Block

Product = TritonLinear | LibraryLinear


class TritonLayerNorm(nn.Module):
    """LayerNorm over the last dimension, computed in float32."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self._weight = norm.weight.detach()
        self._bias = None if norm.bias is None else norm.bias.detach()
        self._epsilon = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, C) to (N, C)."""
        assert x.is_contiguous(), "rows follow each other"
        out = torch.empty_like(x)
        width = x.shape[1]
        _layer_norm_kernel[(len(x),)](
            x, self._weight, self._bias, out, self._epsilon,
            WIDTH=width, PADDED_WIDTH=triton.next_power_of_2(width), num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
        return out


@triton.jit
def _layer_norm_kernel(
    x, weight, bias, out, epsilon, WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr
):
    """Normalise one row; `bias` may be None."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    channel = tl.arange(0, PADDED_WIDTH)
    is_channel = channel < WIDTH
    values = tl.load(x + row + channel, mask=is_channel, other=0.0).to(tl.float32)
    mean = tl.sum(values, 0) / WIDTH
    centred = tl.where(is_channel, values - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / WIDTH
    y = centred / tl.sqrt(variance + epsilon)
    y *= tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    tl.store(out + row + channel, y.to(out.dtype.element_ty), mask=is_channel)


class TritonBlock(nn.Module):
    """A `Block` of flat rows."""

    def __init__(
        self,
        block: Block,
        activation: Activation,
        product: type[TritonLinear] | type[LibraryLinear],
    ) -> None:
        super().__init__()
        attention, mlp = block.attn, block.mlp
        self._layer, self._n_head = attention.layer, attention.n_head
        self._ln_1, self._ln_2 = TritonLayerNorm(block.ln_1), TritonLayerNorm(block.ln_2)
        self._c_attn = product(attention.c_attn.weight, attention.c_attn.bias)
        self._c_proj = product(attention.c_proj.weight, attention.c_proj.bias)
        self._c_fc = product(mlp.c_fc.weight, mlp.c_fc.bias, activation=activation)
        self._mlp_c_proj = product(mlp.c_proj.weight, mlp.c_proj.bias)

    @property
    def products(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        """Its products, each as a map from rows (N, C): what must not depend on the row count."""
        return self._c_attn, self._c_proj, lambda x: self._mlp_c_proj(self._c_fc(x))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Map x (N, C) to (N, C)."""
        rows = self._c_attn(self._ln_1(x))
        q, k, v = rows.view(len(x), 3, self._n_head, -1).unbind(1)
        x = self._c_proj(attend(self._layer, q, k, v).flatten(-2), x)
        y: Tensor = self._mlp_c_proj(self._c_fc(self._ln_2(x)), x)
        return y


def fuse(model: GPT, vocab_size: int, *, same_bytes: bool = True) -> Product:
    """Replace the layers of a GPT in place; returns its head: hidden states to float32 logits.

    Without `same_bytes` the products are the library's, which chooses its kernels by the shape.
    The head's products are those of float32: two 16-bit numbers multiply without rounding.
    """
    product: type[TritonLinear] | type[LibraryLinear] = (
        TritonLinear if same_bytes else LibraryLinear
    )
    for index, block in enumerate(model.h):
        assert isinstance(block, Block)
        model.h[index] = TritonBlock(block, model.config.activation, product)
    setattr(model, "ln_f", TritonLayerNorm(model.ln_f))  # noqa: B010  its declared type is the plain one
    return product(model.wte.weight[:vocab_size], None, out_dtype=torch.float32)
