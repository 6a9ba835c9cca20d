"""What travels over the wire, to the letter: requests with their ranges, replies with their fields.

Knows shapes and ranges, and nothing of a model: whether ids exist and prompts fit is asked later.
"""

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any, NoReturn, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from engine.sampling_params import SamplingParams
from server.errors import InvalidRequest, shorten

MAX_CHOICES = 128  # of one request's prompt
MAX_PROMPTS = 2048
MAX_IDS = 1024  # in one field that lists ids

# Fields of other APIs, and what to do instead.
_UNSUPPORTED = {
    "suffix": "this model continues text and cannot fill a gap; leave suffix out",
    "messages": "this is the completions endpoint: put the text into prompt",
    "functions": "this model calls no functions",
    "tools": "this model calls no tools",
    "response_format": "output cannot be constrained to a format",
    "guided_json": "output cannot be constrained to a format",
    "guided_regex": "output cannot be constrained to a format",
    "guided_choice": "output cannot be constrained to a format",
    "structured_outputs": "output cannot be constrained to a format",
    "use_beam_search": "there is no beam search; best_of ranks samples",
    "length_penalty": "there is no beam search; best_of ranks samples",
    "bad_words": "ban tokens with a logit_bias of -100",
    "prompt_logprobs": "ask for echo together with logprobs",
    "cache_salt": "prefixes are shared among requests with the same API key only",
    "max_completion_tokens": "this endpoint's name for it is max_tokens",
    "max_new_tokens": "this endpoint's name for it is max_tokens",
}


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


def _refuse(message: str, param: str) -> NoReturn:
    # pydantic fills in what stands in braces
    raise PydanticCustomError("contract", "{message}", {"message": message, "param": param})


