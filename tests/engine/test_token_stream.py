"""A request's stream, without an engine: what came together is taken together, none is lost."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from engine.errors import EngineStopped
from engine.messages import TokenOutput
from engine.token_stream import TokenStream


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run_test() -> None:
        asyncio.run(asyncio.wait_for(test(), timeout=30))

    run_test.__name__ = test.__name__
    return run_test


def token(token_id: int) -> TokenOutput:
    return TokenOutput(seq_id=0, token_id=token_id)


def ids(arrivals: list[tuple[int, TokenOutput]]) -> list[int | None]:
    return [output.token_id for _, output in arrivals]


@in_a_loop
async def test_what_came_together_is_taken_together_and_nothing_means_the_end() -> None:
    stream = TokenStream(lambda: None)
    stream.put(0, token(1))
    stream.put(1, token(2))
    first = await stream.arrivals()
    stream.put(0, token(3))
    stream.finish()

    assert [choice for choice, _ in first] == [0, 1]
    assert ids(first) == [1, 2]
    assert ids(await stream.arrivals()) == [3]
    assert await stream.arrivals() == []
    assert await stream.arrivals() == []


@in_a_loop
async def test_a_reader_that_waits_is_woken_by_tokens_and_by_the_end() -> None:
    stream = TokenStream(lambda: None)
    waiting = asyncio.create_task(stream.arrivals())
    await asyncio.sleep(0)
    stream.put(0, token(1))
    first = await waiting
    waiting = asyncio.create_task(stream.arrivals())
    await asyncio.sleep(0)
    stream.finish()

    assert ids(first) == [1]
    assert await waiting == []


@in_a_loop
async def test_a_reader_that_gives_up_waiting_loses_nothing() -> None:
    stream = TokenStream(lambda: None)
    for number in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.arrivals(), 0.01)
        stream.put(0, token(number))

        assert ids(await stream.arrivals()) == [number]


@in_a_loop
async def test_a_failure_comes_behind_what_was_delivered() -> None:
    stream = TokenStream(lambda: None)
    stream.put(0, token(1))
    stream.finish(EngineStopped())

    assert ids(await stream.arrivals()) == [1]
    with pytest.raises(EngineStopped):
        await stream.arrivals()


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
    assert [output async for output in given_up] == []
