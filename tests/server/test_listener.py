"""The HTTP protocol under uvicorn, with an application that says yes."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from server.listener import HttpProtocol


async def say_yes(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-length", b"3")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"yes"})


@asynccontextmanager
async def asked(
    app: Any, protocol: type[HttpProtocol] = HttpProtocol, *, num_requests: int = 1
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a server of an application, with requests sent; it holds few bytes unread."""
    config = uvicorn.Config(
        app, port=0, http=protocol, lifespan="off", log_config=None, timeout_keep_alive=1
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", port))  # which the system takes, whoever is busy
    reader, writer = await asyncio.open_connection(sock=connection, limit=2**12)
    writer.write(num_requests * b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
    try:
        async with asyncio.timeout(20):
            yield reader, writer
    finally:
        writer.close()
        server.should_exit = True
        await serving


def test_a_line_s_end_too_many_keeps_no_connection_open() -> None:
    async def what_follows() -> bytes:
        async with asked(say_yes) as (reader, writer):
            await reader.readuntil(b"yes")
            writer.write(b"\r\n")
            return await reader.read()

    assert asyncio.run(what_follows()) == b""


def test_what_is_written_past_asgi_is_a_part_of_the_reply_and_no_more_than_the_client_takes() -> (
    None
):
    num_taken = 0

    async def write_until_refused(scope: Any, receive: Any, send: Any) -> None:
        nonlocal num_taken
        write = scope["extensions"]["kvik.connection"]["write"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while num_taken < 10_000 and write(b"a" * 2**16):
            num_taken += 1
        await send({"type": "http.response.body", "body": b"b"})

    async def what_comes() -> bytes:
        async with asked(write_until_refused) as (reader, _):
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"transfer-encoding: chunked" in head
            body = b""
            while size := int(await reader.readline(), 16):
                body += await reader.readexactly(size)
                await reader.readline()
            return body

    body = asyncio.run(what_comes())

    assert num_taken < 10_000
    assert body == b"a" * 2**16 * num_taken + b"b"


MUCH = 16 * 2**20  # bytes, more than the system holds for a connection


async def say_much(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-length", b"%d" % MUCH)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"a" * MUCH})


async def say_it_bit_by_bit(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(64):
        await send({"type": "http.response.body", "body": b"a" * (MUCH // 64), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize("app", [say_much, say_it_bit_by_bit])
@pytest.mark.parametrize("num_requests", [1, 3])
def test_who_takes_nothing_of_a_reply_is_hung_up_on(app: Any, num_requests: int) -> None:
    stalled: list[float] = []

    async def read_nothing() -> None:
        protocol = HttpProtocol.bounded(
            stalled_reader_seconds=0.4, count_stalled=lambda: stalled.append(time.monotonic())
        )
        async with asked(app, protocol, num_requests=num_requests) as (reader, _):
            begun = time.monotonic()
            while not stalled:
                await asyncio.sleep(0.02)
            assert stalled[0] - begun >= 0.4
            num_bytes = len(await reader.read())  # what was on its way, and then the end
            assert num_bytes < MUCH

    asyncio.run(read_nothing())

    assert len(stalled) == 1


@pytest.mark.parametrize("app", [say_much, say_it_bit_by_bit])
def test_who_takes_a_reply_slowly_gets_it_all(app: Any) -> None:
    stalled: list[int] = []

    async def read_slowly() -> int:
        protocol = HttpProtocol.bounded(
            stalled_reader_seconds=0.4, count_stalled=lambda: stalled.append(1)
        )
        async with asked(app, protocol) as (reader, _):
            await reader.readuntil(b"\r\n\r\n")
            num_read = pauses = 0
            while num_read < MUCH and (part := await reader.read(2**20)):
                num_read += len(part)
                if num_read > pauses * (MUCH // 12):
                    pauses += 1
                    await asyncio.sleep(0.1)
            assert num_read >= MUCH
            return pauses

    pauses = asyncio.run(read_slowly())

    assert pauses >= 12  # longer, all in all, than anybody may take nothing
    assert not stalled
