"""Several prompts' streams as one: what has come, and when all have ended."""

import asyncio
import weakref
from typing import Any

from engine.errors import EngineStopped
from engine.messages import TokenOutput
from engine.token_stream import TokenStream
from server.prompt_streams import PromptStreams


def token(token_id: int) -> TokenOutput:
    return TokenOutput(seq_id=0, token_id=token_id)


def test_the_end_is_behind_what_was_brought_last_whoever_takes_when() -> None:
    async def take_in_between() -> list[tuple[list[int], bool | None]]:
        streams = PromptStreams()
        first, second = TokenStream(lambda: None), TokenStream(lambda: None)
        streams.add(first)
        streams.add(second)
        first.put(0, token(1))
        first.finish()
        await asyncio.sleep(0)
        second.put(0, token(2))
        second.finish(EngineStopped())  # its call is on its way
        found: list[tuple[list[int], bool | None]] = []
        for _ in range(3):
            places = [place for place, _ in streams.take()]
            try:
                found.append((places, streams.go_on()))
            except EngineStopped:
                found.append((places, None))
            if not places:
                await asyncio.sleep(0)
        return found

    assert asyncio.run(take_in_between()) == [([0], True), ([], True), ([1], None)]


def test_it_goes_on_until_the_last_of_its_prompts_has_ended() -> None:
    async def end_one_by_one() -> list[bool]:
        streams = PromptStreams()
        both = TokenStream(lambda: None), TokenStream(lambda: None)
        found = []
        for stream in both:
            streams.add(stream)
        for stream in both:
            found.append(streams.go_on())
            stream.finish()
        return [*found, streams.go_on()]

    assert asyncio.run(end_one_by_one()) == [True, True, False]


def test_nothing_is_held_once_all_was_let_go_of() -> None:
    class Reader:
        def __init__(self) -> None:
            self.streams = PromptStreams()
            self.streams.add(TokenStream(lambda: None))
            self.streams.listen(self.read)

        def read(self) -> None:
            pass

    async def whom_it_leaves() -> list[object]:
        reader = Reader()
        held: list[weakref.ref[Any]] = [weakref.ref(reader), weakref.ref(reader.streams)]
        reader.streams.close()
        del reader
        await asyncio.sleep(0)  # the end's call is on its way
        return [reference() for reference in held]

    assert asyncio.run(whom_it_leaves()) == [None, None]
