"""The requests: which fields they have, what each defaults to, and what cannot go together.

Knows nothing of a model: whether ids exist and prompts fit is asked later.
"""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.sampling_params import SamplingParams
from server.protocol.fields import (
    MAX_CHOICES,
    MAX_IDS,
    Int64,
    LogitBias,
    Prompt,
    RequestId,
    Stop,
    TokenId,
    number,
    refuse,
)


def _nullable(schema: dict[str, Any]) -> None:
    """In the documentation: null means the default, for every field that has one."""
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", []) and {"type": "null"} not in field.get(
            "anyOf", []
        ):
            outer = {key: field.pop(key) for key in ("default", "title", "description")
                     if key in field}  # fmt: skip
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **outer}


class Body(BaseModel):
    """A request's JSON object: strict types, no unknown fields, null for the default."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, json_schema_extra=_nullable)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool = Field(
        default=False, description="End with a chunk that has `usage` and no choices."
    )
    include_obfuscation: bool = Field(
        default=False,
        description="OpenAI's padding of chunks; only false is supported.",
        json_schema_extra={"const": False},
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.include_obfuscation:
            refuse(
                "must be false: chunks are not padded here", "stream_options.include_obfuscation"
            )
        return self


class CompletionRequest(Body):
    """OpenAI's completion request, and Kvik's own fields behind it."""

    model: str = Field(description="The served model's name, as /v1/models lists it.")
    prompt: Prompt | None = Field(
        default=None, description="Text, texts, token ids or lists of them; empty: from bos."
    )
    best_of: Annotated[int, Field(ge=1, le=20)] | None = Field(
        default=None,
        description="Candidates a prompt, of which the `n` with the best mean logprob return.",
    )
    echo: bool = Field(default=False, description="Begin the text with the prompt.")
    frequency_penalty: Annotated[float, number(-2, 2)] = 0.0
    logit_bias: LogitBias = Field(
        default_factory=dict, description="Added to logits, by token id; -100 bans."
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = Field(
        default=None,
        description="Alternatives a token, besides the token itself; 0 is the token alone.",
    )
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        default=16, description="Completion tokens at most."
    )
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = Field(
        default=1, description="Completions a prompt."
    )
    presence_penalty: Annotated[float, number(-2, 2)] = 0.0
    seed: Int64 | None = Field(
        default=None, description="Same seed, same bytes; drawn and told where absent."
    )
    stop: Stop = Field(
        default_factory=list, description="Up to 4 strings that end the text, themselves left out."
    )
    stream: bool = Field(default=False, description="Send text as it comes, as SSE.")
    stream_options: StreamOptions | None = Field(default=None, description="Only with `stream`.")
    temperature: Annotated[float, number(0, 2)] = Field(default=1.0, description="0 is greedy.")
    top_p: Annotated[float, number(0, 1)] = 1.0
    user: str | None = Field(default=None, description="Accepted, without effect.")
    safety_identifier: str | None = Field(default=None, description="Accepted, without effect.")
    metadata: dict[str, str] | None = Field(default=None, description="Accepted, without effect.")

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = Field(
        default=0, description="Most probable tokens kept; 0 and -1 keep all."
    )
    min_p: Annotated[float, number(0, 1)] = Field(
        default=0.0, description="Least probability, as a share of the most probable token's."
    )
    typical_p: Annotated[float, number(0, 1)] = 1.0
    repetition_penalty: Annotated[float, number(0.01, 100)] = Field(
        default=1.0, description="Divides the logits of tokens seen, in the prompt too."
    )
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        default=0, description="Completion tokens before anything may stop the text."
    )
    ignore_eos: bool = Field(default=False, description="Go on after the end-of-text token.")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_IDS)] = Field(
        default_factory=list, description="Tokens that end the text."
    )
    include_stop_str_in_output: bool = Field(
        default=False, description="Keep what ended the text, string or token."
    )
    skip_special_tokens: bool = Field(
        default=True, description="Leave special tokens out of the text."
    )
    truncate_prompt_tokens: (
        Annotated[int, Field(ge=-1, lt=2**31, json_schema_extra={"not": {"const": 0}})] | None
    ) = Field(
        default=None,
        description="Keep this many tokens from the prompt's end; -1: as many as fit.",
    )
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_IDS)] | None = (
        Field(default=None, description="Sample nothing else.")
    )
    return_token_ids: bool = Field(
        default=False, description="Add `prompt_token_ids` and `token_ids` to the choices."
    )
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = Field(
        default=0, description="Smaller goes first."
    )
    timeout_s: Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)] | None = Field(
        default=None, description="Seconds until the request is given up."
    )
    request_id: RequestId | None = Field(
        default=None, description="The request's id, before that of the header X-Request-Id."
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            refuse(f"must be at least n ({self.n}), got {self.best_of}", "best_of")
        if self.stream and self.num_candidates > self.n:
            refuse(
                "cannot be above n in a stream: candidates are ranked when they are complete",
                "best_of",
            )
        if self.stream_options is not None and not self.stream:
            refuse("needs stream to be true", "stream_options")
        if self.min_tokens > self.max_tokens:
            refuse(
                f"must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}",
                "min_tokens",
            )
        if self.truncate_prompt_tokens == 0:
            refuse("must be -1 or at least 1, got 0", "truncate_prompt_tokens")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, always as a list."""
        if self.prompt is None:
            return [""]
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return [*self.prompt]

    @property
    def num_candidates(self) -> int:
        """Choices generated a prompt, of which `n` are returned."""
        return self.n if self.best_of is None else self.best_of

    def to_sampling_params(self, *, seed: int) -> SamplingParams:
        """What the engine needs to know, with the effective seed."""
        logprobs = self.logprobs
        if logprobs is None and self.num_candidates > self.n:
            logprobs = 0  # candidates are ranked by them
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=max(0, self.top_k),
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            allowed_token_ids=(
                None if self.allowed_token_ids is None else tuple(self.allowed_token_ids)
            ),
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(self.stop_token_ids),
            has_stop_strings=bool(self.stop),
            logprobs=logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
            seed=seed,
        )


class TokenizeRequest(Body):
    """A text to turn into ids."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = Field(
        default=True, description="Without effect: this tokenizer adds none."
    )


class DetokenizeRequest(Body):
    """Ids to turn into text."""

    model: str | None = None
    tokens: list[TokenId]
