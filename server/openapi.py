"""The OpenAPI document: what the routes declare, and what only a running server knows.

It names the served model and the ids it has, so that whoever builds requests from the document
builds some that are answered; rules between fields are beyond it, and stand in docs/api.md.
"""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from server.gate import PUBLIC_PATHS
from server.protocol.fields import MAX_PROMPTS
from server.protocol.requests import (
    CompletionRequest,
    DetokenizeRequest,
    StreamOptions,
    TokenizeRequest,
)
from server.service import Service

_TEMPLATE = "#/components/schemas/{model}"
_STRING = {"schema": {"type": "string"}}
_HEADERS: dict[str, dict[str, dict[str, Any]]] = {
    "401": {"WWW-Authenticate": {"description": "How to send a key.", **_STRING}},
    "429": {
        "Retry-After": {
            "description": "Seconds, by the rate of the last half minute.",
            "schema": {"type": "integer", "minimum": 1},
        }
    },
}
_REQUEST_ID = {
    "X-Request-Id": {"description": "The one that was sent, or a new one.", **_STRING}
}  # fmt: skip
_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key."},
    "basic": {"type": "http", "scheme": "basic", "description": "An API key as the password."},
}


def describe(app: FastAPI, service: Service) -> dict[str, Any]:
    """The document of an application around `service`."""
    has_keys = bool(service.config.api_keys)
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    # The framework's own refusals have our shape and status here.
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for kind in (CompletionRequest, TokenizeRequest, DetokenizeRequest, StreamOptions):
        schema = kind.model_json_schema(ref_template=_TEMPLATE)
        schema.pop("$defs", None)
        _narrow(schema["properties"], service)
        schemas[kind.__name__] = schema
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _describe_replies(operation["responses"])
            if has_keys:
                is_public = path in PUBLIC_PATHS
                operation["security"] = [] if is_public else [{name: []} for name in _KEYS]
    if has_keys:
        document["components"]["securitySchemes"] = _KEYS
    return document


def _describe_replies(replies: dict[str, Any]) -> None:
    """Take out what is never answered, and add the headers of what is."""
    replies.pop("422", None)
    for status, reply in replies.items():
        reply["headers"] = {**_REQUEST_ID, **_HEADERS.get(status, {})}
    # The listener answers these before a request has an id.
    for status in replies.keys() & {"400", "408", "431"}:
        del replies[status]["headers"]


def _narrow(properties: dict[str, Any], service: Service) -> None:
    """Put in what the served model is called, how long its context is and which ids it has."""
    model, max_choices = service.model, service.admission.max_choices
    for name, field in properties.items():
        has_ids = name in ("prompt", "tokens") or name.endswith("token_ids")
        for schema in _within(field):
            if name == "model" and schema.get("type") == "string":
                schema["enum"] = [model.name]
            if schema.get("maxItems") == MAX_PROMPTS:
                schema["maxItems"] = min(MAX_PROMPTS, max_choices)
            if schema.get("type") != "integer":
                continue
            if has_ids:
                schema.pop("exclusiveMaximum", None)
                schema["maximum"] = model.vocab_size - 1
            elif name in ("max_tokens", "min_tokens"):
                schema.pop("exclusiveMaximum", None)
                schema["maximum"] = model.n_ctx - 1  # a prompt has a token at least


def _within(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema and those it is made of."""
    yield schema
    for part in schema.get("anyOf", ()):
        yield from _within(part)
    if "items" in schema:
        yield from _within(schema["items"])
