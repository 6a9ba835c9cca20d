"""Matrix products on a GPU, in Triton: one program, in tiles that never change, for any row count.

cuBLAS chooses its kernel by the shape, so that a row's last bits would depend on how many rows
come with it. Here the tiles follow from the weight and the device alone, nothing splits the sum,
and what comes after the product is done before it is stored.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from engine.triton_operands import operand_type
from model.config import Activation
from model.gpt import ACTIVATIONS

_SMALL_SHARED_BYTES = 99 * 1024  # what a block of any chip since Ampere may have

_WARPGROUP_ROWS = 64  # what the tensor cores of a Hopper chip take at once


class Tile(NamedTuple):
    """What one program computes, and how."""

    rows: int
    outs: int
    ins: int  # of the sum at a time
    num_warps: int
    num_stages: int  # pieces of the sum that lie in shared memory, all but one on their way

    def shared_bytes(self, bytes_per_value: int) -> int:
        """What the pieces take."""
        return self.num_stages * self.ins * (self.rows + self.outs) * bytes_per_value


def tile_of(num_out: int, num_in: int, *, bytes_per_value: int, shared_bytes: int) -> Tile:
    """Choose the tile of a weight (num_out, num_in) on a device with so much shared memory.

    One row reads every weight once and computes next to nothing: its speed is the number of bytes
    on their way at any moment. So there are about as many programs as an H200 has multiprocessors
    (132), and each asks for much of its part before the first has come. The head has programs
    enough; twice the rows halve what many rows read of it.
    """
    if bytes_per_value == 4:  # no tensor cores: large tiles do not fit into the registers
        outs = 16 if num_out <= 1024 else 32 if num_out <= 8192 else 64
        return Tile(_WARPGROUP_ROWS, outs, 64, num_warps=4, num_stages=4)
    if num_out > 8192:
        return Tile(2 * _WARPGROUP_ROWS, 64, 64, num_warps=8, num_stages=4)
    outs, ins = (16, 256) if num_out <= 1024 else (32, 128)
    while ins > 64 and ins >= 2 * num_in:
        ins //= 2
    tile = Tile(_WARPGROUP_ROWS, outs, ins, num_warps=4, num_stages=4)
    while tile.shared_bytes(bytes_per_value) > shared_bytes:
        tile = tile._replace(ins=tile.ins // 2)
    return tile


class TritonLinear(nn.Module):
    """y = activation(x W^T + b) + residual, added up in float32 and rounded once."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        activation: Activation | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        """Take weight (out, in) and bias (out,) as they lie; `out_dtype` if not the weight's."""
        super().__init__()
        assert weight.is_contiguous(), "kernels know no stride"
        self._weight = weight.detach()
        self._bias = None if bias is None else bias.detach()
        self._activation = activation
        self._out_dtype = out_dtype or weight.dtype
        num_out, self._num_in = weight.shape
        shared_bytes = _SMALL_SHARED_BYTES
        if weight.is_cuda:
            properties: Any = torch.cuda.get_device_properties(weight.device)
            shared_bytes = properties.shared_memory_per_block_optin
        self.tile = tile_of(
            num_out, self._num_in, bytes_per_value=weight.itemsize, shared_bytes=shared_bytes
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map x (N, in) to (N, out), and add a residual (N, out) if there is one."""
        num_rows, num_out = len(x), len(self._weight)
        assert x.stride(1) == 1, "a row's values lie together"
        out = torch.empty(num_rows, num_out, dtype=self._out_dtype, device=x.device)
        # Row tiles first: those that need the same weights run at the same time.
        tile = self.tile
        grid = (triton.cdiv(num_rows, tile.rows), triton.cdiv(num_out, tile.outs))
        _linear_kernel[grid](
            x, self._weight, self._bias, residual, out,
            num_rows, num_out, x.stride(0), num_out if residual is None else residual.stride(0),
            IN=self._num_in, ROWS=tile.rows, OUTS=tile.outs, INS=tile.ins,
            ACTIVATION=self._activation, OPERAND=operand_type(x.dtype),
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
        return out


class LibraryLinear(nn.Module):
    """The same by the library, cuBLAS: a kernel for each shape, split sums, bytes that vary."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        activation: Activation | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        """Take what `TritonLinear` takes."""
        super().__init__()
        self._weight = weight.detach()
        self._bias = None if bias is None else bias.detach()
        self._activation = activation
        self._out_dtype = out_dtype or weight.dtype

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map x (N, in) to (N, out), and add a residual (N, out) if there is one."""
        if self._out_dtype == x.dtype:
            y = F.linear(x, self._weight, self._bias)
        elif x.is_cuda:  # only there
            assert self._bias is None, "a head has none"
            y = torch.mm(x, self._weight.t(), out_dtype=self._out_dtype)
        else:
            y = F.linear(x.to(self._out_dtype), self._weight.to(self._out_dtype))
        if self._activation is not None:
            y = ACTIVATIONS[self._activation](y)
        return y if residual is None else y.add_(residual)


# Specialised to the number of rows, it would be another program for one row than for two.
@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x, weight, bias, residual, out, num_rows, num_out, x_stride, residual_stride,
    IN: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
    ACTIVATION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Compute one tile of the result; `bias` and `residual` may be None."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    is_row = row < num_rows
    is_column = column < num_out
    row = row.to(tl.int64)
    column = column.to(tl.int64)
    total = tl.zeros((ROWS, OUTS), tl.float32)
    for first in range(0, IN, INS):
        i = first + tl.arange(0, INS)
        is_in = i < IN
        some = tl.load(
            x + row[:, None] * x_stride + i[None, :],
            mask=is_row[:, None] & is_in[None, :], other=0.0,
        )  # fmt: skip
        weights = tl.load(
            weight + column[None, :] * IN + i[:, None],
            mask=is_column[None, :] & is_in[:, None], other=0.0,
        )  # fmt: skip
        total = tl.dot(some.to(OPERAND), weights.to(OPERAND), total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu_new":  # x / 2 (1 + tanh u) = x sigmoid(2 u)
        total *= tl.sigmoid(1.5957691216057308 * (total + 0.044715 * total * total * total))
    elif ACTIVATION == "gelu":
        total *= 0.5 * (1.0 + tl.erf(total * 0.7071067811865476))
    elif ACTIVATION == "relu":
        total = tl.where(total < 0, 0.0, total)  # NaN must stay NaN
    is_there = is_row[:, None] & is_column[None, :]
    if residual is not None:
        at = row[:, None] * residual_stride + column[None, :]
        total += tl.load(residual + at, mask=is_there, other=0.0).to(tl.float32)
    at = row[:, None] * num_out + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=is_there)
