"""The HTTP protocol under uvicorn, with an application that says yes."""

import asyncio
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import uvloop

from server.listener import HttpProtocol


async def say_yes(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-length", b"3")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"yes"})


@asynccontextmanager
async def asked(
    app: Any,
    protocol: type[HttpProtocol] = HttpProtocol,
    *,
    num_requests: int = 1,
    tls: Path | None = None,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a server of an application, with requests sent; it holds few bytes unread."""
    config = uvicorn.Config(
        app, port=0, http=protocol, lifespan="off", log_config=None, timeout_keep_alive=1,
        ssl_certfile=tls,
    )  # fmt: skip
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", port))  # which the system takes, whoever is busy
    connection.setblocking(False)
    context = None if tls is None else ssl.create_default_context(cafile=tls)
    reader, writer = await asyncio.open_connection(
        sock=connection, limit=2**12, ssl=context, server_hostname=tls and "localhost"
    )
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
SLOWLY = 2 * 2**20  # of them: the system asks for more when a third of its own buffer is free


async def say_much(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-length", b"%d" % MUCH)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"a" * MUCH})


async def say_it_bit_by_bit(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(64):
        await send({"type": "http.response.body", "body": b"a" * (MUCH // 64), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def say_little_now_and_then(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(5):
        assert scope["extensions"]["kvik.connection"]["write"](b"a")
        await asyncio.sleep(0.6)  # longer than anybody may take nothing
    await send({"type": "http.response.body", "body": b""})


def run(test: Coroutine[Any, Any, Any]) -> Any:
    """Run on the loop that serves."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(test)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for this machine, with its key in the same file."""
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-out", str(path), "-keyout", str(path) + ".key"],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_text(path.read_text() + Path(f"{path}.key").read_text())
    return path


@pytest.mark.parametrize("is_tls", [False, True])
@pytest.mark.parametrize("app", [say_much, say_it_bit_by_bit])
@pytest.mark.parametrize("num_requests", [1, 3])
def test_who_takes_nothing_of_a_reply_is_hung_up_on(
    app: Any, num_requests: int, is_tls: bool, certificate: Path
) -> None:
    stalled: list[float] = []

    async def read_nothing() -> None:
        protocol = HttpProtocol.bounded(
            stalled_reader_seconds=0.4, count_stalled=lambda: stalled.append(time.monotonic())
        )
        tls = certificate if is_tls else None
        async with asked(app, protocol, num_requests=num_requests, tls=tls) as (reader, _):
            begun = time.monotonic()
            while not stalled:
                await asyncio.sleep(0.02)
            assert stalled[0] - begun >= 0.4
            num_bytes = len(await reader.read())  # what was on its way, and then the end
            assert num_bytes < MUCH

    run(read_nothing())

    assert len(stalled) == 1


@pytest.mark.parametrize("is_tls", [False, True])
@pytest.mark.parametrize("app", [say_much, say_it_bit_by_bit])
def test_who_takes_a_reply_slowly_gets_it_all(app: Any, is_tls: bool, certificate: Path) -> None:
    stalled: list[int] = []

    async def read_slowly() -> int:
        protocol = HttpProtocol.bounded(
            stalled_reader_seconds=0.6, count_stalled=lambda: stalled.append(1)
        )
        tls = certificate if is_tls else None
        async with asked(app, protocol, tls=tls) as (reader, _):
            await reader.readuntil(b"\r\n\r\n")
            num_read = 0
            while num_read < MUCH and (part := await reader.read(2**15)):
                num_read += len(part)
                if num_read < SLOWLY:
                    await asyncio.sleep(len(part) / 2**20)  # a megabyte a second
            return num_read

    num_read = run(read_slowly())

    assert not stalled
    assert num_read >= MUCH


def test_who_takes_all_there_is_may_wait_for_more() -> None:
    stalled: list[int] = []

    async def read_to_the_end() -> bytes:
        protocol = HttpProtocol.bounded(
            stalled_reader_seconds=0.4, count_stalled=lambda: stalled.append(1)
        )
        async with asked(say_little_now_and_then, protocol) as (reader, _):
            return await reader.readuntil(b"0\r\n\r\n")

    reply = run(read_to_the_end())

    assert reply.count(b"1\r\na\r\n") == 5
    assert not stalled


def test_nobody_looks_at_a_connection_that_is_gone() -> None:
    async def leave() -> list[str]:
        protocol = HttpProtocol.bounded(stalled_reader_seconds=0.1)
        looks: list[str] = []
        look = protocol._look_for_a_reader

        def note_and_look(self: HttpProtocol) -> None:
            looks.append("gone" if self.transport.is_closing() else "there")
            look(self)

        protocol._look_for_a_reader = note_and_look  # type: ignore[method-assign]
        async with asked(say_yes, protocol) as (reader, writer):
            await reader.readuntil(b"yes")
            await asyncio.sleep(0.2)
            writer.close()
            await asyncio.sleep(0.3)
        return looks

    looks = run(leave())

    assert "there" in looks
    assert "gone" not in looks
