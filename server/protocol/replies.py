"""The replies as the documentation shows them; they are written without these shapes."""

from pydantic import BaseModel, Field


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
    products: str | None  # the instructions that multiply, or GPU
    numerics: str | None  # why these two
