"""What a client is told when something goes wrong: one shape for every error, whoever raised it.

ApiError
├── InvalidRequest        400  the request cannot be meant like this; `param` names the field
├── InvalidKey            401  no API key, or none of ours
├── UnknownModel          404  another model's name
├── NotFound              404  no such route, or no such thing behind it
├── MethodNotAllowed      405  the route exists, not for this method
├── TooSlow               408  the request did not arrive in time
├── BodyTooLarge          413
├── UnsupportedMediaType  415  not JSON, or compressed
├── Overloaded            429  as much is accepted as may be; `Retry-After` says when
├── HeadersTooLarge       431
├── EngineFailed          500  the generation failed, not the request
├── InternalError         500  ours, and in the log
├── Unavailable           503  shutting down, or the engine is down
└── DeadlinePassed        504  `timeout_s` is over
"""

import json
from collections.abc import Mapping
from typing import Self

from engine.errors import (
    EngineDied,
    EngineError,
    EngineOverloaded,
    EngineStopped,
    NonFiniteLogits,
    PromptTooLong,
    TokenOutOfRange,
)

# ruff: noqa: N818  # a name that says what happened needs no "Error" behind it


class ApiError(Exception):
    """An answer that is no success; its text is meant for the client."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code
        self.headers = dict(headers or {})

    def also(self, headers: Mapping[str, str]) -> Self:
        """The same error with more headers."""
        self.headers |= headers
        return self

    def to_json(self) -> bytes:
        """OpenAI's error body; ASCII, so that nothing a client sent can break the encoding."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error}).encode()


class InvalidRequest(ApiError):
    """The request contradicts the contract or the model."""

    status = 400
    type = "invalid_request_error"


class InvalidKey(ApiError):
    """The request needs an API key and has none that we know."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"
    # A header line each: Chromium reads one challenge of a line.
    challenges = ("Bearer", 'Basic realm="kvik"')

    def __init__(self) -> None:
        super().__init__("This server wants an API key: send the header Authorization: Bearer KEY.")


class NotFound(ApiError):
    """There is nothing under this address."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class UnknownModel(NotFound):
    """The request names a model that is not served here."""

    code = "model_not_found"

    def __init__(self, *, model: str, served: str) -> None:
        super().__init__(
            f"The model {shorten(model)} is not served here; this server has {served!r}.",
            param="model",
        )


class MethodNotAllowed(ApiError):
    """The route has other methods."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class TooSlow(ApiError):
    """The request did not arrive in the time there is for it."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class BodyTooLarge(ApiError):
    """The body has more bytes than we read."""

    status = 413
    type = "invalid_request_error"
    code = "body_too_large"

    def __init__(self, *, max_body_bytes: int) -> None:
        super().__init__(f"The body is larger than the {max_body_bytes} bytes this server takes.")


class UnsupportedMediaType(ApiError):
    """The body is something else than plain JSON."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class Overloaded(ApiError):
    """As much is accepted as may be."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class HeadersTooLarge(ApiError):
    """The request's head has more bytes than we read."""

    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class EngineFailed(ApiError):
    """The engine could not finish the generation."""

    code = "engine_failed"


class InternalError(ApiError):
    """A fault of ours."""

    code = "internal_error"

    def __init__(self) -> None:
        super().__init__("The server made a mistake; it is in its log, under this request's id.")


class Unavailable(ApiError):
    """The server takes nothing now; another one may."""

    status = 503
    code = "unavailable"


class DeadlinePassed(ApiError):
    """The client's own time limit is over."""

    status = 504
    type = "timeout_error"
    code = "timeout"

    def __init__(self, *, timeout_s: float) -> None:
        super().__init__(
            f"The request did not finish within its timeout_s of {timeout_s:g} s.",
            param="timeout_s",
        )


# What the engine refuses or fails, on the wire: class, code, the field to blame.
_ENGINE_ERRORS: dict[type[EngineError], tuple[type[ApiError], str, str | None]] = {
    PromptTooLong: (InvalidRequest, "context_length_exceeded", "prompt"),
    TokenOutOfRange: (InvalidRequest, "token_out_of_range", None),
    EngineOverloaded: (Overloaded, "rate_limit_exceeded", None),
    EngineStopped: (Unavailable, "shutting_down", None),
    EngineDied: (EngineFailed, "engine_failed", None),
    NonFiniteLogits: (EngineFailed, "non_finite_logits", None),
}


def from_engine(error: EngineError) -> ApiError:
    """Say what the engine said, with a status."""
    kind, code, param = _ENGINE_ERRORS.get(type(error), (EngineFailed, "engine_failed", None))
    if isinstance(error, TokenOutOfRange):
        param = error.field
    return kind(str(error), param=param, code=code)


def shorten(value: object) -> str:
    """Something a client sent, fit for a sentence: one line, not too long, JSON's spelling."""
    if isinstance(value, list | dict) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)}".replace("dict", "object")
    try:
        if isinstance(value, str) and len(value) > 200:
            value = value[:200]
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return "something else"
    return text if len(text) <= 80 else text[:77] + "..."
