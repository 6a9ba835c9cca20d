"""One completion request while it runs: who got further, when, and what it comes to.

Knows clocks, counts and metrics; text is made in `prompt_run`, replies in `streaming`.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from engine.errors import EngineError
from engine.messages import TokenOutput
from server.errors import ApiError, EngineFailed, from_engine
from server.metrics import Metrics, Outcome
from server.prompt_run import ChoiceText, PromptRun
from server.prompt_streams import PromptStreams
from server.protocol.requests import CompletionRequest
from server.served_model import ServedModel


class Generation:
    """A request that was accepted: from its prompts' streams to its choices' texts."""

    def __init__(
        self,
        *,
        completion_id: str,
        model: ServedModel,
        body: CompletionRequest,
        runs: list[PromptRun],
        arrived_at: float,
        metrics: Metrics,
        abort_choice: Callable[[int, int], None],
    ) -> None:
        """Begin without streams: one is to be added to `streams` for each run, in their order.

        `abort_choice(run index, choice)` tells the engine that a choice's text has ended.
        """
        self.id = completion_id
        self.created = int(time.time())
        self.model = model
        self.body = body
        self.runs = runs
        self.streams = PromptStreams()
        self.arrived_at = arrived_at
        self._metrics = metrics
        self._abort_choice = abort_choice
        self._num_unfinished = sum(len(run.choices) for run in runs)
        self.given_up: tuple[Outcome, ApiError | None] | None = None
        self.first_token_at = 0.0
        self.last_token_at = 0.0

    def give_up(self, outcome: Outcome, error: ApiError | None = None) -> None:
        """End the request before its time; whoever iterates over it comes to the end."""
        if self.given_up is None and self._num_unfinished:
            self.given_up = (outcome, error)
            self.streams.give_up()

    def listen(self, listener: Callable[[], None]) -> None:
        """Have someone called soon after there is something to take, or the end."""
        self.streams.listen(listener)

    def take(self) -> list[ChoiceText] | None:
        """Take in what came: the choices that got further; None when all have ended.

        Raises ApiError where the engine failed, or the request was given up for a reason.
        """
        arrivals = self.streams.take() if self._num_unfinished else []
        if not arrivals:
            return [] if self._goes_on() else None
        now = time.monotonic()
        touched: dict[ChoiceText, None] = {}  # an ordered set
        for place, outputs in arrivals:
            run = self.runs[place]
            for index, output in outputs:
                choice = run.choices[index]
                if self._take(run, choice, output, now):
                    touched[choice] = None
                if output.prompt_logprobs:  # the others may have waited for them
                    touched.update(dict.fromkeys(run.choices))
        return list(touched)

    def _goes_on(self) -> bool:
        """Whether something is still to come, where nothing has."""
        try:
            if self._num_unfinished and self.streams.go_on():
                return True
        except EngineError as error:
            raise from_engine(error) from error
        if self.given_up is not None and self.given_up[1] is not None:
            raise self.given_up[1]
        return False

    async def finish(self) -> None:
        """Take in all that comes, up to the end. Raises ApiError as `take` does."""
        while (choices := self.take()) is not None:
            if not choices:
                called = asyncio.Event()
                self.listen(called.set)
                await called.wait()

    def close(self) -> None:
        """Let go of what still runs; does nothing once all has ended."""
        self._metrics.num_overrun_tokens += self.streams.close()

    def _take(self, run: PromptRun, choice: ChoiceText, output: TokenOutput, now: float) -> bool:
        """Take in one output; whether its choice got further."""
        if choice.finish_reason is not None:  # its text ended while the engine went on
            self._metrics.num_overrun_tokens += output.token_id is not None
            return False
        if output.finish_reason == "error":
            raise EngineFailed(
                output.error or "The model failed on this request.", code=output.error_code
            )
        if output.prompt_logprobs:
            run.add_prompt_logprobs(output.seq_id, output.prompt_logprobs)
        if output.scheduled_at and not run.scheduled_at:
            run.scheduled_at = output.scheduled_at
            run.num_cached_tokens = output.num_cached_tokens
            self._metrics.queue_time.observe(max(0.0, run.scheduled_at - self.arrived_at))
        if output.token_id is not None:
            self._time_token(run, choice, now)
        if choice.push(output):
            self._num_unfinished -= 1
            if output.finish_reason is None:
                self._abort_choice(run.place, choice.index)
        return True

    def _time_token(self, run: PromptRun, choice: ChoiceText, now: float) -> None:
        self.last_token_at = now
        if not run.first_token_at:
            run.first_token_at = now
            self.first_token_at = self.first_token_at or now
            self._metrics.ttft.observe(now - self.arrived_at)
            self._metrics.prefill_time.observe(max(0.0, now - run.scheduled_at))
        elif choice.last_token_at:
            self._metrics.inter_token_latency.observe(now - choice.last_token_at)
        choice.last_token_at = now

    def ranked(self) -> list[tuple[int, PromptRun, ChoiceText]]:
        """The choices to return and their indices, in the order of the indices."""
        ranked: list[tuple[int, PromptRun, ChoiceText]] = []
        for place, run in enumerate(self.runs):
            choices = run.choices
            if len(choices) > self.body.n:
                best = sorted(choices, key=lambda choice: -choice.mean_logprob)
                choices = best[: self.body.n]
            ranked += [(place * self.body.n + i, run, choice) for i, choice in enumerate(choices)]
        return ranked

    @property
    def is_finished(self) -> bool:
        """Whether the text of every choice has ended."""
        return not self._num_unfinished

    @property
    def outcome(self) -> Outcome:
        """How it ended, if the engine did not fail."""
        if self.given_up is not None:
            return self.given_up[0]
        if self._num_unfinished:
            return "abort"
        reasons = {choice.finish_reason for run in self.runs for choice in run.choices}
        return "length" if "length" in reasons else "stop"

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(len(run.token_ids) for run in self.runs)

    @property
    def num_completion_tokens(self) -> int:
        """Of all choices, best_of's candidates included."""
        return sum(choice.num_tokens for run in self.runs for choice in run.choices)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that another request had computed."""
        return sum(run.num_cached_tokens for run in self.runs)

    @property
    def num_preemptions(self) -> int:
        """Of all choices."""
        return sum(choice.num_preemptions for run in self.runs for choice in run.choices)

    @property
    def scheduled_at(self) -> float:
        """When the first of its prompts took part in a step; 0 before."""
        return min((run.scheduled_at for run in self.runs if run.scheduled_at), default=0.0)

    def usage(self) -> dict[str, Any]:
        """The tokens of the request so far."""
        prompt, completion = self.num_prompt_tokens, self.num_completion_tokens
        returned = sum(choice.num_tokens for _, _, choice in self.ranked())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
            "completion_tokens_details": {"discarded_tokens": completion - returned},
        }

    def timings(self) -> dict[str, Any]:
        """Where the time went so far."""
        now = time.monotonic()
        scheduled_at = self.scheduled_at or now
        first_token_at = self.first_token_at or now
        decode_seconds = max(0.0, self.last_token_at - first_token_at)
        # The first step's tokens are prefill's.
        first = sum(bool(choice.num_tokens) for run in self.runs for choice in run.choices)
        decoded = self.num_completion_tokens - first
        return {
            "queue_seconds": round(max(0.0, scheduled_at - self.arrived_at), 6),
            "prefill_seconds": round(max(0.0, first_token_at - scheduled_at), 6),
            "decode_seconds": round(decode_seconds, 6),
            "total_seconds": round(now - self.arrived_at, 6),
            "tokens_per_second": (
                round(decoded / decode_seconds, 3) if decoded > 0 and decode_seconds else None
            ),
            "num_preemptions": self.num_preemptions,
        }
