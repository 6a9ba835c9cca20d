"""Reads a request's stream one output after the other, as tests like to."""

import asyncio
from collections.abc import AsyncIterator

from engine.messages import TokenOutput
from engine.token_stream import TokenStream


async def outputs_of(stream: TokenStream) -> AsyncIterator[tuple[int, TokenOutput]]:
    """All that comes, to the end. Raises EngineError where the engine gives up."""
    while not stream.has_ended:
        called = asyncio.Event()
        stream.listen(called.set)
        await called.wait()
        for output in stream.take_ready():
            yield output
    if stream.error is not None:
        raise stream.error


async def first_of(stream: TokenStream) -> tuple[int, TokenOutput]:
    """The first output that comes."""
    return await anext(outputs_of(stream))


async def ids_of(stream: TokenStream) -> list[int]:
    """The tokens of a request with one choice."""
    return [o.token_id async for _, o in outputs_of(stream) if o.token_id is not None]
