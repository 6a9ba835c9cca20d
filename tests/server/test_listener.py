"""The HTTP protocol under uvicorn, with an application that says yes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from server.listener import HttpProtocol


async def say_yes(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-length", b"3")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"yes"})


@asynccontextmanager
async def asked(app: Any) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a server of an application, with one request sent."""
    config = uvicorn.Config(
        app, port=0, http=HttpProtocol, lifespan="off", log_config=None, timeout_keep_alive=1
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
    async with asyncio.timeout(20):
        yield reader, writer
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
