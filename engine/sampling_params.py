"""How one request wants its tokens chosen: plain values, checked once; knows no tensors."""

import math
from dataclasses import dataclass, field

COLDEST = 1e-30  # a colder temperature is as good as greedy, and dividing by it leaves float32


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """The sampling options of a request, ranges as in OpenAI's completions and vLLM's extensions.

    The order in which the sampler applies them: allowed ids, bias, min_tokens; penalties;
    temperature; top_k; top_p; min_p; typical_p. Raises ValueError, naming field, value and
    remedy. Ids are checked against the vocabulary by whoever knows it.
    """

    max_tokens: int = 16  # completion tokens at most; 0 only computes the prompt
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0  # over completion tokens
    frequency_penalty: float = 0.0  # over completion tokens
    repetition_penalty: float = 1.0  # over prompt and completion tokens; 1 is off
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None  # None allows every id
    min_tokens: int = 0  # no eos and no stop token before this many completion tokens
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    has_stop_strings: bool = False  # who reads the text may end it at any token
    logprobs: int | None = None  # alternatives a completion token; 0 is the token alone
    prompt_logprobs: int | None = None  # the same for every prompt token but the first
    seed: int = 0  # the effective seed: drawn at admission when the client gave none

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens must be at least 0, got {self.max_tokens}")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"min_tokens must be between 0 and max_tokens ({self.max_tokens}), "
                f"got {self.min_tokens}"
            )
        _check_range("temperature", self.temperature, 0, 2)
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 1, or 0 for off, got {self.top_k}")
        _check_range("top_p", self.top_p, 0, 1)
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("typical_p", self.typical_p, 0, 1)
        _check_range("presence_penalty", self.presence_penalty, -2, 2)
        _check_range("frequency_penalty", self.frequency_penalty, -2, 2)
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(
                f"repetition_penalty must be positive and finite, got {self.repetition_penalty}"
            )
        for token_id, bias in self.logit_bias.items():
            _check_range(f"logit_bias[{token_id}]", bias, -100, 100)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids must name at least one id, or be absent")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, or absent, got {value}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit in 64 bits with sign, got {self.seed}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # false for NaN as well
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")
