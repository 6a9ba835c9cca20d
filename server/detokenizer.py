"""From bytes, a token's at a time, to text that may be shown; knows no ids, no requests, no HTTP.

Text leaves as whole characters, and is held back only while it could still become a stop string.
What comes out does not depend on how the bytes were cut into tokens.
"""

import codecs
from collections.abc import Sequence

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class StopMatcher:
    """Finds the first stop string in a text that arrives in pieces.

    One Knuth-Morris-Pratt automaton a stop string: its state is how much of that string the text
    so far ends with, and the largest state is exactly what must be held back. The match that
    ends first wins; of those that end together, the longest.
    """

    def __init__(self, stops: Sequence[str], *, keep_match: bool = False) -> None:
        """Look for `stops`, none empty; with `keep_match` the text ends behind the match."""
        self._stops = [(stop, _fallbacks(stop)) for stop in stops]
        self._states = [0] * len(self._stops)
        self._first_characters = {stop[0] for stop in stops}
        self._keep_match = keep_match
        self._held = ""
        self.match: str | None = None

    def push(self, text: str) -> str:
        """Add text and return what may be shown; nothing may be added behind a match."""
        assert self.match is None, "the text has ended"
        if not self._held and self._first_characters.isdisjoint(text):
            return text
        seen = self._held + text
        for end, character in enumerate(text, len(self._held) + 1):
            longest = ""
            for i, (stop, fallbacks) in enumerate(self._stops):
                state = self._states[i]
                while state and stop[state] != character:
                    state = fallbacks[state - 1]
                state += stop[state] == character
                if state == len(stop):
                    longest = max(longest, stop, key=len)
                    state = fallbacks[state - 1]
                self._states[i] = state
            if longest:
                self.match = longest
                self._held = ""
                return seen[: end if self._keep_match else end - len(longest)]
        return self._hold(seen)

    def _hold(self, seen: str) -> str:
        cut = len(seen) - max(self._states, default=0)
        self._held = seen[cut:]
        return seen[:cut]

    def release(self) -> str:
        """End the text, or what may match: give what was held back."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held


def _fallbacks(stop: str) -> list[int]:
    """For every prefix of `stop`, the length of its longest proper prefix that it ends with."""
    fallbacks = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = fallbacks[length - 1]
        length += stop[i] == stop[length]
        fallbacks[i] = length
    return fallbacks


class Detokenizer:
    """The text of one choice."""

    def __init__(self, stops: Sequence[str] = (), *, include_stop: bool = False) -> None:
        self._decoder = _Utf8Decoder("replace")
        self._matcher = StopMatcher(stops, keep_match=include_stop)
        self.num_characters = 0  # decoded so far, shown or not

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text."""
        return self._matcher.match

    def push(self, data: bytes, *, may_stop: bool = True) -> str:
        """Add a token's bytes and return the text that may be shown now.

        Text of tokens that may not stop is no part of a stop string either.
        """
        return self._show(self._decoder.decode(data), may_stop)

    def finish(self) -> str:
        """End the text: show what was held back, U+FFFD for half a character."""
        text = self._show(self._decoder.decode(b"", final=True), may_stop=True)
        return text if self.stop is not None else text + self._matcher.release()

    def _show(self, text: str, may_stop: bool) -> str:
        self.num_characters += len(text)
        return self._matcher.push(text) if may_stop else self._matcher.release() + text
