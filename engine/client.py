"""The engine as the server sees it: starts the worker, watches it, and outlives it.

A worker that dies or hangs is replaced, and the next one is given the live requests with the
tokens delivered so far; because a draw depends on seed, choice and position alone, each continues
as it would have. Knows no text, no HTTP and no torch.
"""

import asyncio
import errno
import logging
import sys
import time
from collections.abc import Callable
from enum import StrEnum

from engine.config import LaunchConfig
from engine.errors import EngineDied, EngineStopped, StartRefused
from engine.live_requests import LiveRequests
from engine.messages import (
    LENGTH_BYTES,
    FromWorker,
    Ready,
    Start,
    StartFailed,
    StepOutput,
    StepStats,
    ToWorker,
    pack,
    unpack_from_worker,
)
from engine.sampling_params import SamplingParams
from engine.token_stream import TokenStream
from engine.validation import check_request
from engine.worker_process import WorkerProcess

logger = logging.getLogger(__name__)

_WATCH_INTERVAL_SECONDS = 0.1
_GRACE_SECONDS = 2.0  # for a worker that hung up to end by itself
_SHORTAGE_SECONDS = 1.0  # between attempts to make a process where the system has no room
_SHORTAGES = {
    errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT,
}  # fmt: skip


class EngineState(StrEnum):
    """What the engine is up to, as health reports it."""

    LOADING = "loading"  # the first worker starts
    READY = "ready"
    RESTARTING = "restarting"  # a worker died or hung, the next one starts
    DOWN = "down"  # it kept dying, or could not start: nothing will change without an operator
    STOPPED = "stopped"


