"""HTTP on a socket, as uvicorn does it, with bounds on a request's head and our shape of errors."""

import asyncio
import logging
import re
from collections import deque
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from server import unread
from server.errors import ApiError, HeadersTooLarge, InvalidRequest, TooSlow

# Java's client, for one, offers HTTP/2 with its first request. Whoever does not take an offer may
# pass over it; the parser would take the body behind it for another protocol's bytes. Looked for in
# a packet at a time, as clients send heads; a body's beginning beside it may be searched as well,
# and JSON has no line that begins so.
_UPGRADE = re.compile(rb"(?<=\r\n)upgrade(?=[ \t]*:)", re.IGNORECASE)
_PASSED_OVER = b"Ignored"  # as long

_LOOKS = 4  # at what a client has not taken, in the time that it may take nothing
_LEAST_LOOK_SECONDS = 0.01

logger = logging.getLogger(__name__)


class HttpProtocol(HttpToolsProtocol):
    """One connection. Heads that are too large, too slow or no HTTP are answered here.

    A client that takes nothing of what is written to it is hung up on, whatever that is: uvicorn
    would wait for it for ever, also to close.
    """

    max_header_bytes = 16 * 2**10
    receive_seconds = 30.0
    stalled_reader_seconds = 30.0
    count_stalled: Callable[[], None] = staticmethod(lambda: None)

    @classmethod
    def bounded(
        cls,
        *,
        max_header_bytes: int = max_header_bytes,
        receive_seconds: float = receive_seconds,
        stalled_reader_seconds: float = stalled_reader_seconds,
        count_stalled: Callable[[], None] = count_stalled,
    ) -> "type[HttpProtocol]":
        """This protocol with other bounds: uvicorn makes the instances, and takes no arguments."""
        return type(
            "BoundedHttpProtocol",
            (cls,),
            {
                "max_header_bytes": max_header_bytes,
                "receive_seconds": receive_seconds,
                "stalled_reader_seconds": stalled_reader_seconds,
                "count_stalled": staticmethod(count_stalled),
            },
        )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_in_head = True
        self._is_in_body = False
        self._num_head_bytes = 0  # received since the last that were a body's
        self._is_refused = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._cycles: deque[RequestResponseCycle] = deque()  # from the first without its answer on
        self._progress = -1  # of the client when we last looked
        self._num_idle_looks = 0  # in a row at which it had taken nothing of what waits for it
        self._look_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See Protocol."""
        super().connection_made(transport)
        self._start_head()
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        """See Protocol."""
        self._stop_head_timer()
        if self._look_timer is not None:
            self._look_timer.cancel()
        super().connection_lost(exc)
        # uvicorn tells it to the last request that arrived, and another may run before that.
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        """See Protocol."""
        if self._is_refused:
            return
        if not self._is_in_head and not self._is_in_body:
            # Some send a line's end too many. It begins no request, and would stop the timer of a
            # connection that waits for one.
            data = data.lstrip(b"\r\n")
            if not data:
                return
        self._num_head_bytes += len(data)
        if not self._is_in_body:
            data = _UPGRADE.sub(_PASSED_OVER, data)
        super().data_received(data)
        # All that is no body's: a head that is not complete, a chunk's extension, trailers.
        if self._num_head_bytes > self.max_header_bytes and not self._is_refused:
            self._refuse_head()

    def on_message_begin(self) -> None:
        """See HttpToolsProtocol."""
        if self._is_refused:
            return
        super().on_message_begin()
        if not self._is_in_head:  # not the connection's first
            self._start_head()
        # ASGI's place for what servers offer beyond it.
        self.scope["extensions"] = {"kvik.connection": {"write": self._write_chunk}}

    def on_headers_complete(self) -> None:
        """See HttpToolsProtocol."""
        self._is_in_head, self._is_in_body = False, True
        self._num_head_bytes = 0
        self._stop_head_timer()
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.max_header_bytes:
            self._refuse_head()
        elif not self._is_refused:
            super().on_headers_complete()
            # Answers come in order, and there may be thousands of requests.
            while self._cycles and self._cycles[0].response_complete:
                self._cycles.popleft()
            self._cycles.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        """See HttpToolsProtocol."""
        self._num_head_bytes = 0
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """See HttpToolsProtocol."""
        self._is_in_body = False
        self._num_head_bytes = 0
        if not self._is_refused:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._refuse(InvalidRequest("This is not an HTTP request that can be understood."))

    def _write_chunk(self, data: bytes) -> bool:
        """Write a part of the chunked reply that has begun; False where the client is behind.

        What ASGI's `send` does, but for waiting, and past all that lies between it and us. As it
        does, pass over what nobody can read any more.
        """
        if self.transport.is_closing():
            return True
        if self.flow.write_paused:
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    def _look_later(self) -> None:
        self._look_timer = self.loop.call_later(
            max(_LEAST_LOOK_SECONDS, self.stalled_reader_seconds / _LOOKS), self._look_for_a_reader
        )

    def _look_for_a_reader(self) -> None:
        """Hang up if for some looks in a row nothing was taken of what waits for the client."""
        try:
            progress, is_waiting = unread.look(self.transport)
        except OSError:  # closed, of which we are told soon
            return
        is_idle = is_waiting and progress == self._progress
        self._num_idle_looks = self._num_idle_looks + 1 if is_idle else 0
        self._progress = progress
        if self._num_idle_looks < _LOOKS:
            self._look_later()
        else:
            self.count_stalled()
            logger.info("reader dropped client=%s", ":".join(map(str, self.client or ())))
            self.transport.abort()

    def _start_head(self) -> None:
        self._is_in_head = True
        self._num_head_bytes = 0
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(self.receive_seconds, self._refuse_slow)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse_slow(self) -> None:
        self._refuse(
            TooSlow(f"The request's head did not arrive within {self.receive_seconds:g} s.")
        )

    def _refuse_head(self) -> None:
        self._refuse(
            HeadersTooLarge(
                f"The request's line and headers have more than {self.max_header_bytes} bytes."
            )
        )

    def _refuse(self, error: ApiError) -> None:
        """Answer and hang up; only hang up where another answer is on its way."""
        self._is_refused = True
        self._stop_head_timer()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            body = error.to_json()
            self.transport.write(
                STATUS_LINE[error.status]
                + b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
                + b"connection: close\r\n\r\n"
                + body
            )
        self.transport.close()
