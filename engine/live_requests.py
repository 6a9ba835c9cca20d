"""The record of every live request: what was asked, what was delivered, who is under suspicion.

Decides which requests a worker is given, so that each continues as it would have when its worker
has died. Knows frames and streams; neither processes nor why they end.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.errors import EngineDied, EngineError
from engine.messages import Abort, Choice, Submit, TokenOutput
from engine.sampling_params import SamplingParams
from engine.token_stream import TokenStream
from engine.validation import check_request

logger = logging.getLogger(__name__)

# Once may have been bad luck: whoever kills a worker from outside may do so twice in a row.
_MAX_DEATHS_ALONE = 2


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


class LiveRequests:
    """What was accepted and has not finished, in the order of arrival.

    Requests are held until there is a worker that takes them (`give_out`), and again from its end
    (`hold`). Suspects of a worker's death are given to the next one alone, one by one.
    """

    def __init__(self, send: Callable[[Submit | Abort], None]) -> None:
        """Begin with none, all held; `send` reaches the worker, if there is one."""
        self._send = send
        self._is_held = True
        self._requests: dict[str, _Request] = {}
        self._request_of: dict[int, tuple[_Request, _Choice]] = {}  # by sequence
        self._suspects: deque[str] = deque()  # to run alone, one by one
        self._next_seq_id = 0
        self.busy_since = 0.0  # when the worker last got something to do
        self.num_dropped_tokens = 0  # that came for what had been given up

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def num_suspects(self) -> int:
        """Requests that may have killed a worker, and are to run alone."""
        return len(self._suspects)

    def add(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        num_choices: int,
        salt: bytes,
        priority: int,
    ) -> TokenStream:
        """Take in a request, whose id must not be live, and give it out as soon as may be."""
        assert request_id not in self._requests, "request ids are unique"
        stream = TokenStream(lambda: self._abort(request_id))
        choices = [_Choice(index) for index in range(num_choices)]
        request = _Request(request_id, prompt_ids, params, salt, priority, choices, stream)
        if not self._requests:
            self.busy_since = time.monotonic()
        self._requests[request_id] = request
        if not self._is_held and not self._suspects:
            self._give_out_one(request)
        return stream

    def abort_choice(self, request_id: str, choice: int) -> None:
        """Give up one choice of a request; does nothing where it has ended."""
        request = self._requests.get(request_id)
        if request is None or request.choices[choice].is_finished:
            return
        self._give_up(Abort(request_id=request_id, choice=choice))
        self._finish_choice(request, request.choices[choice])

    def deliver(self, outputs: Sequence[TokenOutput]) -> None:
        """Hand a step's outputs to their streams: the one loop over them."""
        for output in outputs:
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

    def refuse_misfits(self, *, n_ctx: int, vocab_size: int) -> None:
        """End what was accepted before the model was known, and does not fit it."""
        for request in list(self._requests.values()):
            try:
                check_request(
                    request.prompt_ids, request.params, n_ctx=n_ctx, vocab_size=vocab_size
                )
            except EngineError as error:
                self._forget(request)
                request.stream.finish(error)

    def give_out(self) -> None:
        """Give a new worker the requests: one suspect alone, or else all of them."""
        self._is_held = False
        self.busy_since = time.monotonic()
        self._request_of.clear()
        if self._suspects:
            self._give_out_one(self._requests[self._suspects[0]])
            return
        for request in self._requests.values():
            self._give_out_one(request)

    def hold(self) -> None:
        """Give nothing out from now on: the worker has ended, or is about to."""
        self._is_held = True

    def blame(self, seq_ids: Sequence[int], *, reason: str) -> bool:
        """Take note of the requests that may have killed the worker; True if one surely did.

        Those in the step that never ended, unless they got somewhere since they were last given
        to a worker: most deaths come from outside, and must not slow everyone down. A request
        that runs alone, as a suspect, while the worker dies again and again is the culprit: it
        fails, for that `reason`.
        """
        in_step = {self._request_of[i][0].request_id for i in seq_ids if i in self._request_of}
        if self._suspects and in_step == {self._suspects[0]}:
            suspect = self._requests[self._suspects[0]]
            suspect.num_deaths_alone += 1
            if suspect.num_deaths_alone < _MAX_DEATHS_ALONE:
                return False
            culprit = self._requests.pop(self._suspects.popleft())
            culprit.stream.finish(EngineDied(reason=reason))
            logger.error("request failed id=%s reason=%s", culprit.request_id, reason)
            return True
        for request_id, request in self._requests.items():
            is_new = request_id in in_step and request_id not in self._suspects
            if is_new and not request.has_progressed:
                self._suspects.append(request_id)
        return False

    def fail_all(self, make_error: Callable[[], EngineError]) -> None:
        """End every request, with an exception each.

        Raising one from several streams would tie their tracebacks together.
        """
        requests = list(self._requests.values())
        self._requests.clear()
        self._request_of.clear()
        self._suspects.clear()
        for request in requests:
            request.stream.finish(make_error())

    def _abort(self, request_id: str) -> None:
        request = self._requests[request_id]
        self._withdraw(request)
        self._forget(request)

    def _give_out_one(self, request: _Request) -> None:
        request.has_progressed = False
        for choice in request.choices:
            if not choice.is_finished:
                choice.seq_id = self._next_seq_id
                self._next_seq_id += 1
                self._request_of[choice.seq_id] = (request, choice)
        self._send(request.to_frame())

    def _withdraw(self, request: _Request) -> None:
        """Take a request back from the worker; what still arrives of it is ignored."""
        for choice in request.choices:
            self._request_of.pop(choice.seq_id, None)
        self._give_up(Abort(request_id=request.request_id))

    def _give_up(self, frame: Abort) -> None:
        if not self._is_held:  # or the worker was not given it, and expects another frame first
            self._send(frame)

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
            if self._is_held:
                self._suspects.popleft()
            else:
                self._clear_suspect()
            return
        del self._requests[request.request_id]
        if request.request_id in self._suspects:
            self._suspects.remove(request.request_id)

    def _clear_suspect(self) -> None:
        """Go on: the suspect that runs alone got somewhere, or ended, or was given up."""
        request = self._requests.get(self._suspects.popleft())
        if not self._suspects:
            for other in self._requests.values():
                if other is not request:
                    self._give_out_one(other)
            return
        if request is not None:  # it steps aside, and returns with the others
            self._withdraw(request)
        self._give_out_one(self._requests[self._suspects[0]])