def _check_prompt(value: Any) -> Any:
    """A string, strings, ids or lists of ids; one look at the types, as prompts may be long."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        _refuse(
            "must be a string, a list of strings, a list of token ids or a list of such lists", ""
        )
    if not value:
        _refuse("must not be an empty list; an empty string starts from nothing", "")
    kinds = set(map(type, value))
    if kinds == {int}:
        return value
    if len(value) > MAX_PROMPTS:
        _refuse(f"must have at most {MAX_PROMPTS} prompts, got {len(value)}", "")
    if kinds == {str}:
        return value
    if kinds == {list}:
        for prompt in value:
            if not prompt:
                _refuse("must not contain an empty list of token ids", "")
            if set(map(type, prompt)) != {int}:
                _refuse("must have integers as token ids", "")
        return value
    _refuse("must have elements of one kind, strings, token ids or lists of token ids", "")


Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(_check_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {"type": "string"},
                    "minItems": 1,
                    "maxItems": MAX_PROMPTS,
                },
                {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": MAX_PROMPTS,
                    "items": {
                        "type": "array",
                        "items": {"type": "integer", "minimum": 0},
                        "minItems": 1,
                    },
                },
            ]
        }
    ),
]


def _check_stop(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or any(type(stop) is not str for stop in stops):
        _refuse("must be a string or a list of strings", "")
    if len(stops) > 4:
        _refuse(f"must have at most 4 strings, got {len(stops)}", "")
    for stop in stops:
        if not 1 <= len(stop) <= 1000:
            _refuse(f"must have strings of 1 to 1000 characters, got {len(stop)}", "")
        try:
            stop.encode()
        except UnicodeEncodeError:
            _refuse("must be valid Unicode", "")
    return stops


Stop = Annotated[
    list[str],
    PlainValidator(_check_stop),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": 1000},
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1, "maxLength": 1000},
                    "maxItems": 4,
                },
            ]
        }
    ),
]


def _check_logit_bias(value: Any) -> Any:
    if not isinstance(value, dict):
        _refuse("must be an object from token ids to numbers", "")
    if len(value) > MAX_IDS:
        _refuse(f"must have at most {MAX_IDS} entries, got {len(value)}", "")
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 9):
            _refuse(f"must have token ids as keys, got {shorten(key)}", "")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            _refuse(f"must have numbers from -100 to 100 as values, got {shorten(bias)}", "")
        biases[int(key)] = float(bias)
    return biases


LogitBias = Annotated[
    dict[int, float],
    PlainValidator(_check_logit_bias),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_IDS,
        }
    ),
]

_Id = Annotated[int, Field(ge=0, lt=2**31)]
_Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]


def _number(low: float, high: float) -> Any:
    return Field(ge=low, le=high, allow_inf_nan=False)


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
            _refuse(
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
    frequency_penalty: Annotated[float, _number(-2, 2)] = 0.0
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
    presence_penalty: Annotated[float, _number(-2, 2)] = 0.0
    seed: _Int64 | None = Field(
        default=None, description="Same seed, same bytes; drawn and told where absent."
    )
    stop: Stop = Field(
        default_factory=list, description="Up to 4 strings that end the text, themselves left out."
    )
    stream: bool = Field(default=False, description="Send text as it comes, as SSE.")
    stream_options: StreamOptions | None = Field(default=None, description="Only with `stream`.")
    temperature: Annotated[float, _number(0, 2)] = Field(default=1.0, description="0 is greedy.")
    top_p: Annotated[float, _number(0, 1)] = 1.0
    user: str | None = Field(default=None, description="Accepted, without effect.")
    safety_identifier: str | None = Field(default=None, description="Accepted, without effect.")
    metadata: dict[str, str] | None = Field(default=None, description="Accepted, without effect.")

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = Field(
        default=0, description="Most probable tokens kept; 0 and -1 keep all."
    )
    min_p: Annotated[float, _number(0, 1)] = Field(
        default=0.0, description="Least probability, as a share of the most probable token's."
    )
    typical_p: Annotated[float, _number(0, 1)] = 1.0
    repetition_penalty: Annotated[float, _number(0.01, 100)] = Field(
        default=1.0, description="Divides the logits of tokens seen, in the prompt too."
    )
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        default=0, description="Completion tokens before anything may stop the text."
    )
    ignore_eos: bool = Field(default=False, description="Go on after the end-of-text token.")
    stop_token_ids: Annotated[list[_Id], Field(max_length=MAX_IDS)] = Field(
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
    allowed_token_ids: Annotated[list[_Id], Field(min_length=1, max_length=MAX_IDS)] | None = Field(
        default=None, description="Sample nothing else."
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
            _refuse(f"must be at least n ({self.n}), got {self.best_of}", "best_of")
        if self.stream and self.num_candidates > self.n:
            _refuse(
                "cannot be above n in a stream: candidates are ranked when they are complete",
                "best_of",
            )
        if self.stream_options is not None and not self.stream:
            _refuse("needs stream to be true", "stream_options")
        if self.min_tokens > self.max_tokens:
            _refuse(
                f"must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}",
                "min_tokens",
            )
        if self.truncate_prompt_tokens == 0:
            _refuse("must be -1 or at least 1, got 0", "truncate_prompt_tokens")
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
    tokens: list[_Id]


class _Reply(BaseModel):
    """A shape for the documentation; replies are written without it."""


class Logprobs(_Reply):
    """Four lists with an entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Reply):
    """One completion, or in a stream what came of it."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: str | None = Field(description="stop or length; null until a stream's end.")
    stop_reason: str | int | None = Field(default=None, description="What string or id ended it.")
    seed: int | None = Field(default=None, description="The effective seed.")
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class PromptTokensDetails(_Reply):
    """Where prompt tokens came from."""

    cached_tokens: int


class CompletionTokensDetails(_Reply):
    """What became of completion tokens."""

    discarded_tokens: int = Field(description="Of best_of's candidates that were not returned.")


class Usage(_Reply):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Timings(_Reply):
    """Where the time went."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    total_seconds: float
    tokens_per_second: float | None = Field(description="Of all choices together, decoding.")
    num_preemptions: int


class CompletionResponse(_Reply):
    """A completion; a stream's chunks have the same fields."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    timings: Timings | None = None


class ErrorDetail(_Reply):
    """All four are always there."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(_Reply):
    """The body of every error."""

    error: ErrorDetail


class ModelCard(_Reply):
    """A served model."""

    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int


class ModelList(_Reply):
    """The served models."""

    object: str
    data: list[ModelCard]


