"""One completion request while it runs: its prompts, the text of its choices, its accounts.

Streamed and whole replies are made of the same deltas, so they cannot differ. Knows no HTTP.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.errors import EngineError
from engine.messages import TokenOutput, TopLogprobs
from server.detokenizer import Detokenizer
from server.errors import ApiError, EngineFailed, from_engine
from server.metrics import Metrics, Outcome
from server.prompt_streams import PromptStreams
from server.protocol.requests import CompletionRequest
from server.served_model import ServedModel

_LEAST_LOGPROB = -9999.0  # in place of minus infinity, which JSON has not


@dataclass(slots=True)
class LogprobLists:
    """The four parallel lists of a reply's `logprobs`."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def append(
        self, model: ServedModel, token_id: int, top: TopLogprobs | None, offset: int
    ) -> None:
        """Add a token; without `top`, one that nothing predicted."""
        spelling = model.spell(token_id)
        self.tokens.append(spelling)
        self.text_offset.append(offset)
        if top is None:
            self.token_logprobs.append(None)
            self.top_logprobs.append(None)
            return
        logprob = max(top.logprob, _LEAST_LOGPROB)
        alternatives = {
            model.spell(i): max(value, _LEAST_LOGPROB)
            for i, value in zip(top.token_ids, top.logprobs, strict=True)
        }
        alternatives.setdefault(spelling, logprob)
        self.token_logprobs.append(logprob)
        self.top_logprobs.append(alternatives)

    def extend(self, other: "LogprobLists") -> None:
        """Add what another has behind what this one has."""
        self.tokens += other.tokens
        self.token_logprobs += other.token_logprobs
        self.top_logprobs += other.top_logprobs
        self.text_offset += other.text_offset

    def to_reply(self) -> dict[str, Any]:
        """As it goes over the wire."""
        return {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }


@dataclass(slots=True)
class Delta:
    """What is new of one choice."""

    text: str = ""
    logprobs: LogprobLists | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class PromptRun:
    """One prompt and its choices; one request to the engine."""

    def __init__(
        self,
        model: ServedModel,
        body: CompletionRequest,
        *,
        place: int,
        token_ids: list[int],
        text: str,
        seed: int,
    ) -> None:
        """Take a prompt's ids, the text they stand for, and its place among the prompts."""
        self.place = place
        self.model = model
        self.body = body
        self.token_ids = token_ids
        self.text = text
        self.seed = seed
        self.choices = [ChoiceText(self, index) for index in range(body.num_candidates)]
        self.num_cached_tokens = 0
        self.scheduled_at = 0.0
        self.first_token_at = 0.0
        self._logprobs: LogprobLists | None = None
        self._offsets: list[int] = []
        self._logprobs_from = -1  # the sequence they come from
        if body.echo and body.logprobs is not None:
            self._logprobs = LogprobLists()
            decoder = Detokenizer()
            for token_id in token_ids:
                self._offsets.append(min(decoder.num_characters, len(text)))
                decoder.push(model.tokenizer.token_bytes(token_id))
            self._logprobs.append(model, token_ids[0], None, 0)

    @property
    def is_echo_ready(self) -> bool:
        """Whether all is known that comes before the completion."""
        return self._logprobs is None or len(self._logprobs.tokens) == len(self.token_ids)

    def add_prompt_logprobs(self, seq_id: int, logprobs: Sequence[TopLogprobs]) -> None:
        """Take in those of the next prompt tokens.

        An engine that replaced a dead one begins from the start, under another `seq_id`.
        """
        if self._logprobs is not None and not self.is_echo_ready:
            if seq_id != self._logprobs_from:
                self._logprobs_from = seq_id
                self._logprobs = LogprobLists()
                self._logprobs.append(self.model, self.token_ids[0], None, 0)
            for top in logprobs:
                i = len(self._logprobs.tokens)
                self._logprobs.append(self.model, self.token_ids[i], top, self._offsets[i])

    def begin(self) -> Delta:
        """What every choice starts with: nothing, or the prompt."""
        delta = Delta()
        if self.body.echo:
            delta.text = self.text
        if self.body.logprobs is not None:
            delta.logprobs = LogprobLists()
            if self._logprobs is not None:
                delta.logprobs.extend(self._logprobs)
        if self.body.return_token_ids:
            delta.prompt_token_ids = self.token_ids
            delta.token_ids = []
        return delta


