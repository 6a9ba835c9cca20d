"""The engine's streams of one request, a prompt each, listened to as one; knows no text."""

import asyncio
import functools
from collections.abc import Callable

from engine.messages import TokenOutput
from engine.token_stream import TokenStream

Outputs = list[tuple[int, TokenOutput]]  # each with its choice's index


class PromptStreams:
    """The streams of a request's prompts, in the prompts' order."""

    def __init__(self) -> None:
        self._streams: list[TokenStream] = []
        self._stirred: list[int] = []  # places of which something came, or the end
        self._listener: Callable[[], None] | None = None

    def add(self, stream: TokenStream) -> None:
        """Take over the next prompt's stream."""
        stream.listen(functools.partial(self._note, len(self._streams)))
        self._streams.append(stream)

    def listen(self, listener: Callable[[], None]) -> None:
        """Have someone called soon after something came of any prompt; the last one counts."""
        self._listener = listener
        if self._stirred:
            asyncio.get_running_loop().call_soon(listener)

    def _note(self, place: int) -> None:
        self._stirred.append(place)
        if self._listener is None or len(self._stirred) > 1:
            return  # nobody wants to know, or somebody knows
        if len(self._streams) == 1:
            self._listener()
        else:  # what the others bring can leave together with this
            asyncio.get_running_loop().call_soon(self._listener)

    def take(self) -> list[tuple[int, Outputs]]:
        """All that came since the last time, with the prompt's place, without waiting."""
        arrivals = [(place, self._streams[place].take_ready()) for place in self._stirred]
        self._stirred.clear()
        return [arrival for arrival in arrivals if arrival[1]]

    def go_on(self) -> bool:
        """Whether anything is still to come, or has come and was not taken yet.

        A stream may have finished and not have called yet: who takes just then, after another's
        call or of his own accord, does not find what it brought last. Raises EngineError where the
        engine gave up, once all was taken that had come before.
        """
        is_open = False
        for stream in self._streams:
            if stream.error is not None:
                raise stream.error
            is_open = is_open or not stream.has_ended
        return is_open

    def give_up(self) -> None:
        """Close every stream; who listens is called, and finds the end behind what had come."""
        for stream in self._streams:
            stream.close()

    def close(self) -> int:
        """Let go of all that still runs, and of who listens; how many tokens were not taken."""
        num_tokens = 0
        for stream in self._streams:
            for _, output in stream.take_ready():
                num_tokens += output.token_id is not None
            stream.close()
        # They and who listens know us: a request that is over need not wait for a collection.
        self._streams.clear()
        self._listener = None
        return num_tokens
