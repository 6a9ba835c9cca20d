"""What a request brings, as it comes: one side puts outputs in, the other waits for them.

For one event loop. Knows no process and no text, and no request but by how to give it up.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from engine.messages import TokenOutput


class TokenStream:
    """The outputs of one request, as (choice, output) in the order they were made.

    Iterate once; it ends when every choice has. Raises EngineError where the engine gives up.
    """

    def __init__(self, close: Callable[[], None]) -> None:
        self._ready: deque[tuple[int, TokenOutput]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._is_finished = False
        self._error: Exception | None = None
        self._close = close

    def __aiter__(self) -> AsyncIterator[tuple[int, TokenOutput]]:
        return self

    async def __anext__(self) -> tuple[int, TokenOutput]:
        if not self._ready:
            await self._wait()
        if not self._ready:
            raise StopAsyncIteration
        return self._ready.popleft()

    async def arrivals(self) -> list[tuple[int, TokenOutput]]:
        """All that came since the last time, at least one; none at the end.

        What arrives together can leave together, and costs its reader one wait.
        """
        if not self._ready:
            await self._wait()
        return self.take_ready()

    async def _wait(self) -> None:
        """Wait until something is ready, or nothing will be any more."""
        while not self._ready:
            if self._error is not None:
                raise self._error
            if self._is_finished:
                return
            # A future and no asyncio.Event: this happens once a token.
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

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
        if self._waiter is not None:
            self._wake()

    def finish(self, error: Exception | None = None) -> None:
        """End the stream behind what was delivered; for its maker alone."""
        self._is_finished = True
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():  # its task may have gone
            self._waiter.set_result(None)
        self._waiter = None
