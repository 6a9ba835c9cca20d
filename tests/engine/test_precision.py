"""What is chosen to compute in, and what is said of it."""

import pytest
import torch

from engine.errors import StartRefused
from engine.precision import choose_precision
from engine.tile_cpu import BFLOAT16, FLOAT32, INT8, arithmetic

CPU, GPU = torch.device("cpu"), torch.device("cuda")
KINDS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "int8": INT8}


def test_a_processor_computes_in_bfloat16_unless_asked_otherwise() -> None:
    chosen = choose_precision("auto", CPU)

    assert chosen.name == "bfloat16"
    assert chosen.reason.startswith("auto chose bfloat16, half of float32's bytes")


@pytest.mark.parametrize("asked", KINDS)
def test_what_was_asked_for_is_taken_and_its_instructions_named(asked: str) -> None:
    chosen = choose_precision(asked, CPU)

    assert chosen.name == asked
    assert chosen.products == arithmetic(KINDS[asked]).name
    assert chosen.reason == f"{asked} was asked for; products with {chosen.products}"


@pytest.mark.parametrize(("has_bfloat16", "name"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_computes_in_bfloat16_where_it_need_not_emulate_it(
    monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)

    chosen = choose_precision("auto", GPU)

    assert (chosen.name, chosen.products) == (name, "GPU")
    assert chosen.reason.startswith(f"auto chose {name}")


def test_8_bits_are_refused_on_a_gpu() -> None:
    with pytest.raises(StartRefused, match="int8 is for processors"):
        choose_precision("int8", GPU)


def test_only_weights_have_8_bits() -> None:
    assert choose_precision("int8", CPU).quantizes
    assert choose_precision("int8", CPU).dtype == torch.bfloat16
    assert not choose_precision("bfloat16", CPU).quantizes
