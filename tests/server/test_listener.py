"""The HTTP protocol under uvicorn, with an application that says yes."""

import asyncio
from typing import Any

import uvicorn

from server.listener import HttpProtocol


async def say_yes(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-length", b"3")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"yes"})


def test_a_line_s_end_too_many_keeps_no_connection_open() -> None:
    async def what_follows() -> bytes:
        config = uvicorn.Config(
            say_yes, port=0, http=HttpProtocol, lifespan="off", log_config=None,
            timeout_keep_alive=1,
        )  # fmt: skip
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        await reader.readuntil(b"yes")
        writer.write(b"\r\n")
        async with asyncio.timeout(20):
            rest = await reader.read()
        writer.close()
        server.should_exit = True
        await serving
        return rest

    assert asyncio.run(what_follows()) == b""
