"""What a request brings, as it comes: one side puts outputs in, the other takes them.

For one event loop. Knows no process and no text, and no request but by how to give it up.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from engine.errors import EngineError
from engine.messages import TokenOutput


class TokenStream:
    """The outputs of one request, as (choice, output) in the order they were made.

    Listen and take; it ends when every choice has.
    """

    def __init__(self, close: Callable[[], None]) -> None:
        """Begin; `close` gives the request up."""
        self._ready: deque[tuple[int, TokenOutput]] = deque()
        self._listener: Callable[[], None] | None = None
        self._is_called_soon = False
        self._close = close
        self._is_finished = False  # nothing comes behind what is ready
        self._error: EngineError | None = None  # why, where the engine gave up

    @property
    def has_ended(self) -> bool:
        """Whether all was taken and nothing comes any more."""
        return self._is_finished and not self._ready

    @property
    def error(self) -> EngineError | None:
        """Why the engine gave up, where it did and all that it had brought was taken."""
        return None if self._ready else self._error

    def listen(self, listener: Callable[[], None]) -> None:
        """Have someone called soon after something came or the stream ended; the last one counts.

        Once for all that came together: it can leave together.
        """
        self._listener = listener
        if self._ready or self._is_finished:
            self._call_soon()

    def take_ready(self) -> list[tuple[int, TokenOutput]]:
        """What has arrived and was not taken yet, without waiting."""
        ready = list(self._ready)
        self._ready.clear()
        return ready

    def close(self) -> None:
        """Give the request up; does nothing once it has finished."""
        if not self._is_finished:
            self.finish()
            self._close()

    def put(self, choice: int, output: TokenOutput) -> None:
        """Deliver an output; for its maker alone."""
        self._ready.append((choice, output))
        self._call_soon()

    def finish(self, error: EngineError | None = None) -> None:
        """End the stream behind what was delivered; for its maker alone."""
        self._is_finished = True
        self._error = error
        self._call_soon()

    def _call_soon(self) -> None:
        # Not at once: the step that brings this may bring more, and so may the frame behind it.
        if self._listener is not None and not self._is_called_soon:
            self._is_called_soon = True
            asyncio.get_running_loop().call_soon(self._call)

    def _call(self) -> None:
        self._is_called_soon = False
        if self._listener is not None:
            self._listener()
