"""The precision to compute in and what multiplies in it, chosen by what the machine has."""

from dataclasses import dataclass

import torch

from engine.errors import StartRefused
from engine.linear import can_fuse, can_pack

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """The precisions in which a machine has each kind of product; torch's own are everywhere."""

    own: frozenset[str]  # our kernels for AVX-512
    packed: frozenset[str]  # oneDNN's with packed weights
    gpu: frozenset[str] = frozenset()  # empty on a processor

    @classmethod
    def of(cls, device: torch.device) -> "Abilities":
        """What is here."""
        if device.type == "cuda":
            has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
            gpu = {"float32", "bfloat16"} if has_bfloat16 else {"float32"}
            return cls(own=frozenset(), packed=frozenset(), gpu=frozenset(gpu))
        own = {n for n in _DTYPES if can_fuse(device, _DTYPES[n], quantizes=n == "int8")}
        packed = {n for n in _DTYPES if n != "int8" and can_pack(device, _DTYPES[n])}
        return cls(own=frozenset(own), packed=frozenset(packed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """What was chosen. 8 bits are the weights' alone: the other numbers are bfloat16 then."""

    name: str  # float32, bfloat16 or int8
    products: str  # whose they are: kvik, onednn, torch or gpu
    reason: str  # for people, without a full stop

    @property
    def dtype(self) -> torch.dtype:
        """Of everything but weights of 8 bits."""
        return _DTYPES[self.name]

    @property
    def quantizes(self) -> bool:
        """Whether weights have 8 bits."""
        return self.name == "int8"


def choose_precision(asked: str, abilities: Abilities) -> Precision:
    """Choose as `--dtype` says; `auto` is bfloat16 where the machine multiplies in it, never int8.

    bfloat16 keeps logits in float32 and so the order of tokens; 8 bits change it now and then, and
    want to be asked for. Raises StartRefused for weights of 8 bits that the machine cannot use.
    """
    fast = abilities.own | abilities.packed | abilities.gpu
    if asked == "int8" and "int8" not in abilities.own:
        raise StartRefused(
            reason="dtype int8 needs a CPU with AVX-512 VNNI, which is not here; use --dtype auto."
        )
    name, why = asked, f"{asked} was asked for"
    if asked == "auto":
        name = "bfloat16" if "bfloat16" in fast else "float32"
        why = (
            "auto chose bfloat16, half of float32's bytes and exact enough"
            if name == "bfloat16"
            else "auto chose float32, as nothing here multiplies in bfloat16"
        )
    products, how = _products(name, abilities)
    return Precision(name=name, products=products, reason=f"{why}; {how}")


def _products(name: str, abilities: Abilities) -> tuple[str, str]:
    if name in abilities.gpu or (abilities.gpu and name == "bfloat16"):
        return "gpu", "products on the GPU"
    if name in abilities.own:
        return "kvik", "products by our kernels for AVX-512"
    if name in abilities.packed:
        return "onednn", f"no AVX-512 for our {name} kernels, so products are oneDNN's, packed"
    slow = f"no AVX-512 for our {name} kernels and no oneDNN for packed {name} products, so they "
    return "torch", slow + "are torch's own, which is slow"
