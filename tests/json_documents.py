"""JSON documents gone wrong, for readers that must refuse them with a sentence of their own."""

import copy
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

# What a file may hold where another type belongs; NaN and Infinity are Python's JSON, too.
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(min_value=-3, max_value=300)
    | st.sampled_from([2**31, 2**63, 10**400, -(2**70)])
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["\ud800", "\x00", "", "../x", "F32", "ByteLevel", "gpt2"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


@st.composite
def mutations(draw: st.DrawFn, document: Any) -> Any:
    """The document with one to three of its values replaced, removed or given another name."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(min_value=1, max_value=3))):
        containers = list(_containers(changed))
        if not containers:
            return draw(VALUES)
        container = draw(st.sampled_from(containers))
        place = draw(st.sampled_from(_places(container)))
        match draw(st.sampled_from(["replace", "remove", "rename"])):
            case "rename" if isinstance(container, dict):
                container[draw(st.text(max_size=3))] = container.pop(place)
            case "remove":
                del container[place]
            case _:
                container[place] = draw(VALUES)
    return changed


def _containers(value: Any) -> list[Any]:
    """The document's objects and arrays that hold something, the document itself among them."""
    if not isinstance(value, dict | list) or not value:
        return []
    inner = value.values() if isinstance(value, dict) else value
    return [value, *(container for part in inner for container in _containers(part))]


def _places(container: Any) -> list[Any]:
    return list(container) if isinstance(container, dict) else list(range(len(container)))


def nested(depth: int) -> str:
    """Arrays in arrays, as text: deeper than a reader's stack."""
    return "[" * depth + "]" * depth


def write_json(path: Path, document: Any) -> None:
    """Write a document as any program might, half surrogate pairs and NaN included."""
    path.write_text(json.dumps(document), encoding="utf-8")