class TokenizeResponse(_Reply):
    """The ids of a text."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeResponse(_Reply):
    """The text of ids."""

    prompt: str


class HealthResponse(_Reply):
    """Whether the server can be used, and if not, why."""

    status: str
    reason: str | None


class TimelineResponse(_Reply):
    """What happened to a request; times of events are seconds after its arrival."""

    request_id: str
    received_at: float = Field(description="Unix time.")
    stream: bool
    num_prompts: int
    n: int
    max_tokens: int
    state: str = Field(description="received, running or finished.")
    outcome: str | None = Field(description="stop, length, abort, error, rejected or timeout.")
    status: int | None
    events: dict[str, float]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    num_preemptions: int


class VersionResponse(_Reply):
    """What runs here; of the engine, once it has loaded."""

    version: str
    device: str | None
    dtype: str | None  # of the weights
    products: str | None  # whose they are: kvik, onednn, torch or gpu
    numerics: str | None  # why these two


BodyT = TypeVar("BodyT", bound=Body)


def parse_body(kind: type[BodyT], raw: bytes) -> BodyT:
    """Turn a request's body into `kind`; raises InvalidRequest with a sentence for the client."""
    document = _parse_json(raw)
    if not isinstance(document, dict):
        raise InvalidRequest("The body must be a JSON object.")
    for name in document:
        if name not in kind.model_fields:
            if document[name] is None and name in _UNSUPPORTED:
                continue  # clients that send every field send null
            raise _unknown_field(name, kind.model_fields)
    document = {name: value for name, value in document.items() if name in kind.model_fields}
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise _describe(error.errors(include_url=False)[0]) from None


def _parse_json(raw: bytes) -> Any:
    try:
        return json.loads(
            raw,
            parse_float=_parse_number,
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique,
        )
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are
        raise InvalidRequest(f"The body is not valid JSON: {_first_line(error)}.") from None


def _first_line(error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    return str(error).partition("\n")[0]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _parse_number(text: str) -> int | float:
    """JSON knows one kind of number: 2.0 is 2, also where an integer is wanted."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {shorten(name)} occurs twice in an object")
    return entries


def _unknown_field(name: str, fields: Mapping[str, Any], prefix: str = "") -> InvalidRequest:
    param = prefix + name[:100]
    if name in _UNSUPPORTED and not prefix:
        return InvalidRequest(
            f"{name} is not supported: {_UNSUPPORTED[name]}.",
            param=param,
            code="unsupported_parameter",
        )
    near = difflib.get_close_matches(name[:100], fields, n=1)
    hint = f" Did you mean {prefix}{near[0]}?" if near else ""
    return InvalidRequest(
        f"There is no field {shorten(prefix + name)}.{hint}", param=param, code="unknown_parameter"
    )


def _describe(error: ErrorDetails) -> InvalidRequest:
    """One validation error, as a sentence that begins with the field's name."""
    context = error.get("ctx", {})
    param = context.get("param") or ".".join(p for p in error["loc"] if isinstance(p, str))
    value = error["input"]
    kind = error["type"]
    if kind == "contract":
        return InvalidRequest(f"{param} {context['message']}.", param=param)
    if kind == "missing":
        return InvalidRequest(f"{param} is required.", param=param, code="missing_parameter")
    if kind == "extra_forbidden":
        fields = StreamOptions.model_fields if error["loc"][0] == "stream_options" else {}
        return _unknown_field(str(error["loc"][-1]), fields, f"{error['loc'][0]}.")
    if kind in _RANGES:
        word, name = _RANGES[kind]
        limit = context[name]
        if isinstance(limit, float) and limit.is_integer():
            limit = int(limit)  # JSON has one kind of number
        return InvalidRequest(f"{param} must be {word} {limit}, got {shorten(value)}.", param=param)
    if kind in _TYPES:
        return InvalidRequest(f"{param} must be {_TYPES[kind]}, got {shorten(value)}.", param=param)
    if kind in ("too_long", "too_short"):
        word = "at most" if kind == "too_long" else "at least"
        limit = context["max_length" if kind == "too_long" else "min_length"]
        entries = "1 entry" if limit == 1 else f"{limit} entries"
        return InvalidRequest(
            f"{param} must have {word} {entries}, got {context['actual_length']}.", param=param
        )
    if kind == "string_pattern_mismatch":
        return InvalidRequest(
            f"{param} must be 1 to 128 letters, digits or . _ : -, got {shorten(value)}.",
            param=param,
        )
    return InvalidRequest(f"{param}: {error['msg']}.", param=param)


_RANGES = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}
_TYPES = {
    "bool_type": "true or false",
    "int_type": "an integer",
    "float_type": "a finite number",
    "finite_number": "a finite number",
    "string_type": "a string",
    "string_unicode": "valid Unicode",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
