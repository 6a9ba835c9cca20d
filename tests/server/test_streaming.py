"""A streamed reply on its own, with a connection that a test plays."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from server.errors import InvalidRequest
from server.protocol.requests import CompletionRequest
from server.routes import start_completion
from server.served_model import ServedModel
from server.service import Service
from server.streaming import EventStream, error_event
from tests.server.conftest import make_client, make_service


class Connection:
    """Takes what is sent, and what is written past ASGI where it may be."""

    def __init__(self, write: Callable[[bytes], bool] | None = None) -> None:
        self.body = b""
        self.has_ended = False
        self.scope: dict[str, Any] = {"type": "http"}
        if write is not None:
            self.scope["extensions"] = {"kvik.connection": {"write": write}}

    async def receive(self) -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: Any) -> None:
        assert not self.has_ended
        self.body += message.get("body", b"")
        self.has_ended = message["type"].endswith("body") and not message["more_body"]


async def begin(service: Service) -> EventStream:
    account = service.open_account(request_id="a", salt=b"")
    body = CompletionRequest(model="tiny", prompt="a", max_tokens=3, stream=True)
    return service.keep(await start_completion(service, account, body, b""), account)


def test_a_ping_that_comes_too_late_is_not_sent(served: ServedModel) -> None:
    async def ping_behind_the_end() -> bytes:
        connection = Connection()
        stream = await begin(make_service(served))
        await stream(connection.scope, connection.receive, connection.send)
        connection.has_ended = False
        await stream.ping()
        return connection.body

    assert asyncio.run(ping_behind_the_end()).endswith(b"data: [DONE]\n\n")


def test_what_came_last_leaves_before_the_end_whatever_goes_on_just_then(
    served: ServedModel,
) -> None:
    async def ping_all_the_time() -> bytes:
        connection = Connection()
        stream = await begin(make_service(served))
        running = asyncio.create_task(stream(connection.scope, connection.receive, connection.send))
        while not running.done():
            await stream.ping()
            await asyncio.sleep(0)
        await running
        return connection.body

    body = asyncio.run(ping_all_the_time())

    assert b'"finish_reason":"length"' in body
    assert body.replace(b": still here\n\n", b"").endswith(b"data: [DONE]\n\n")


def test_a_mistake_while_sending_ends_the_stream_with_an_error_and_closes_the_books(
    served: ServedModel,
) -> None:
    def fail(data: bytes) -> bool:
        raise RuntimeError("of ours")

    async def run() -> tuple[bytes, bool, int]:
        connection = Connection(fail)
        service = make_service(served)
        stream = await begin(service)
        await stream(connection.scope, connection.receive, connection.send)
        return connection.body, connection.has_ended, service.num_in_flight

    body, has_ended, num_in_flight = asyncio.run(run())

    assert body.startswith(b'data: {"error":')
    assert has_ended
    assert num_in_flight == 0


@pytest.mark.parametrize("besides", [{}, {"logprobs": 1}])
def test_an_event_is_one_line_to_whoever_cuts_text_by_any_ends_of_lines(
    served: ServedModel, besides: dict[str, Any]
) -> None:
    text = "1\x0b2\x0c3\r4\x1c5\x1d6\x1e7\x858\u20289\u2029é\u2027"
    body = {"prompt": text, "echo": True, "max_tokens": 1, "stream": True, **besides}

    with make_client(served) as (client, _):
        reply = client.post("/v1/completions", json={"model": "tiny", **body})

    lines = [line for line in reply.text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks).startswith(text)


def test_a_last_word_is_one_line_as_well() -> None:
    event = error_event(InvalidRequest("one\x85two\u2028three")).decode()

    (line,) = event.strip("\n").splitlines()
    assert json.loads(line.removeprefix("data: "))["error"]["message"] == "one\x85two\u2028three"
