"""The types of a request's fields, each with its range and a sentence for what is not in it.

Knows single values; what fields mean together stands with the requests.
"""

from typing import Annotated, Any, NoReturn

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.errors import shorten

MAX_CHOICES = 128  # of one request's prompt
MAX_PROMPTS = 2048
MAX_IDS = 1024  # in one field that lists ids


def refuse(message: str, param: str) -> NoReturn:
    """Say what is wrong with a field; without `param`, with the one that is being checked."""
    # pydantic fills in what stands in braces
    raise PydanticCustomError("contract", "{message}", {"message": message, "param": param})


def _check_prompt(value: Any) -> Any:
    """A string, strings, ids or lists of ids; one look at the types, as prompts may be long."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        refuse(
            "must be a string, a list of strings, a list of token ids or a list of such lists", ""
        )
    if not value:
        refuse("must not be an empty list; an empty string starts from nothing", "")
    kinds = set(map(type, value))
    if kinds == {int}:
        return value
    if len(value) > MAX_PROMPTS:
        refuse(f"must have at most {MAX_PROMPTS} prompts, got {len(value)}", "")
    if kinds == {str}:
        return value
    if kinds == {list}:
        for prompt in value:
            if not prompt:
                refuse("must not contain an empty list of token ids", "")
            if set(map(type, prompt)) != {int}:
                refuse("must have integers as token ids", "")
        return value
    refuse("must have elements of one kind, strings, token ids or lists of token ids", "")


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
        refuse("must be a string or a list of strings", "")
    if len(stops) > 4:
        refuse(f"must have at most 4 strings, got {len(stops)}", "")
    for stop in stops:
        if not 1 <= len(stop) <= 1000:
            refuse(f"must have strings of 1 to 1000 characters, got {len(stop)}", "")
        try:
            stop.encode()
        except UnicodeEncodeError:
            refuse("must be valid Unicode", "")
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
        refuse("must be an object from token ids to numbers", "")
    if len(value) > MAX_IDS:
        refuse(f"must have at most {MAX_IDS} entries, got {len(value)}", "")
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 9):
            refuse(f"must have token ids as keys, got {shorten(key)}", "")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            refuse(f"must have numbers from -100 to 100 as values, got {shorten(bias)}", "")
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

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]


def number(low: float, high: float) -> Any:
    """A finite number in a closed range."""
    return Field(ge=low, le=high, allow_inf_nan=False)
