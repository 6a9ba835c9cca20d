"""A request's stream, without an engine: what came together is taken together, none is lost."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from engine.errors import EngineStopped
from engine.messages import TokenOutput
from engine.token_stream import TokenStream
from tests.engine.streams import first_of, outputs_of


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run_test() -> None:
        asyncio.run(asyncio.wait_for(test(), timeout=30))

    run_test.__name__ = test.__name__
    return run_test


def token(token_id: int) -> TokenOutput:
    return TokenOutput(seq_id=0, token_id=token_id)


class Listener:
    """Takes all there is whenever it is called."""

    def __init__(self, stream: TokenStream) -> None:
        self.taken: list[list[int | None]] = []
        self._stream = stream
        stream.listen(self._take)

    def _take(self) -> None:
        self.taken.append([output.token_id for _, output in self._stream.take_ready()])


@in_a_loop
async def test_what_comes_together_is_one_call_and_so_is_the_end() -> None:
    stream = TokenStream(lambda: None)
    listener = Listener(stream)
    await asyncio.sleep(0)
    stream.put(0, token(1))
    stream.put(1, token(2))
    before = list(listener.taken)
    await asyncio.sleep(0)
    stream.put(0, token(3))
    stream.finish()
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    assert before == []  # never within `put`
    assert listener.taken == [[1, 2], [3]]
    assert stream.has_ended


@in_a_loop
async def test_who_listens_late_is_called_for_what_is_there() -> None:
    with_tokens, finished, empty = (TokenStream(lambda: None) for _ in range(3))
    with_tokens.put(0, token(1))
    finished.finish()
    listeners = [Listener(stream) for stream in (with_tokens, finished, empty)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    assert [listener.taken for listener in listeners] == [[[1]], [[]], []]


@in_a_loop
async def test_a_reader_that_waits_is_woken_by_tokens_and_by_the_end() -> None:
    stream = TokenStream(lambda: None)

    async def read() -> list[int | None]:
        return [output.token_id async for _, output in outputs_of(stream)]

    reading = asyncio.create_task(read())
    for number in range(3):
        await asyncio.sleep(0)
        stream.put(0, token(number))
    await asyncio.sleep(0.01)
    stream.finish()

    assert await reading == [0, 1, 2]


@in_a_loop
async def test_a_reader_that_gives_up_waiting_loses_nothing() -> None:
    stream = TokenStream(lambda: None)
    for number in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(first_of(stream), 0.01)
        stream.put(0, token(number))

        assert (await first_of(stream))[1].token_id == number


@in_a_loop
async def test_a_failure_comes_behind_what_was_delivered() -> None:
    stream = TokenStream(lambda: None)
    stream.put(0, token(1))
    stream.finish(EngineStopped())

    assert (await first_of(stream))[1].token_id == 1
    with pytest.raises(EngineStopped):
        await first_of(stream)


@in_a_loop
async def test_closing_tells_the_engine_once_and_not_after_the_end() -> None:
    closed: list[str] = []
    given_up = TokenStream(lambda: closed.append("given up"))
    finished = TokenStream(lambda: closed.append("finished"))
    finished.finish()
    for _ in range(2):
        given_up.close()
        finished.close()

    assert closed == ["given up"]
    assert [output async for output in outputs_of(given_up)] == []
