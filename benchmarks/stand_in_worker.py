"""An engine's process without an engine: frames as fast as the server takes them, one a step.

Started by `EngineClient` in the place of `engine.worker`, so that the server's own speed shows.
"""

import array
import contextlib
import fcntl
import itertools
import os
import select
import socket
import sys
import termios
import time
from pathlib import Path

from engine.flight_recorder import FlightRecorder
from engine.messages import (
    LENGTH_BYTES,
    Abort,
    FromWorker,
    Ready,
    Start,
    StepOutput,
    StepStats,
    Submit,
    TokenOutput,
    pack,
    unpack_to_worker,
)
from weights.layout import read_layout, read_tokenizer

_PAUSE_SECONDS = 20e-6


class _StandIn:
    """Gives every sequence a token a round, of no meaning, and as many rounds a step as it may."""

    def __init__(self, connection: socket.socket, recorder: FlightRecorder) -> None:
        self._connection = connection
        self._recorder = recorder
        self._buffer = bytearray()
        self._left: dict[int, int] = {}  # tokens to come, by sequence
        self._names: dict[str, list[int]] = {}
        self._ids = itertools.cycle([0])
        self._num_rounds = 1

    def run(self) -> None:
        """Serve until the other side hangs up."""
        while True:
            self._take(wait=not self._left)
            if self._left:
                self._step()

    def _take(self, *, wait: bool) -> None:
        while select.select([self._connection], [], [], None if wait else 0)[0]:
            data = self._connection.recv(2**20)
            if not data:
                raise EOFError
            self._buffer += data
            while len(self._buffer) >= LENGTH_BYTES:
                end = LENGTH_BYTES + int.from_bytes(self._buffer[:LENGTH_BYTES], "little")
                if len(self._buffer) < end:
                    break
                frame = unpack_to_worker(bytes(self._buffer[LENGTH_BYTES:end]))
                del self._buffer[:end]
                if isinstance(frame, Start):
                    self._begin(frame)
                elif isinstance(frame, Submit):
                    self._names[frame.request_id] = [choice.seq_id for choice in frame.choices]
                    for choice in frame.choices:
                        self._left[choice.seq_id] = frame.params.max_tokens
                elif isinstance(frame, Abort):
                    for seq_id in self._names.get(frame.request_id, ()):
                        self._left.pop(seq_id, None)
            wait = False

    def _begin(self, start: Start) -> None:
        self._num_rounds = start.config.engine.max_num_rounds
        layout = read_layout(Path(start.config.model))
        tokenizer = read_tokenizer(layout)
        # Tokens that are text, and end nothing.
        self._ids = itertools.cycle(
            i for i in range(tokenizer.vocab_size)
            if i not in layout.eos_token_ids and tokenizer.token_bytes(i).isascii()
        )  # fmt: skip
        self._send(
            Ready(
                pid=os.getpid(), device="none", dtype="none", products="none",
                compiled_for="nothing", numerics="nothing is computed", kv_cache_dtype="none",
                n_ctx=layout.config.n_ctx, vocab_size=tokenizer.vocab_size, num_blocks=1,
                block_size=16, weights_bytes=0, working_bytes=0, kv_cache_bytes=0,
                available_bytes=0, weights_id="0" * 64, is_batch_invariant=True,
            )
        )  # fmt: skip

    def _step(self) -> None:
        num_running = len(self._left)
        outputs = []
        for _ in range(self._num_rounds):
            for seq_id in list(self._left):
                self._left[seq_id] -= 1
                is_last = not self._left[seq_id]
                outputs.append(
                    TokenOutput(
                        seq_id=seq_id,
                        token_id=next(self._ids),
                        finish_reason="length" if is_last else None,
                    )
                )
                if is_last:
                    del self._left[seq_id]
        stats = StepStats(0, num_running, 0, 0, 0, len(outputs), 0, 0, 0)
        self._recorder.start_step([])
        self._send(StepOutput(outputs=outputs, stats=stats))
        self._recorder.end_step()
        while _num_unread_bytes(self._connection):  # frames never wait behind each other
            time.sleep(_PAUSE_SECONDS)

    def _send(self, frame: FromWorker) -> None:
        self._connection.sendall(pack(frame))


def _num_unread_bytes(connection: socket.socket) -> int:
    """What was sent and the other side has not read (Linux)."""
    number = array.array("i", [0])
    fcntl.ioctl(connection, termios.TIOCOUTQ, number)
    return number[0]


def main() -> None:
    """Run as a process of its own."""
    socket_fd, recorder_fd, _ = (int(argument) for argument in sys.argv[1:4])
    gone = contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError)
    with socket.socket(fileno=socket_fd) as connection, gone:
        _StandIn(connection, FlightRecorder(recorder_fd)).run()


if __name__ == "__main__":
    main()
