"""The engine's process as its parent holds it: started, ended and seen to its end; knows no frames.

It can be started long before anyone has a word for it: what it imports takes longer than all that
a server has to load, and goes on beside that.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from engine.config import THREADS_ENVIRONMENT
from engine.flight_recorder import FlightRecorder

_LOOK_SECONDS = 0.005


class WorkerProcess:
    """A worker, our end of the socket to it, and the flight recorder that it shares with us.

    A context, at whose end it does not run any more.
    """

    def __init__(
        self, model: Path | str, *, max_num_sequences: int, module: str = "engine.worker"
    ) -> None:
        """Start a worker, which hashes the weights in a directory: they must be those it will load.

        It waits for its first frame, and ends when we hang up or end. Raises OSError where the
        system has no room for it, and leaves nothing open.
        """
        with ExitStack() as opened:
            ours, theirs = socket.socketpair()
            opened.callback(ours.close)
            with theirs:
                self.recorder = FlightRecorder.create(max_num_sequences=max_num_sequences)
                opened.callback(self.recorder.close)
                self._process = subprocess.Popen(
                    [
                        sys.executable, "-P", "-m", module, str(theirs.fileno()),
                        str(self.recorder.descriptor), str(os.getpid()), str(model),
                    ],
                    pass_fds=(theirs.fileno(), self.recorder.descriptor), stdin=subprocess.DEVNULL,
                    env=_environment(),
                    process_group=0,  # a terminal's Ctrl-C is for us, who then end it
                )  # fmt: skip
            opened.pop_all()
        self._connection: socket.socket | None = ours
        self._is_closed = False

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave nothing running and nothing open; nothing is left to do the second time."""
        if self._is_closed:
            return
        self._is_closed = True
        self.kill()
        self._process.wait()
        if self._connection is not None:
            self._connection.close()
        self.recorder.close()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def take_connection(self) -> socket.socket:
        """Our end of the socket, which is the caller's from now on; may be taken once."""
        connection, self._connection = self._connection, None
        assert connection is not None
        return connection

    def kill(self) -> None:
        """End it at once; does nothing once it has ended."""
        self._process.kill()

    async def end(self, *, grace_seconds: float) -> str:
        """See it to its end, by force when the grace is over; how it ended, in words.

        Its own status says more than our signal, so it may be given time to end by itself.
        """
        loop = asyncio.get_running_loop()
        patience = loop.time() + grace_seconds
        while (status := self._process.poll()) is None:
            if loop.time() >= patience:
                self.kill()
            await asyncio.sleep(_LOOK_SECONDS)
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def _environment() -> dict[str, str]:
    """Our environment, with what must be set before the worker's C library starts."""
    # glibc returns large blocks to the kernel when freed, and logits are large and come every
    # step: faulting their pages in again would cost more than computing them.
    malloc = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
    # The worker runs with -P and finds its packages where we did: a directory one happens to stand
    # in, nanoGPT's with its model.py say, does not get in their way.
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**malloc, **THREADS_ENVIRONMENT, **os.environ, "PYTHONPATH": path}
