"""Several prompts' streams as one: what has come, and when all have ended."""

import asyncio

from engine.errors import EngineStopped
from engine.messages import TokenOutput
from engine.token_stream import TokenStream
from server.prompt_streams import PromptStreams


def token(token_id: int) -> TokenOutput:
    return TokenOutput(seq_id=0, token_id=token_id)


def test_the_end_is_behind_what_was_brought_last_whoever_takes_when() -> None:
    async def take_in_between() -> None:
        streams = PromptStreams()
        first, second = TokenStream(lambda: None), TokenStream(lambda: None)
        streams.add(first)
        streams.add(second)
        first.put(0, token(1))
        first.finish()
        await asyncio.sleep(0)
        second.put(0, token(2))
        second.finish(EngineStopped())  # its call is on its way

        assert [place for place, _ in streams.take()] == [0]
        assert streams.take() == []
        assert not streams.have_ended
        assert streams.error is None
        await asyncio.sleep(0)
        assert [place for place, _ in streams.take()] == [1]
        assert streams.have_ended
        assert streams.error is not None

    asyncio.run(take_in_between())
