"""Engines that decode from what lies on the device, for the tests of that."""

from typing import Any

from engine.attention import PagedAttention
from engine.cuda_graph import DecodeStep
from engine.sampling_params import SamplingParams

# A step ahead, too: only where blocks of completions are not shared.
ON_DEVICE: dict[str, Any] = {
    "attention": PagedAttention,
    "decode_step": DecodeStep,
    "share_completion_blocks": False,
}


def params(**changes: Any) -> SamplingParams:
    """Twelve tokens, whatever they are, unless told otherwise."""
    settings: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True, "seed": 7, **changes}
    return SamplingParams(**settings)
