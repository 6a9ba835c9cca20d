"""What the routes work with, put together once: model, engine, admission, accounts, live streams.

Every completion request has one account, opened on arrival and closed exactly once, whatever
becomes of it: that is why the numbers add up.
"""

import asyncio
import contextlib
import hashlib
import importlib.metadata
import itertools
import logging
import time
from collections.abc import Iterator
from typing import Protocol

from engine.client import EngineState
from engine.config import LaunchConfig
from engine.messages import Ready, StepOutput
from engine.sampling_params import SamplingParams
from engine.token_stream import TokenStream
from server.admission import Admission, Permit
from server.config import ServerConfig
from server.errors import ApiError, DeadlinePassed, InternalError, Unavailable
from server.generation import Generation
from server.metrics import Metrics, Outcome
from server.served_model import ServedModel
from server.streaming import EventStream
from server.timelines import Timeline, Timelines

logger = logging.getLogger(__name__)

VERSION = importlib.metadata.version("kvik")
_TICK_SECONDS = 0.25


class CompletionEngine(Protocol):
    """What is needed of an engine; `engine.client.EngineClient` has it."""

    @property
    def state(self) -> EngineState:
        """What it is up to."""
        ...

    @property
    def reason(self) -> str:
        """Why the state is what it is."""
        ...

    @property
    def facts(self) -> Ready | None:
        """What the last worker said of itself."""
        ...

    @property
    def num_restarts(self) -> int:
        """How often a worker was replaced."""
        ...

    @property
    def num_dropped_tokens(self) -> int:
        """Tokens that came for what had been given up."""
        ...

    @property
    def seconds_without_sign(self) -> float:
        """How long it has had work and shown no sign of life."""
        ...

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
        """Accept a request."""
        ...

    def abort_choice(self, request_id: str, choice: int) -> None:
        """Give up one choice of a live request."""
        ...


class Account:
    """One completion request in the books, from arrival to outcome."""

    def __init__(self, service: "Service", *, request_id: str, salt: bytes) -> None:
        self._service = service
        self.arrived_at = time.monotonic()
        self.permit: Permit | None = None
        self.timeline = Timeline(
            request_id=request_id,
            owner=salt,
            received_at=time.time(),
            arrived_at=self.arrived_at,
        )
        self._is_open = True
        service.metrics.received.inc()
        service.metrics.in_flight.inc()
        service.num_in_flight += 1

    def note(self, event: str, at: float | None = None) -> None:
        """Write down when something happened."""
        self.timeline.events[event] = (at or time.monotonic()) - self.arrived_at

    def reject(self, error: ApiError) -> None:
        """Close the account of a request that was refused before it ran."""
        self._close("rejected", error.status)
        logger.info(
            "request rejected id=%s status=%d code=%s param=%s",
            self.timeline.request_id, error.status, error.code, error.param,
        )  # fmt: skip

    def abandon(self, outcome: Outcome, status: int) -> None:
        """Close the account of a request that never ran and was not refused either."""
        self._close(outcome, status)

    def finish(self, generation: Generation, error: ApiError | None) -> None:
        """Close the account of a request that ran."""
        if not self._is_open:
            return
        outcome = generation.outcome
        if error is not None and outcome != "timeout":
            outcome = "error"
        status = 200 if error is None else error.status
        timeline, metrics = self.timeline, self._service.metrics
        timeline.prompt_tokens = generation.num_prompt_tokens
        timeline.completion_tokens = generation.num_completion_tokens
        timeline.cached_tokens = generation.num_cached_tokens
        timeline.num_preemptions = generation.num_preemptions
        for event, at in (
            ("scheduled", generation.scheduled_at),
            ("first_token", generation.first_token_at),
            ("last_token", generation.last_token_at),
        ):
            if at:
                self.note(event, at)
        self._close(outcome, status)
        metrics.request_generation_tokens.observe(generation.num_completion_tokens)
        metrics.generation_tokens.inc(generation.num_completion_tokens)
        if generation.scheduled_at:
            cached = generation.num_cached_tokens
            metrics.prompt_tokens.labels("cached").inc(cached)
            metrics.prompt_tokens.labels("computed").inc(generation.num_prompt_tokens - cached)
        if generation.first_token_at:
            metrics.decode_time.observe(generation.last_token_at - generation.first_token_at)
        logger.info(
            "request finished id=%s reason=%s prompt_tokens=%d completion_tokens=%d "
            "cached_tokens=%d seconds=%.3f",
            timeline.request_id, outcome, timeline.prompt_tokens, timeline.completion_tokens,
            timeline.cached_tokens, timeline.events["finished"],
        )  # fmt: skip

    def _close(self, outcome: Outcome, status: int) -> None:
        if not self._is_open:
            return
        self._is_open = False
        service = self._service
        self.note("finished")
        service.timelines.add(self.timeline)
        self.timeline.state, self.timeline.outcome = "finished", outcome
        self.timeline.status = status
        if self.permit is not None:
            self.permit.release(is_finished=outcome in ("stop", "length"))
        if outcome != "rejected":
            service.metrics.e2e.observe(time.monotonic() - self.arrived_at)
        service.metrics.finished.labels(outcome).inc()
        service.metrics.in_flight.dec()
        service.num_in_flight -= 1
        if not service.num_in_flight:
            service.idle.set()