class ChoiceText:
    """One choice: from its tokens to its text, up to its end."""

    def __init__(self, run: PromptRun, index: int) -> None:
        self.run = run
        self.index = index  # among the prompt's candidates
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.num_tokens = 0
        self.num_preemptions = 0
        self.sum_logprobs = 0.0
        self.last_token_at = 0.0
        self._detokenizer = Detokenizer(
            run.body.stop, include_stop=run.body.include_stop_str_in_output
        )
        self._text = ""
        self._logprobs = LogprobLists()
        self._token_ids: list[int] = []
        self._has_begun = False
        # Besides text, in every delta.
        self._has_more = run.body.logprobs is not None or run.body.return_token_ids

    @property
    def is_finished(self) -> bool:
        """Whether the text has ended; the engine may not know yet."""
        return self.finish_reason is not None

    @property
    def mean_logprob(self) -> float:
        """What candidates are ranked by."""
        return self.sum_logprobs / self.num_tokens if self.num_tokens else -math.inf

    def push(self, output: TokenOutput) -> bool:
        """Take in what a step brought this choice; whether its text has ended with it."""
        assert not self.is_finished, "the text has ended"
        if output.token_id is not None:
            self._push_token(output.token_id, output)
        if output.finish_reason is not None and not self.is_finished:
            self._text += self._detokenizer.finish()
            self.finish_reason = output.finish_reason
            if self._detokenizer.stop is not None:
                self.finish_reason, self.stop_reason = "stop", self._detokenizer.stop
            elif output.finish_reason == "stop" and output.token_id in self.run.body.stop_token_ids:
                self.stop_reason = output.token_id
        self.num_preemptions = max(self.num_preemptions, output.num_preemptions)
        return self.is_finished

    def _push_token(self, token_id: int, output: TokenOutput) -> None:
        body, model = self.run.body, self.run.model
        self.num_tokens += 1
        if output.logprobs is not None:
            self.sum_logprobs += output.logprobs.logprob
        if body.logprobs is not None:
            offset = len(self.run.text) + self._detokenizer.num_characters
            self._logprobs.append(model, token_id, output.logprobs, offset)
        if body.return_token_ids:
            self._token_ids.append(token_id)
        if output.finish_reason == "stop" and not body.include_stop_str_in_output:
            return  # the token that ended it
        if body.skip_special_tokens and token_id in model.special_token_ids:
            return
        self._text += self._detokenizer.push(
            model.tokenizer.token_bytes(token_id), may_stop=self.num_tokens >= body.min_tokens
        )
        if self._detokenizer.stop is not None:
            self.finish_reason, self.stop_reason = "stop", self._detokenizer.stop

    def take_text(self) -> str | None:
        """What is new, where it is text and nothing else: all of a stream but its first and last.

        None where `take_delta` has more to tell; it is to be asked then.
        """
        if not self._has_begun or self.finish_reason is not None or self._has_more:
            return None
        text, self._text = self._text, ""
        return text

    def take_delta(self) -> Delta | None:
        """What is new since the last time, if there is something to show."""
        if not self.run.is_echo_ready or not (self._text or self.is_finished):
            return None
        body = self.run.body
        if self._has_begun:
            delta = Delta()
            if body.logprobs is not None:
                delta.logprobs = LogprobLists()
            if body.return_token_ids:
                delta.token_ids = []
        else:
            self._has_begun = True
            delta = self.run.begin()
        delta.text += self._text
        self._text = ""
        if delta.logprobs is not None:
            delta.logprobs.extend(self._logprobs)
            self._logprobs = LogprobLists()
        if delta.token_ids is not None:
            delta.token_ids = delta.token_ids + self._token_ids
            self._token_ids = []
        delta.finish_reason = self.finish_reason
        delta.stop_reason = self.stop_reason
        return delta


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

    async def advance(self) -> list[ChoiceText] | None:
        """Wait until choices got further, and return them; None when all have ended.

        Raises ApiError where the engine fails, or the request was given up for a reason.
        """
        try:
            arrivals = await self.streams.arrivals() if self._num_unfinished else []
        except EngineError as error:
            raise from_engine(error) from error
        if not arrivals:
            if self.given_up is not None and self.given_up[1] is not None:
                raise self.given_up[1]
            return None
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
