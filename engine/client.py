"""The engine as the server sees it: starts the worker, watches it, and outlives it.

Owns the record of every live request. A worker that dies or hangs is replaced and gets them all
again, with the tokens delivered so far; because a draw depends on seed, choice and position
alone, each continues as it would have. Knows no text, no HTTP and no torch.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from engine.config import LaunchConfig
from engine.errors import EngineDied, EngineError, EngineStopped, StartRefused
from engine.messages import (
    LENGTH_BYTES,
    Abort,
    Choice,
    FromWorker,
    Ready,
    Start,
    StartFailed,
    StepOutput,
    StepStats,
    Submit,
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
# Once may have been bad luck: whoever kills a worker from outside may do so twice in a row.
_MAX_DEATHS_ALONE = 2


class EngineState(StrEnum):
    """What the engine is up to, as health reports it."""

    LOADING = "loading"  # the first worker starts
    READY = "ready"
    RESTARTING = "restarting"  # a worker died or hung, the next one starts
    DOWN = "down"  # it kept dying, or could not start: nothing will change without an operator
    STOPPED = "stopped"


@dataclass(slots=True)
class _Choice:
    """What is known of one generation: all that another engine needs to continue it."""

    index: int
    seq_id: int = -1  # at the worker; a new one each time it is given to one
    completion_ids: list[int] = field(default_factory=list)
    is_finished: bool = False


@dataclass(slots=True)
class _Request:
    """A live request: what was asked, what was delivered, and whether it is a suspect."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    salt: bytes
    priority: int
    choices: list[_Choice]
    stream: TokenStream
    has_progressed: bool = False  # since it was last given to a worker
    num_deaths_alone: int = 0  # of workers that ran nothing else

    @property
    def is_finished(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.is_finished for choice in self.choices)

    def to_frame(self) -> Submit:
        """The request for a worker: unfinished choices, prompt and completion apart."""
        return Submit(
            request_id=self.request_id,
            prompt_ids=self.prompt_ids,
            choices=[
                Choice(seq_id=c.seq_id, index=c.index, completion_ids=c.completion_ids)
                for c in self.choices
                if not c.is_finished
            ],
            params=self.params,
            salt=self.salt,
            priority=self.priority,
        )


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
        worker may have been started already.
        """
        self._config = config
        self._hang_seconds = hang_seconds
        self._start_seconds = start_seconds
        self._max_fruitless_restarts = max_fruitless_restarts
        self._worker_module = worker_module
        self._requests: dict[str, _Request] = {}  # unfinished, in the order of arrival
        self._request_of: dict[int, tuple[_Request, _Choice]] = {}  # by sequence
        self._suspects: deque[str] = deque()  # to run alone, one by one
        self._next_seq_id = 0
        self._num_fruitless_restarts = 0
        self._busy_since = 0.0  # when the worker last got something to do
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
        self.num_dropped_tokens = 0  # that came for what had been given up
        self.on_step: Callable[[StepOutput], None] = lambda output: None

    async def start(self) -> Ready:
        """Start the engine and wait until it takes requests; raises StartRefused."""
        self._supervisor = asyncio.create_task(self._supervise())
        await self._settled.wait()
        if self.facts is None:
            raise StartRefused(reason=self.reason)
        return self.facts

    def launch(self) -> None:
        """Start the engine and do not wait; requests are held until it is ready."""
        self._supervisor = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """End the worker, and with it whatever still runs."""
        self.state = EngineState.STOPPED
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        self._fail_all(EngineStopped)

    @property
    def num_live_requests(self) -> int:
        """Requests accepted and not finished."""
        return len(self._requests)

    @property
    def worker_pid(self) -> int | None:
        """The worker's process id, if one runs."""
        return None if self._worker is None else self._worker.pid

    @property
    def seconds_without_sign(self) -> float:
        """How long the worker has had work and shown no sign of life; 0 when it has none."""
        if not self._requests or self._worker is None or self.state != EngineState.READY:
            return 0.0
        return time.monotonic() - max(self._busy_since, self._worker.recorder.last_sign_of_life)

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
        assert request_id not in self._requests, "request ids are unique"
        if self.facts is not None:
            self._check(prompt_ids, params, self.facts)
        stream = TokenStream(lambda: self._abort(request_id))
        choices = [_Choice(index) for index in range(num_choices)]
        request = _Request(request_id, prompt_ids, params, salt, priority, choices, stream)
        if not self._requests:
            self._busy_since = time.monotonic()
        self._requests[request_id] = request
        if self.state == EngineState.READY and not self._suspects:
            self._send_request(request)
        return stream

    def _abort(self, request_id: str) -> None:
        request = self._requests[request_id]
        self._withdraw(request)
        self._forget(request)

    def abort_choice(self, request_id: str, choice: int) -> None:
        """Give up one choice of a live request, whose text has ended; the others go on."""
        request = self._requests.get(request_id)
        if request is None or request.choices[choice].is_finished:
            return
        self._send(pack(Abort(request_id=request_id, choice=choice)))
        self._finish_choice(request, request.choices[choice])

    async def _supervise(self) -> None:
        """Run one worker after another until told to stop, or until they keep dying."""
        try:
            while self._num_fruitless_restarts <= self._max_fruitless_restarts:
                self._num_fruitless_restarts += 1
                if not await self._run_worker():
                    break
                self.num_restarts += 1
                delay = 0.1 * 2 ** (self._num_fruitless_restarts - 1)
                await asyncio.sleep(delay if self._num_fruitless_restarts else 0)
            else:
                self.reason = f"the engine died {self._num_fruitless_restarts} times in a row"
            self.state = EngineState.DOWN
            if self.facts is not None:  # whoever starts it is told by `start`
                logger.error("engine down reason=%s", self.reason)
            self._fail_all(lambda: EngineDied(reason=self.reason))
        finally:
            self._settled.set()

    async def _run_worker(self) -> bool:
        """Run a worker until it ends. False: it refused to start, and another would as well."""
        worker, self._first_worker = self._first_worker, None
        worker = self._worker = worker or WorkerProcess(
            self._config.model,
            max_num_sequences=self._config.engine.max_num_sequences,
            module=self._worker_module,
        )
        watch: asyncio.Task[None] | None = None
        try:
            reader, self._writer = await asyncio.open_connection(sock=worker.take_connection())
            self._send(pack(Start(config=self._config)))
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
                    self._refuse_held(first)
                else:
                    logger.info(
                        "engine ready again restarts=%d live_requests=%d",
                        self.num_restarts, len(self._requests),
                    )  # fmt: skip
                self.facts = first
                self.state, self.reason = EngineState.READY, ""
                self._resubmit()
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
        if self._writer is not None:  # or we were stopped before there was one
            self._writer.close()
            self._writer = None
        with worker:
            how = await worker.end(grace_seconds=_GRACE_SECONDS if was_ready else 0)
            self._worker = None
            if was_ready:
                self.reason = self.reason or f"the engine process ended with {how}"
                self._blame(worker.recorder.seq_ids_in_step())
                logger.error(
                    "engine died reason=%s live_requests=%d suspects=%d",
                    self.reason, len(self._requests), len(self._suspects),
                )  # fmt: skip

    def _blame(self, seq_ids: Sequence[int]) -> None:
        """Take note of the requests that may have killed the worker.

        Those in the step that never ended, unless they got somewhere since they were last given
        to a worker: most deaths come from outside, and must not slow everyone down. A request
        that runs alone, as a suspect, while the worker dies again and again is the culprit.
        """
        in_step = {self._request_of[i][0].request_id for i in seq_ids if i in self._request_of}
        if self._suspects and in_step == {self._suspects[0]}:
            suspect = self._requests[self._suspects[0]]
            suspect.num_deaths_alone += 1
            if suspect.num_deaths_alone < _MAX_DEATHS_ALONE:
                return
            culprit = self._requests.pop(self._suspects.popleft())
            culprit.stream.finish(EngineDied(reason=self.reason))
            self._num_fruitless_restarts = 0  # what it was is known now
            logger.error("request failed id=%s reason=%s", culprit.request_id, self.reason)
            return
        for request_id, request in self._requests.items():
            is_new = request_id in in_step and request_id not in self._suspects
            if is_new and not request.has_progressed:
                self._suspects.append(request_id)

    def _resubmit(self) -> None:
        """Give a new worker the live requests: one suspect alone, or else all of them."""
        self._busy_since = time.monotonic()
        self._request_of.clear()
        if self._suspects:
            self._send_request(self._requests[self._suspects[0]])
            return
        for request in self._requests.values():
            self._send_request(request)

    def _clear_suspect(self) -> None:
        """Go on: the suspect that runs alone got somewhere, or ended, or was given up."""
        request = self._requests.get(self._suspects.popleft())
        if not self._suspects:
            for other in self._requests.values():
                if other is not request:
                    self._send_request(other)
            return
        if request is not None:  # it steps aside, and returns with the others
            self._withdraw(request)
        self._send_request(self._requests[self._suspects[0]])

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
        """Hand a step's outputs to their streams: the one loop over them."""
        self.stats = frame.stats
        if frame.outputs:
            self._num_fruitless_restarts = 0
        for output in frame.outputs:
            entry = self._request_of.get(output.seq_id)
            if entry is None:  # given up while the step ran
                self.num_dropped_tokens += output.token_id is not None
                continue
            request, choice = entry
            request.has_progressed = True
            if output.token_id is not None:
                choice.completion_ids.append(output.token_id)
            request.stream.put(choice.index, output)
            if output.finish_reason is not None:
                self._finish_choice(request, choice)
        if self._suspects and self._requests[self._suspects[0]].has_progressed:
            self._clear_suspect()
        self.on_step(frame)

    def _finish_choice(self, request: _Request, choice: _Choice) -> None:
        choice.is_finished = True
        self._request_of.pop(choice.seq_id, None)
        if request.is_finished:
            self._forget(request)
            request.stream.finish()

    def _forget(self, request: _Request) -> None:
        """Drop a request from the record, and from among the suspects."""
        if self._suspects and self._suspects[0] == request.request_id:
            del self._requests[request.request_id]
            if self.state == EngineState.READY:
                self._clear_suspect()
            else:
                self._suspects.popleft()
            return
        del self._requests[request.request_id]
        if request.request_id in self._suspects:
            self._suspects.remove(request.request_id)

    def _withdraw(self, request: _Request) -> None:
        """Take a request back from the worker; what still arrives of it is ignored."""
        for choice in request.choices:
            self._request_of.pop(choice.seq_id, None)
        self._send(pack(Abort(request_id=request.request_id)))

    def _fail_all(self, make_error: Callable[[], Exception]) -> None:
        # An exception each: raising one from several streams would tie their tracebacks together.
        requests = list(self._requests.values())
        self._requests.clear()
        self._request_of.clear()
        self._suspects.clear()
        for request in requests:
            request.stream.finish(make_error())

    @staticmethod
    def _check(prompt_ids: list[int], params: SamplingParams, facts: Ready) -> None:
        check_request(prompt_ids, params, n_ctx=facts.n_ctx, vocab_size=facts.vocab_size)

    def _refuse_held(self, facts: Ready) -> None:
        """Refuse what was accepted before the model was known, and does not fit it."""
        for request in list(self._requests.values()):
            try:
                self._check(request.prompt_ids, request.params, facts)
            except EngineError as error:
                self._forget(request)
                request.stream.finish(error)

    def _send_request(self, request: _Request) -> None:
        request.has_progressed = False
        for choice in request.choices:
            if not choice.is_finished:
                choice.seq_id = self._next_seq_id
                self._next_seq_id += 1
                self._request_of[choice.seq_id] = (request, choice)
        self._send(pack(request.to_frame()))

    def _send(self, frame: bytes) -> None:
        if self._writer is not None:
            self._writer.write(frame)


async def _read_frame(reader: asyncio.StreamReader) -> FromWorker | None:
    """The next frame, or None when the worker is gone."""
    try:
        length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "little")
        return unpack_from_worker(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
