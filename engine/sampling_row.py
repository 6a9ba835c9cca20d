"""What the sampler must know of one sequence, prepared once and kept up to date; knows no torch."""

import math
import struct
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from engine.sampling_params import COLDEST, SamplingParams

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

OPTIONS = struct.Struct("=dqqqqddd")  # how a row is packed for a draw
_NO_TOP_K = 2**62


class SamplingRow:
    """A sequence as the sampler sees it: whoever owns the sequence tells it of every new token.

    The same token ids give the same row, whether it was told of them one by one or at once.
    """

    __slots__ = (
        "_counts",
        "_places",
        "_seen_ids",
        "allowed_ids",
        "banned_ids",
        "bias_ids",
        "biases",
        "choice",
        "has_penalties",
        "is_bare",
        "is_plain",
        "num_prompt_tokens",
        "num_tokens",
        "options",
        "params",
    )

    def __init__(
        self,
        params: SamplingParams,
        *,
        choice: int = 0,
        prompt_ids: Sequence[int],
        completion_ids: Iterable[int] = (),
        eos_ids: Iterable[int] = (),
    ) -> None:
        """Prepare a row. Every id must lie in the vocabulary: that was checked at the door."""
        self.params = params
        self.choice = choice
        self.num_prompt_tokens = len(prompt_ids)
        self.num_tokens = len(prompt_ids)
        stop_ids = set(params.stop_token_ids)
        if not params.ignore_eos:  # then an eos stops nothing, and needs no ban
            stop_ids.update(eos_ids)
        allowed = params.allowed_token_ids
        if allowed is not None and stop_ids.issuperset(allowed):
            stop_ids = set()  # a ban would leave nothing to draw: what is allowed outranks it
        self.allowed_ids = None if allowed is None else _ids(sorted(set(allowed)))
        self.banned_ids = _ids(sorted(stop_ids))
        self.bias_ids = _ids(list(params.logit_bias))
        self.biases = np.array(list(params.logit_bias.values()), dtype=np.float32)

        repeats = params.repetition_penalty != 1
        self.has_penalties = bool(
            repeats or params.presence_penalty != 0 or params.frequency_penalty != 0
        )
        # Whether it will never want more than a token id from its logits as they are,
        self.is_bare = params.logprobs is None and not (
            self.has_penalties
            or len(self.bias_ids) > 0
            or self.allowed_ids is not None
            or (len(self.banned_ids) > 0 and params.min_tokens > 0)
        )
        self.is_plain = self.is_bare and params.is_greedy  # and of these the best one's.
        # As `OPTIONS`: temperature, seed, choice, position (told later), top_k, top_p, logarithm of
        # min_p, typical_p. A batch puts them side by side: a step has no time to look them up.
        self.options = OPTIONS.pack(
            0.0 if params.is_greedy else max(params.temperature, COLDEST),
            params.seed,
            choice,
            0,
            min(params.top_k or _NO_TOP_K, _NO_TOP_K),
            params.top_p,
            math.log(params.min_p) if params.min_p else -math.inf,
            params.typical_p,
        )
        self._places: dict[int, int] = {}  # in the two arrays, by id
        self._seen_ids = _ids([])
        self._counts = np.zeros(0, dtype=np.float32)
        if repeats:
            for token_id in prompt_ids:
                self._see(token_id, 0)
        self.extend(completion_ids)

    @property
    def num_completion_tokens(self) -> int:
        """Tokens drawn so far."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def has_bans(self) -> bool:
        """Whether the next token must not be one that stops."""
        return len(self.banned_ids) > 0 and self.num_completion_tokens < self.params.min_tokens

    @property
    def is_edited(self) -> bool:
        """Whether the logits change before a token is chosen from them."""
        return (
            self.has_penalties
            or len(self.bias_ids) > 0
            or self.allowed_ids is not None
            or self.has_bans
        )

    @property
    def seen(self) -> tuple[Ids, Floats]:
        """Ids under a penalty, each once, and how often each occurs in the completion; views."""
        return self._seen_ids[: len(self._places)], self._counts[: len(self._places)]

    def extend(self, token_ids: Iterable[int]) -> None:
        """Take in the completion tokens since the last call."""
        for token_id in token_ids:
            self.num_tokens += 1
            if self.has_penalties:
                self._see(token_id, 1)

    def _see(self, token_id: int, count: int) -> None:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._seen_ids):  # grow by doubling
            more = max(64, place)
            self._seen_ids = np.concatenate((self._seen_ids, np.zeros(more, np.int64)))
            self._counts = np.concatenate((self._counts, np.zeros(more, np.float32)))
        self._seen_ids[place] = token_id
        self._counts[place] += count


def _ids(values: Sequence[int]) -> Ids:
    return np.array(values, dtype=np.int64)
