"""What is new of a choice, as replies are made of it: text, logprobs, ids and how it ended.

Knows how a model spells its tokens, and neither where they come from nor HTTP.
"""

from dataclasses import dataclass, field
from typing import Any

from engine.messages import TopLogprobs
from server.served_model import ServedModel

_LEAST_LOGPROB = -9999.0  # in place of minus infinity, which JSON has not


@dataclass(slots=True)
class LogprobLists:
    """The four parallel lists of a reply's `logprobs`."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def append(
        self, model: ServedModel, token_id: int, top: TopLogprobs | None, offset: int
    ) -> None:
        """Add a token; without `top`, one that nothing predicted."""
        spelling = model.spell(token_id)
        self.tokens.append(spelling)
        self.text_offset.append(offset)
        if top is None:
            self.token_logprobs.append(None)
            self.top_logprobs.append(None)
            return
        logprob = max(top.logprob, _LEAST_LOGPROB)
        alternatives = {
            model.spell(i): max(value, _LEAST_LOGPROB)
            for i, value in zip(top.token_ids, top.logprobs, strict=True)
        }
        alternatives.setdefault(spelling, logprob)
        self.token_logprobs.append(logprob)
        self.top_logprobs.append(alternatives)

    def extend(self, other: "LogprobLists") -> None:
        """Add what another has behind what this one has."""
        self.tokens += other.tokens
        self.token_logprobs += other.token_logprobs
        self.top_logprobs += other.top_logprobs
        self.text_offset += other.text_offset

    def to_reply(self) -> dict[str, Any]:
        """As it goes over the wire."""
        return {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }


@dataclass(slots=True)
class Delta:
    """What is new of one choice."""

    text: str = ""
    logprobs: LogprobLists | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
