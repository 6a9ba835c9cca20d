"""Ways to do harm to a checkpoint directory, and what then must come of reading it."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.json_documents import write_json
from tests.tiny_models import tiny_config
from weights.errors import CheckpointError
from weights.layout import read_layout

CONFIG = tiny_config(n_layer=1, n_head=1, n_embd=4, n_ctx=4, vocab_size=7, n_inner=3)


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_layout(directory)
    return str(caught.value)


def read_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and what follows it."""
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_file(path: Path, header: Any, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    header, data = read_file(path)
    change(header)
    write_file(path, header, data)


def edit_json(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, document | changes)


def read_or_refuse(directory: Path) -> None:
    """Read the layout: no error but CheckpointError may come out, with a message to print."""
    message = ""
    try:
        read_layout(directory)
    except CheckpointError as error:
        message = str(error)
    assert len(message.encode()) < 2000


many_examples = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