class Service:
    """The state of one server."""

    def __init__(
        self,
        config: ServerConfig,
        launch: LaunchConfig,
        model: ServedModel,
        engine: CompletionEngine,
    ) -> None:
        self.config = config
        self.model = model
        self.engine = engine
        self.metrics = Metrics(n_ctx=model.n_ctx)
        self.metrics.seconds_without_sign = lambda: engine.seconds_without_sign
        self.metrics.num_dropped_tokens = lambda: engine.num_dropped_tokens
        self.metrics.num_restarts = lambda: engine.num_restarts
        self.metrics.state = lambda: engine.state
        self.admission = Admission(
            max_choices=launch.engine.max_num_sequences + config.max_waiting_requests,
            max_prompt_tokens=config.max_prompt_tokens,
            on_rejection=lambda bound: self.metrics.admission_rejections.labels(bound).inc(),
        )
        self.timelines = Timelines(config.num_timelines)
        self.generations: set[Generation] = set()  # accepted and not finished
        self.streams: set[EventStream] = set()  # until the last byte has left
        self.num_in_flight = 0  # completion requests, from arrival to outcome
        self.idle = asyncio.Event()
        self.is_draining = False
        self._engine_ids = itertools.count()
        self._fingerprint = ""
        self._pings: set[asyncio.Task[None]] = set()

    def open_account(self, *, request_id: str, salt: bytes) -> Account:
        """Begin the books of a request that came."""
        self.idle.clear()
        return Account(self, request_id=request_id, salt=salt)

    def next_engine_id(self) -> str:
        """A name for a request at the engine; ours, as a client's need not be unique."""
        return f"e{next(self._engine_ids)}"

    def fingerprint(self) -> str:
        """A hash of all that decides what the same request gives; the engine must have loaded."""
        facts = self.engine.facts
        assert facts is not None, "who has tokens has an engine"
        if not self._fingerprint:
            parts = (
                facts.weights_id,
                self.model.tokenizer.fingerprint,
                VERSION,
                facts.device,
                facts.dtype,
                facts.kv_cache_dtype,
                facts.products,
                facts.compiled_for,
                str(facts.is_batch_invariant),
                str(facts.same_bytes),
            )
            digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
            self._fingerprint = f"fp_{digest[:16]}"
            self.metrics.info.labels(
                VERSION, self.model.name, facts.weights_id[:16], self._fingerprint,
                facts.device, facts.dtype,
            ).set(1)  # fmt: skip
        return self._fingerprint

    def record_step(self, output: StepOutput) -> None:
        """Take in a step of the engine."""
        self.metrics.record_step(output)

    def readiness(self) -> tuple[str, str | None]:
        """Whether requests can be sent here: `ready`, or what else and why."""
        engine = self.engine
        if self.is_draining:
            return "draining", "The server is shutting down; what runs is being finished."
        if engine.state == EngineState.LOADING:
            why = f" {_sentence(engine.reason)}" if engine.reason else ""
            return "loading", f"The engine is loading the model.{why}"
        if engine.state != EngineState.READY:
            reason = engine.reason or f"the engine is {engine.state}"
            again = " It is being started again." if engine.state == EngineState.RESTARTING else ""
            return "engine_down", f"{_sentence(reason)}{again}"
        silence = engine.seconds_without_sign
        if silence > self.config.hung_after_seconds:
            return "engine_hung", f"The engine has work and gave no sign for {silence:.1f} s."
        return "ready", None

    def keep(self, generation: Generation, account: Account) -> EventStream:
        """The reply that streams a generation, looked after until it has ended."""
        return EventStream(
            generation,
            fingerprint=self.fingerprint,
            running=lambda: self.running(generation, account),
            streams=self.streams,
        )

    @contextlib.contextmanager
    def running(self, generation: Generation, account: Account) -> Iterator[None]:
        """Keep a generation among those that run, under its deadline, until it has ended."""
        timeout_s = generation.body.timeout_s
        deadline: asyncio.TimerHandle | None = None
        if timeout_s is not None:
            deadline = asyncio.get_running_loop().call_later(
                max(0.0, account.arrived_at + timeout_s - time.monotonic()),
                generation.give_up,
                "timeout",
                DeadlinePassed(timeout_s=timeout_s),
            )
        self.generations.add(generation)
        failure: ApiError | None = None
        try:
            yield
        except ApiError as error:
            failure = error
            raise
        except Exception:  # a mistake of ours, and no departure of the client's
            failure = InternalError()
            raise
        finally:
            if deadline is not None:
                deadline.cancel()
            self.generations.discard(generation)
            account.finish(generation, failure)

    async def watch_streams(self) -> None:
        """Keep silent streams alive, until cancelled."""
        while True:
            await asyncio.sleep(min(_TICK_SECONDS, self.config.keepalive_seconds / 2))
            now = time.monotonic()
            for stream in list(self.streams):
                if now - stream.last_sent_at > self.config.keepalive_seconds:
                    task = asyncio.create_task(stream.ping())
                    self._pings.add(task)
                    task.add_done_callback(self._pings.discard)

    async def drain(self) -> bool:
        """Take nothing more and wait for what runs; True if all of it ended well in time."""
        self.is_draining = True
        try:
            async with asyncio.timeout(self.config.drain_seconds):
                if self.num_in_flight:
                    await self.idle.wait()
            return True
        except TimeoutError:
            for generation in list(self.generations):
                generation.give_up(
                    "error",
                    Unavailable(
                        "The server shut down before the request finished.", code="shutting_down"
                    ),
                )
            return False


def _sentence(reason: str) -> str:
    # Ours begin so; others with a path, or a field's name.
    text = "T" + reason[1:] if reason.startswith("the ") else reason
    return text if text.endswith(".") else text + "."
