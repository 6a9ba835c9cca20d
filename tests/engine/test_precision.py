"""What is chosen on machines with and without each kind of product, and what is said of it."""

import pytest
import torch

from engine.errors import StartRefused
from engine.precision import Abilities, choose_precision


def abilities(*, own: str = "", packed: str = "", gpu: str = "") -> Abilities:
    return Abilities(
        own=frozenset(own.split()), packed=frozenset(packed.split()), gpu=frozenset(gpu.split())
    )


ZEN5 = abilities(own="float32 bfloat16 int8", packed="float32 bfloat16")
SKYLAKE = abilities(own="float32", packed="float32")  # AVX-512, and nothing but float32 in it
AVX2 = abilities(packed="float32")
GRAVITON = abilities(packed="float32 bfloat16")  # ARM with oneDNN and bfloat16
BARE = abilities()
H200 = abilities(gpu="float32 bfloat16")


@pytest.mark.parametrize(
    ("machine", "name", "products", "said"),
    [
        (ZEN5, "bfloat16", "kvik", "products by our kernels for AVX-512"),
        (SKYLAKE, "float32", "kvik", "nothing here multiplies in bfloat16"),
        (AVX2, "float32", "onednn", "no AVX-512 for our float32 kernels, so products are oneDNN's"),
        (GRAVITON, "bfloat16", "onednn", "no AVX-512 for our bfloat16 kernels"),
        (BARE, "float32", "torch", "no oneDNN for packed float32 products"),
        (H200, "bfloat16", "gpu", "products on the GPU"),
        (abilities(gpu="float32"), "float32", "gpu", "nothing here multiplies in bfloat16"),
    ],
)
def test_auto_takes_the_best_that_the_machine_has_and_says_why(
    machine: Abilities, name: str, products: str, said: str
) -> None:
    chosen = choose_precision("auto", machine)

    assert (chosen.name, chosen.products) == (name, products)
    assert chosen.reason.startswith(f"auto chose {name}")
    assert said in chosen.reason


@pytest.mark.parametrize(
    ("machine", "asked", "products"),
    [(ZEN5, "int8", "kvik"), (ZEN5, "float32", "kvik"), (SKYLAKE, "bfloat16", "torch"),
     (AVX2, "bfloat16", "torch"), (GRAVITON, "float32", "onednn")],
)  # fmt: skip
def test_what_was_asked_for_is_taken_and_a_fallback_named(
    machine: Abilities, asked: str, products: str
) -> None:
    chosen = choose_precision(asked, machine)

    assert (chosen.name, chosen.products) == (asked, products)
    assert chosen.reason.startswith(f"{asked} was asked for")
    assert ("slow" in chosen.reason) == (products == "torch")


@pytest.mark.parametrize("machine", [SKYLAKE, AVX2, GRAVITON, BARE, H200])
def test_8_bits_are_refused_where_nothing_multiplies_in_them(machine: Abilities) -> None:
    with pytest.raises(StartRefused, match="AVX-512 VNNI"):
        choose_precision("int8", machine)


def test_only_weights_have_8_bits() -> None:
    assert choose_precision("int8", ZEN5).quantizes
    assert choose_precision("int8", ZEN5).dtype == torch.bfloat16
    assert not choose_precision("bfloat16", ZEN5).quantizes


def test_this_machine_can_run_what_auto_chooses_here() -> None:
    chosen = choose_precision("auto", Abilities.of(torch.device("cpu")))

    assert chosen.name in ("float32", "bfloat16")
