"""One prompt and its choices: from the engine's outputs to text, up to each choice's end.

Streamed and whole replies are made of the same deltas, so they cannot differ. Knows no streams and
no clock: times are noted here by whoever has one.
"""

import math
from collections.abc import Sequence

from engine.messages import TokenOutput, TopLogprobs
from server.delta import Delta, LogprobLists
from server.detokenizer import Detokenizer
from server.protocol.requests import CompletionRequest
from server.served_model import ServedModel


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
