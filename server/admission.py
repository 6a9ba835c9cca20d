"""How much may be in the house at once, decided on arrival, before any work is done for it."""

import math
import time
from collections import deque
from collections.abc import Callable

from server.errors import InvalidRequest, Overloaded

_RATE_WINDOW_SECONDS = 30.0
_MAX_RETRY_SECONDS = 60


class Permit:
    """The room one request takes; given back once, however it ends."""

    def __init__(self, admission: "Admission", num_choices: int, num_prompt_tokens: int) -> None:
        self._admission = admission
        self._num_choices = num_choices
        self._num_prompt_tokens = num_prompt_tokens
        self._is_held = True

    def correct(self, num_prompt_tokens: int) -> None:
        """Replace the estimate by what the prompts turned out to be."""
        self._admission.num_prompt_tokens += num_prompt_tokens - self._num_prompt_tokens
        self._num_prompt_tokens = num_prompt_tokens

    def release(self, *, is_finished: bool) -> None:
        """Give the room back; a request that finished counts for the rate."""
        if self._is_held:
            self._is_held = False
            self._admission.give_back(self._num_choices, self._num_prompt_tokens, is_finished)


class Admission:
    """Bounds on generations and on prompt tokens, both of everything accepted and not finished."""

    def __init__(
        self,
        *,
        max_choices: int,
        max_prompt_tokens: int,
        clock: Callable[[], float] = time.monotonic,
        on_rejection: Callable[[str], None] = lambda bound: None,
    ) -> None:
        self.max_choices = max_choices
        self._max_prompt_tokens = max_prompt_tokens
        self._clock = clock
        self._on_rejection = on_rejection
        self._finished: deque[tuple[float, int, int]] = deque()  # when, choices, prompt tokens
        self.num_choices = 0
        self.num_prompt_tokens = 0

    def reserve(self, *, num_choices: int, num_prompt_tokens: int) -> Permit:
        """Take room for a request, or raise: Overloaded, or InvalidRequest if it never fits."""
        for bound, asked, taken, limit, column in (
            ("requests", num_choices, self.num_choices, self.max_choices, 1),
            (
                "prompt_tokens",
                num_prompt_tokens,
                self.num_prompt_tokens,
                self._max_prompt_tokens,
                2,
            ),
        ):
            what = "choices" if bound == "requests" else "prompt tokens"
            if asked > limit:
                raise InvalidRequest(
                    f"The request has {asked} {what} (prompts times candidates are choices); this "
                    f"server takes at most {limit} at a time. Send it in parts.",
                    param="prompt",
                )
            if taken + asked > limit:
                self._on_rejection(bound)
                seconds = self._seconds_until(taken + asked - limit, column)
                raise Overloaded(
                    f"The server is busy: {taken} {what} are accepted and at most {limit} may "
                    f"be. Try again in {seconds} s.",
                    headers={"Retry-After": str(seconds)},
                )
        self.num_choices += num_choices
        self.num_prompt_tokens += num_prompt_tokens
        return Permit(self, num_choices, num_prompt_tokens)

    def give_back(self, num_choices: int, num_prompt_tokens: int, is_finished: bool) -> None:
        """Free the room of a request; for its permit alone."""
        self.num_choices -= num_choices
        self.num_prompt_tokens -= num_prompt_tokens
        if is_finished:
            self._finished.append((self._clock(), num_choices, num_prompt_tokens))
            self._forget()

    def _forget(self) -> None:
        oldest = self._clock() - _RATE_WINDOW_SECONDS
        while self._finished and self._finished[0][0] < oldest:
            self._finished.popleft()

    def _seconds_until(self, excess: int, column: int) -> int:
        """How long it takes to finish so much, at the rate of the last half minute."""
        self._forget()
        amount = sum(entry[column] for entry in self._finished)
        if not amount:
            return 1
        elapsed = max(1.0, self._clock() - self._finished[0][0])
        return min(_MAX_RETRY_SECONDS, max(1, math.ceil(excess * elapsed / amount)))
