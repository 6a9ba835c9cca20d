"""The engine's own process: an inbox, steps, one frame a step; knows no text and no HTTP.

Started as `python -m engine.worker SOCKET_FD RECORDER_FD PARENT_PID MODEL_DIRECTORY` by
`engine/worker_process.py`.
"""

import gc
import sys
from concurrent.futures import Future
from pathlib import Path

from weights.digest import start_hashing

if __name__ == "__main__":
    # The imports make half a million objects that stay: looking through them for garbage again and
    # again is a tenth of the start. `run` lets it look at what comes after.
    gc.disable()
    # They keep one core busy, and this another.
    _hashing = start_hashing(Path(sys.argv[4]))

import ctypes
import logging
import os
import select
import signal
import socket

from engine.engine import Engine
from engine.errors import EngineError
from engine.flight_recorder import FlightRecorder
from engine.loading import load_engine
from engine.messages import (
    LENGTH_BYTES,
    Abort,
    FromWorker,
    Start,
    StartFailed,
    Submit,
    ToWorker,
    pack,
    unpack_to_worker,
)
from weights.errors import CheckpointError

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_RECEIVE_BYTES = 2**20


class Inbox:
    """Frames from a socket, taken without waiting or with."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray()

    def take(self, *, wait: bool) -> list[ToWorker]:
        """The frames that have arrived; with `wait`, at least one. Raises EOFError at the end."""
        frames: list[ToWorker] = []
        while True:
            while (frame := self._next()) is not None:
                frames.append(frame)
            timeout = None if wait and not frames else 0
            if not select.select([self._connection], [], [], timeout)[0]:
                return frames
            data = self._connection.recv(_RECEIVE_BYTES)
            if not data:
                raise EOFError
            self._buffer += data

    def _next(self) -> ToWorker | None:
        if len(self._buffer) < LENGTH_BYTES:
            return None
        end = LENGTH_BYTES + int.from_bytes(self._buffer[:LENGTH_BYTES], "little")
        if len(self._buffer) < end:
            return None
        frame = unpack_to_worker(bytes(self._buffer[LENGTH_BYTES:end]))
        del self._buffer[:end]
        return frame


def run(connection: socket.socket, recorder: FlightRecorder, hashing: Future[str] | None) -> None:
    """Load, then step until the other side hangs up."""
    inbox = Inbox(connection)
    (start,) = inbox.take(wait=True)
    assert isinstance(start, Start)
    try:
        engine, ready = load_engine(start.config, hashing=hashing)
    except (CheckpointError, EngineError, ValueError, MemoryError, OSError) as error:
        _send(connection, StartFailed(reason=str(error) or type(error).__name__))
        return
    gc.freeze()
    gc.enable()
    _send(connection, ready)
    serve(engine, inbox, connection, recorder)


def serve(
    engine: Engine, inbox: Inbox, connection: socket.socket, recorder: FlightRecorder
) -> None:
    """The loop: what arrived, one step, one frame."""
    while True:
        has_aborted = False
        may_wait = engine.is_idle and not engine.prepare_memory()
        for frame in inbox.take(wait=may_wait):
            if isinstance(frame, Submit):
                # On the record: a request may also be the death of us before its first step.
                # One choice names it: there may be more than the record, or a step, has room for.
                recorder.start_step([frame.choices[0].seq_id])
                engine.add(frame)
                recorder.end_step()
            elif isinstance(frame, Abort):
                engine.abort(frame)
                has_aborted = True
        output = engine.step(recorder)
        if output is None and has_aborted:
            output = engine.counts()
        if output is not None:
            _send(connection, output)


def _send(connection: socket.socket, frame: FromWorker) -> None:
    connection.sendall(pack(frame))


def _die_with(parent_pid: int) -> None:
    """Let the kernel kill us when our parent dies, however it dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it was faster
            os._exit(1)


def main() -> None:
    """Run as a process of its own."""
    socket_fd, recorder_fd, parent_pid = (int(argument) for argument in sys.argv[1:4])
    _die_with(parent_pid)
    # systemd asks all processes of a service to end, and a terminal may. When the engine does,
    # after what still runs, is for the server to say.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    with socket.socket(fileno=socket_fd) as connection:
        try:
            run(connection, FlightRecorder(recorder_fd), _hashing)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass  # the server is gone, and we follow
        except Exception:  # the worker's last words; the client sees the end and acts
            logger.exception("engine failed")
            os._exit(1)  # at once: the client waits for our end before it starts another


if __name__ == "__main__":
    main()