class EngineClient:
    """Starts a worker process, gives each request a `TokenStream`, and restarts what dies.

    For one event loop: nothing here is thread-safe, and nothing needs a lock.
    """

    def __init__(
        self,
        config: LaunchConfig,
        *,
        hang_seconds: float = 30.0,
        start_seconds: float = 300.0,
        max_fruitless_restarts: int = 3,
        worker_module: str = "engine.worker",
        first_worker: WorkerProcess | None = None,
    ) -> None:
        """Prepare a client.

        A worker without a sign of life for `hang_seconds` while it has work is killed. After
        `max_fruitless_restarts` workers in a row that brought no token, none is started any more.
        Another `worker_module` speaks the same frames, and need not compute for them. The first
        worker may have been started already. Raises ValueError for times that cannot be.
        """
        if not 0 < hang_seconds < 1e9:
            raise ValueError(f"hang_seconds must be positive, got {hang_seconds}")
        self._config = config
        self._hang_seconds = hang_seconds
        self._start_seconds = start_seconds
        self._max_fruitless_restarts = max_fruitless_restarts
        self._worker_module = worker_module
        self._requests = LiveRequests(self._send)
        self._num_fruitless_restarts = 0
        self._first_worker = first_worker
        self._worker: WorkerProcess | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()  # ready, down or stopped: no longer loading
        self.state = EngineState.LOADING
        self.reason = ""  # why the state is what it is, a sentence for people
        self.facts: Ready | None = None  # what the last worker said of itself
        self.stats: StepStats | None = None
        self.num_restarts = 0
        self.on_step: Callable[[StepOutput], None] = lambda output: None

    async def start(self) -> Ready:
        """Start the engine and wait until it takes requests; raises StartRefused.

        Requests that come before are held until it is ready.
        """
        self._supervisor = asyncio.create_task(self._supervise())
        await self._settled.wait()
        if self.facts is None:
            raise StartRefused(reason=self.reason)
        return self.facts

    async def stop(self) -> None:
        """End the worker, and with it whatever still runs."""
        self.state = EngineState.STOPPED
        self._requests.hold()
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        self._requests.fail_all(EngineStopped)

    @property
    def num_live_requests(self) -> int:
        """Requests accepted and not finished."""
        return len(self._requests)

    @property
    def num_dropped_tokens(self) -> int:
        """Tokens that came for what had been given up."""
        return self._requests.num_dropped_tokens

    @property
    def worker_pid(self) -> int | None:
        """The worker's process id, if one runs."""
        return None if self._worker is None else self._worker.pid

    @property
    def seconds_without_sign(self) -> float:
        """How long the worker has had work and shown no sign of life; 0 when it has none."""
        if not self._requests or self._worker is None or self.state != EngineState.READY:
            return 0.0
        return time.monotonic() - max(
            self._requests.busy_since, self._worker.recorder.last_sign_of_life
        )

    def submit(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        num_choices: int = 1,
        salt: bytes = b"",
        priority: int = 0,
    ) -> TokenStream:
        """Accept a request; `request_id` must not be live.

        Raises EngineStopped, EngineDied, and once the model is known PromptTooLong and
        TokenOutOfRange; before, these end the stream.
        """
        if self.state == EngineState.STOPPED:
            raise EngineStopped
        if self.state == EngineState.DOWN:
            raise EngineDied(reason=self.reason)
        if self.facts is not None:
            n_ctx, vocab_size = self.facts.n_ctx, self.facts.vocab_size
            check_request(prompt_ids, params, n_ctx=n_ctx, vocab_size=vocab_size)
        return self._requests.add(
            request_id, prompt_ids, params, num_choices=num_choices, salt=salt, priority=priority
        )

    def abort_choice(self, request_id: str, choice: int) -> None:
        """Give up one choice of a live request, whose text has ended; the others go on."""
        self._requests.abort_choice(request_id, choice)

    async def _supervise(self) -> None:
        """Run one worker after another until told to stop, or until they keep dying."""
        try:
            while self._num_fruitless_restarts <= self._max_fruitless_restarts:
                worker = await self._make_worker()
                self._num_fruitless_restarts += 1
                if worker is None or not await self._run_worker(worker):
                    break
                self.num_restarts += 1
                delay = 0.1 * 2 ** (self._num_fruitless_restarts - 1)
                await asyncio.sleep(delay if self._num_fruitless_restarts else 0)
            else:
                self.reason = f"the engine died {self._num_fruitless_restarts} times in a row"
        finally:
            if self.state != EngineState.STOPPED:
                mistake = sys.exc_info()[1]  # of ours, and nobody else would hear of it
                if mistake is not None:
                    self.reason = f"nobody looks after the engine any more: {mistake!r}"
                self.state = EngineState.DOWN
                if self.facts is not None or mistake:  # else whoever starts it is told by `start`
                    logger.error("engine down reason=%s", self.reason, exc_info=mistake)
                self._requests.fail_all(lambda: EngineDied(reason=self.reason))
            self._settled.set()

    async def _make_worker(self) -> WorkerProcess | None:
        """Start a process as soon as there is room for it; None where something else is in the way.

        It may be short of descriptors, processes or memory, by a crowd of clients for one: that
        passes, and says nothing about the engine.
        """
        worker, self._first_worker = self._first_worker, None
        while worker is None:
            try:
                worker = WorkerProcess(
                    self._config.model,
                    max_num_sequences=self._config.engine.max_num_sequences,
                    module=self._worker_module,
                )
            except OSError as error:
                reason = f"the engine's process cannot be started: {error.strerror}"
                if reason != self.reason:
                    self.reason = reason
                    logger.warning("engine not started reason=%s", reason)
                if error.errno not in _SHORTAGES:
                    return None
                await asyncio.sleep(_SHORTAGE_SECONDS)
        return worker

    async def _run_worker(self, worker: WorkerProcess) -> bool:
        """Run a worker until it ends. False: it refused to start, and another would as well."""
        self._worker = worker
        watch: asyncio.Task[None] | None = None
        try:
            reader, self._writer = await asyncio.open_connection(sock=worker.take_connection())
            self._send(Start(config=self._config))
            try:
                async with asyncio.timeout(self._start_seconds):
                    first = await _read_frame(reader)
            except TimeoutError:
                self.reason = f"the engine did not start within {self._start_seconds:.0f} s"
                return True
            if isinstance(first, StartFailed):
                self.reason = first.reason
                return False
            if isinstance(first, Ready):
                if self.facts is None:
                    self._requests.refuse_misfits(n_ctx=first.n_ctx, vocab_size=first.vocab_size)
                else:
                    logger.info(
                        "engine ready again restarts=%d live_requests=%d",
                        self.num_restarts, len(self._requests),
                    )  # fmt: skip
                self.facts = first
                self.state, self.reason = EngineState.READY, ""
                self._requests.give_out()
                self._settled.set()
                watch = asyncio.create_task(self._watch())
                while (frame := await _read_frame(reader)) is not None:
                    assert isinstance(frame, StepOutput), "the first frame alone is different"
                    self._deliver(frame)
            return True
        finally:
            if watch is not None:
                watch.cancel()
            await self._bury(worker)

    async def _bury(self, worker: WorkerProcess) -> None:
        """See a worker to its end, and find out whom it died of."""
        was_ready = self.state == EngineState.READY
        if was_ready:
            self.state = EngineState.RESTARTING
        self._requests.hold()
        if self._writer is not None:  # or we were stopped before there was one
            self._writer.close()
            self._writer = None
        with worker:
            how = await worker.end(grace_seconds=_GRACE_SECONDS if was_ready else 0)
            self._worker = None
            if was_ready:
                self.reason = self.reason or f"the engine process ended with {how}"
                if self._requests.blame(worker.recorder.seq_ids_in_step(), reason=self.reason):
                    self._num_fruitless_restarts = 0  # what it was is known now
                logger.error(
                    "engine died reason=%s live_requests=%d suspects=%d",
                    self.reason, len(self._requests), self._requests.num_suspects,
                )  # fmt: skip

    async def _watch(self) -> None:
        """Kill a worker that shows no sign of life while it has work."""
        while True:
            await asyncio.sleep(min(_WATCH_INTERVAL_SECONDS, self._hang_seconds / 4))
            if self.seconds_without_sign > self._hang_seconds and self._worker is not None:
                self.reason = f"the engine hung for {self._hang_seconds:.0f} s"
                logger.error("engine hung pid=%d", self._worker.pid)
                self._worker.kill()
                return

    def _deliver(self, frame: StepOutput) -> None:
        """Take in what a step brought."""
        self.stats = frame.stats
        if frame.outputs:
            self._num_fruitless_restarts = 0
        self._requests.deliver(frame.outputs)
        self.on_step(frame)

    def _send(self, frame: ToWorker) -> None:
        # A worker that has died may be noticed here first: the next is given what is live.
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(pack(frame))


async def _read_frame(reader: asyncio.StreamReader) -> FromWorker | None:
    """The next frame, or None when the worker is gone."""
    try:
        length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "little")
        return unpack_from_worker(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
