"""The precision to compute in and what multiplies in it, chosen by what the machine has."""

from dataclasses import dataclass

import torch

from engine.errors import StartRefused
from engine.linear_cpu import kind_of
from engine.tile_cpu import arithmetic

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """What was chosen. 8 bits are the products' alone: embeddings and cache are bfloat16 then."""

    name: str  # float32, bfloat16 or int8
    products: str  # the instructions that multiply, or GPU
    reason: str  # for people, without a full stop

    @property
    def dtype(self) -> torch.dtype:
        """Of everything but weights of 8 bits."""
        return _DTYPES[self.name]

    @property
    def quantizes(self) -> bool:
        """Whether weights have 8 bits."""
        return self.name == "int8"


def choose_precision(asked: str, device: torch.device) -> Precision:
    """Choose as `--dtype` says; `auto` is bfloat16 where that is faster, never int8.

    A processor reads half as much in bfloat16, whatever it multiplies in; a GPU that would emulate
    it takes float32. bfloat16 keeps logits in float32 and so the order of tokens; 8 bits change it
    now and then, and want to be asked for. Raises StartRefused for those on a GPU.
    """
    on_gpu = device.type == "cuda"
    if on_gpu and asked == "int8":
        raise StartRefused(
            reason="dtype int8 is for processors, not for GPUs; use --dtype auto, or --device cpu."
        )
    name, why = asked, f"{asked} was asked for"
    if asked == "auto":
        if on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
            name, why = "float32", "auto chose float32, as this GPU would only emulate bfloat16"
        else:
            name = "bfloat16"
            why = "auto chose bfloat16, half of float32's bytes and exact enough"
    if on_gpu:
        return Precision(name=name, products="GPU", reason=f"{why}; products on the GPU")
    kind = kind_of(_DTYPES[name], quantizes=name == "int8")
    products = arithmetic(kind).name
    return Precision(name=name, products=products, reason=f"{why}; products with {products}")
