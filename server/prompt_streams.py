"""The engine's streams of one request, a prompt each, waited for as one; knows no text."""

import asyncio

from engine.errors import EngineError
from engine.messages import TokenOutput
from engine.token_stream import TokenStream

Outputs = list[tuple[int, TokenOutput]]  # each with its choice's index


class PromptStreams:
    """The streams of a request's prompts, in the prompts' order."""

    def __init__(self) -> None:
        self._streams: list[TokenStream] = []
        # Of several streams, all outputs go through one queue; of one, that would cost time.
        self._queue: asyncio.Queue[tuple[int, Outputs] | EngineError | None] = asyncio.Queue()
        self._forwarders: list[asyncio.Task[None]] = []
        self._num_open = 0  # forwarders that have not come to their stream's end

    def add(self, stream: TokenStream) -> None:
        """Take over the next prompt's stream; nobody may wait yet."""
        self._streams.append(stream)

    async def arrivals(self) -> list[tuple[int, Outputs]]:
        """All that came since the last time, with the prompt's place; nothing at the end of all.

        Raises EngineError where the engine gives up.
        """
        if len(self._streams) == 1:
            outputs = await self._streams[0].arrivals()
            return [(0, outputs)] if outputs else []
        if not self._forwarders:
            self._forwarders = [
                asyncio.create_task(self._forward(place, stream))
                for place, stream in enumerate(self._streams)
            ]
            self._num_open = len(self._forwarders)
        arrivals: list[tuple[int, Outputs]] = []
        while self._num_open and not arrivals:
            items = [await self._queue.get()]
            while not self._queue.empty():
                items.append(self._queue.get_nowait())
            for item in items:
                if isinstance(item, EngineError):
                    raise item
                if item is None:
                    self._num_open -= 1
                else:
                    arrivals.append(item)
        return arrivals

    async def _forward(self, place: int, stream: TokenStream) -> None:
        """Bring one prompt's outputs to where those of all prompts are waited for."""
        try:
            while outputs := await stream.arrivals():
                self._queue.put_nowait((place, outputs))
        except EngineError as error:
            self._queue.put_nowait(error)
        self._queue.put_nowait(None)

    def give_up(self) -> None:
        """Close every stream; whoever waits comes to the end, behind what had arrived."""
        for stream in self._streams:
            stream.close()

    def close(self) -> int:
        """Let go of all that still runs; how many tokens had come and were not taken."""
        for task in self._forwarders:
            task.cancel()
        num_tokens = 0
        for stream in self._streams:
            for _, output in stream.take_ready():
                num_tokens += output.token_id is not None
            stream.close()
        return num_tokens
