"""From a body's bytes to a checked request, or to a sentence that says what is wrong with it.

Knows JSON, pydantic's errors and the fields of other APIs; ranges stand with the fields.
"""

import difflib
import json
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from server.errors import InvalidRequest, shorten
from server.protocol.requests import Body, StreamOptions

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

# What pydantic finds, in words.
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
