"""A golden file per shape of reply: echo x logprobs x stream x n.

To write them anew, after a change that was meant: KVIK_WRITE_GOLDEN=1 make test.
"""

import asyncio
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import httpx2
import pytest

from engine.sampling_params import SamplingParams
from server.app import create_app
from server.served_model import ServedModel
from tests.server.conftest import make_service

GOLDEN = Path(__file__).parent / "golden"
_MOVING = re.compile(
    r'"(system_fingerprint|created|\w+_seconds|tokens_per_second)":'
    r'(?:[-+.e\d]+|null|"fp_[0-9a-f]{16}")'
)
SHAPES = list(itertools.product([False, True], [None, 0, 2], [False, True], [1, 2]))


def name(echo: bool, logprobs: int | None, stream: bool, n: int) -> str:
    return "-".join(
        [
            "stream" if stream else "whole",
            "echo" if echo else "plain",
            "none" if logprobs is None else f"logprobs{logprobs}",
            f"n{n}",
        ]
    )


def script(prompt_ids: list[int], params: SamplingParams, choice: int) -> list[int]:
    """An é in two tokens, a space, and the end."""
    return [0xC3, 0xA9, 0x20, ord("x") + choice, 267]


def steady(text: str) -> str:
    """The reply without what differs from time to time."""
    return _MOVING.sub(r'"\1":0', text)


async def ask(served: ServedModel, body: dict[str, Any]) -> str:
    """A reply's body. In one event loop, so that what leaves together is always the same."""
    app = create_app(make_service(served, script))
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app), base_url="http://test"
    ) as client:
        reply = await client.post("/v1/completions", json=body)
    assert reply.status_code == 200
    return reply.text


@pytest.mark.parametrize(("echo", "logprobs", "stream", "n"), SHAPES)
def test_reply_has_its_golden_shape(
    served: ServedModel, echo: bool, logprobs: int | None, stream: bool, n: int
) -> None:
    body: dict[str, Any] = {
        "model": "tiny", "prompt": " the end", "max_tokens": 8, "seed": 7, "request_id": "golden",
        "echo": echo, "logprobs": logprobs, "stream": stream, "n": n,
    }  # fmt: skip
    if stream:
        body["stream_options"] = {"include_usage": True}

    text = steady(asyncio.run(ask(served, body)))
    if not stream:
        text = json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n"
    path = GOLDEN / f"{name(echo, logprobs, stream, n)}.txt"
    if os.environ.get("KVIK_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("echo", "logprobs", "n"), list(itertools.product([0, 1], [None, 0, 2], [1, 2]))
)
def test_streamed_pieces_add_up_to_the_whole(echo: int, logprobs: int | None, n: int) -> None:
    whole = json.loads((GOLDEN / f"{name(bool(echo), logprobs, False, n)}.txt").read_text())
    stream = (GOLDEN / f"{name(bool(echo), logprobs, True, n)}.txt").read_text()
    events = [event.removeprefix("data: ") for event in stream.strip().split("\n\n")]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]

    for choice in whole["choices"]:
        pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert pieces[-1]["finish_reason"] == choice["finish_reason"]
        if logprobs is not None:
            for key, values in choice["logprobs"].items():
                assert [v for piece in pieces for v in piece["logprobs"][key]] == values
    assert chunks[-1]["usage"] == whole["usage"]
    assert len({chunk["id"] for chunk in chunks}) == 1
