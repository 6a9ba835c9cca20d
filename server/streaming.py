"""A completion as Server-Sent Events, and as one piece of JSON; both from the same deltas."""

import asyncio
import logging
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.delta import Delta
from server.errors import ApiError, InternalError
from server.generation import Generation
from server.prompt_run import ChoiceText, PromptRun

logger = logging.getLogger(__name__)

encode = msgspec.json.Encoder().encode

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_DONE = b"data: [DONE]\n\n"
_PING = b": still here\n\n"
# No ends of lines to SSE, nor to JSON; but to `str.splitlines`, which some clients cut streams by.
_LINE_BREAKS = re.compile(rb"\xc2\x85|\xe2\x80[\xa8\xa9]")


def choice_reply(index: int, run: PromptRun, delta: Delta) -> dict[str, Any]:
    """A choice on the wire, in a stream's chunk or in the whole reply."""
    reply: dict[str, Any] = {
        "index": index,
        "text": delta.text,
        "logprobs": None if delta.logprobs is None else delta.logprobs.to_reply(),
        "finish_reason": delta.finish_reason,
    }
    if delta.finish_reason is not None:
        reply["stop_reason"] = delta.stop_reason
        reply["seed"] = run.seed
    if delta.prompt_token_ids is not None:
        reply["prompt_token_ids"] = delta.prompt_token_ids
    if delta.token_ids is not None:
        reply["token_ids"] = delta.token_ids
    return reply


def head(generation: Generation, fingerprint: str) -> dict[str, Any]:
    """What every reply and every chunk begins with."""
    return {
        "id": generation.id,
        "object": "text_completion",
        "created": generation.created,
        "model": generation.model.name,
        "system_fingerprint": fingerprint,
    }


def whole_reply(generation: Generation, fingerprint: str) -> bytes:
    """A finished generation in one piece."""
    choices = []
    for index, run, choice in generation.ranked():
        delta = choice.take_delta()
        assert delta is not None, "it has ended"
        choices.append(choice_reply(index, run, delta))
    return encode(
        {
            **head(generation, fingerprint),
            "choices": choices,
            "usage": generation.usage(),
            "timings": generation.timings(),
        }
    )


def _in_one_line(json: bytes) -> bytes:
    """The same JSON, with whatever anybody takes for the end of a line escaped."""
    if json.isascii():
        return json
    return _LINE_BREAKS.sub(lambda found: b"\\u%04x" % ord(found[0].decode()), json)


def error_event(error: ApiError) -> bytes:
    """What a stream ends with when it cannot end well."""
    return b"data: " + _in_one_line(error.to_json()) + b"\n\n"


class Frames:
    """The chunks of one stream, each made of a prepared prefix and what is new."""

    def __init__(self, generation: Generation, fingerprint: str) -> None:
        options = generation.body.stream_options
        self._includes_usage = options is not None and options.include_usage
        self._generation = generation
        beginning = _in_one_line(encode(head(generation, fingerprint)))
        self._prefix = b"data: " + beginning[:-1] + b',"choices":['
        self._prefixes: dict[ChoiceText, bytes] = {}
        self._end = b'],"usage":null}\n\n' if self._includes_usage else b"]}\n\n"
        self._plain_end = b',"logprobs":null,"finish_reason":null}' + self._end

    def chunks(self, choices: list[ChoiceText]) -> bytes:
        """The frames for what is new of these choices; none, where nothing can be shown yet."""
        frames: list[bytes] = []
        for choice in choices:
            text = choice.take_text()
            if text:
                frames += [self._prefix_of(choice), _in_one_line(encode(text)), self._plain_end]
            elif text is None and (delta := choice.take_delta()) is not None:
                reply = choice_reply(self._index(choice), choice.run, delta)
                frames += [self._prefix, _in_one_line(encode(reply)), self._end]
        if frames and self._generation.is_finished and not self._includes_usage:
            frames[-1] = b'],"timings":' + encode(self._generation.timings()) + b"}\n\n"
        return b"".join(frames)

    def _index(self, choice: ChoiceText) -> int:
        return choice.run.place * self._generation.body.n + choice.index

    def _prefix_of(self, choice: ChoiceText) -> bytes:
        """A chunk up to the text, where there is nothing but text."""
        prefix = self._prefixes.get(choice)
        if prefix is None:
            prefix = self._prefix + b'{"index":%d,"text":' % self._index(choice)
            self._prefixes[choice] = prefix
        return prefix

    def tail(self) -> bytes:
        """What follows the last chunk of a stream that ended well."""
        if not self._includes_usage:
            return _DONE
        usage = encode(self._generation.usage())
        timings = encode(self._generation.timings())
        return b'%b],"usage":%b,"timings":%b}\n\n%b' % (self._prefix, usage, timings, _DONE)


