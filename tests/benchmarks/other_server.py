"""A completions server that is not Kvik: plain asyncio, told what to stream and when."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Write = Callable[[bytes], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n"


def event(text: str, **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
    return b"data: " + json.dumps({"choices": [choice], **more}).encode() + b"\n\n"


def usage(completion_tokens: int) -> bytes:
    counts = {"completion_tokens": completion_tokens}
    return b"data: " + json.dumps({"choices": [], "usage": counts}).encode() + b"\n\n"


@dataclass
class OtherServer:
    """What it streams is `stream(write)`; what it was asked, it keeps."""

    stream: Callable[[Write], Awaitable[None]]
    head: bytes = HEAD + b"\r\n"
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    began_at: list[float] = field(default_factory=list)
    num_open: int = 0
    max_open: int = 0

    @asynccontextmanager
    async def listening(self) -> AsyncIterator["OtherServer"]:
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        self.url = f"http://{host}:{port}"
        async with server:
            yield self

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def write(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            fields = dict(line.split(": ", 1) for line in head.splitlines()[1:] if line)
            body = await reader.readexactly(int(fields["Content-Length"]))
            if head.startswith("GET /v1/models "):
                await write(b'HTTP/1.1 200 OK\r\n\r\n{"data": [{"id": "other-1"}]}')
                return
            self.bodies.append(json.loads(body))
            self.keys.append(fields.get("Authorization", ""))
            self.began_at.append(time.perf_counter())
            self.num_open += 1
            self.max_open = max(self.max_open, self.num_open)
            await write(self.head)
            await self.stream(write)
            self.num_open -= 1
        finally:
            writer.close()