async def watch_client(receive: Receive, generation: Generation) -> None:
    """Give a generation up when its client is gone; to be cancelled when it has finished."""
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.give_up("abort")


class EventStream(Response):
    """The reply that streams a generation, and always lets go of it.

    No coroutine waits for tokens: the generation calls `_go_on`, which writes to the connection. A
    token a stream and step are the most frequent thing that the server does.
    """

    def __init__(
        self,
        generation: Generation,
        *,
        fingerprint: Callable[[], str],
        running: Callable[[], AbstractContextManager[None]],
        streams: "set[EventStream]",
    ) -> None:
        """Make the reply; `running` is around the generation, and `streams` has us meanwhile."""
        super().__init__(media_type="text/event-stream")
        self.generation = generation
        self._fingerprint = fingerprint
        self._running = running
        self._streams = streams
        self._frames: Frames | None = None  # from the first token on
        self._send: Send | None = None
        self._sending: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # What our own connections offer, see `server.listener`; others do without.
        self._write: Callable[[bytes], bool] = lambda data: False
        self._is_sending = False  # or waiting until the client takes more
        self.last_sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as ASGI wants it."""
        self._send = send
        connection = scope.get("extensions", {}).get("kvik.connection", {})
        self._write = connection.get("write", self._write)
        last = b""
        self._streams.add(self)
        try:
            try:
                with self._running():
                    await self._stream(receive)
            except ApiError as error:
                last = error_event(error)
            except Exception:  # after the first byte, there is only this way to say it
                logger.exception("stream failed id=%s", self.generation.id)
                last = error_event(InternalError())
            await self._send_body(last, more_body=False)
        finally:
            self._streams.discard(self)

    async def _stream(self, receive: Receive) -> None:
        assert self._send is not None
        watcher = asyncio.create_task(watch_client(receive, self.generation))
        try:
            headers = [*_HEADERS, *self._headers_besides()]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            self.last_sent_at = time.monotonic()
            self.generation.listen(self._go_on)
            await self._ended
            if self.generation.given_up is None:
                assert self._frames is not None, "every choice ends with an output"
                await self._send_body(self._frames.tail())
        finally:
            watcher.cancel()
            if self._sending is not None:
                self._sending.cancel()
            self.generation.close()

    def _headers_besides(self) -> list[tuple[bytes, bytes]]:
        """Headers that others set on this reply."""
        ours = {name for name, _ in _HEADERS} | {b"content-length"}
        return [(name, value) for name, value in self.raw_headers if name not in ours]

    def _go_on(self) -> None:
        """Send what came, and notice the end."""
        try:
            while not (self._is_sending or self._ended.done()):
                choices = self.generation.take()
                if choices is None:
                    self._ended.set_result(None)
                elif not choices:
                    return
                else:
                    self._put(self._chunks(choices))
        except Exception as error:
            self._ended.set_exception(error)

    def _chunks(self, choices: list[ChoiceText]) -> bytes:
        if self._frames is None:
            self._frames = Frames(self.generation, self._fingerprint())
        return self._frames.chunks(choices)

    def _put(self, data: bytes) -> None:
        """Write to the connection, or wait in a task until it takes more."""
        if not data:
            return
        if self._write(data):
            self.last_sent_at = time.monotonic()
        else:
            self._is_sending = True
            self._sending = asyncio.create_task(self._send_and_go_on(data))

    async def _send_and_go_on(self, data: bytes) -> None:
        """Send, however long it takes, and then what came meanwhile."""
        try:
            await self._send_body(data)
        except Exception as error:
            if not self._ended.done():
                self._ended.set_exception(error)
        self._go_on()

    async def _send_body(self, data: bytes, *, more_body: bool = True) -> None:
        assert self._send is not None
        self._is_sending = True
        await self._send({"type": "http.response.body", "body": data, "more_body": more_body})
        self._is_sending = False
        self.last_sent_at = time.monotonic()

    async def ping(self) -> None:
        """Show a client, and the proxies on the way, that a silent stream lives."""
        if self.last_sent_at and not (self._is_sending or self._ended.done()):
            await self._send_and_go_on(_PING)
