"""One generation as the engine sees it: ids and counts; knows no text, no blocks and no tensors."""

from collections.abc import Iterable
from typing import Literal

from engine.errors import PromptTooLong
from engine.sampling_params import SamplingParams

SequenceState = Literal["waiting", "running", "finished"]
FinishReason = Literal["stop", "length", "abort", "error"]


class Sequence:
    """The engine's state of one generation; a request with `n=3` has three.

    Before a step of decoding `num_computed_tokens == num_tokens - 1`: the last token's K and V
    are computed by the step whose logits choose the next one. A sequence has no phase: a prompt,
    a prompt half in the cache and a preempted sequence are all just further behind.

    The scheduler writes `state`, `finish_reason`, the counts and, by appending, `token_ids`;
    the block manager extends `block_hashes`; the engine notes `scheduled_at`; nobody else writes
    anything.
    """

    __slots__ = (
        "block_hashes",
        "choice",
        "finish_reason",
        "max_num_rounds",
        "max_num_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "order",
        "params",
        "priority",
        "request_id",
        "salt",
        "scheduled_at",
        "seq_id",
        "state",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self,
        *,
        seq_id: int,
        request_id: str,
        prompt_ids: Iterable[int],
        params: SamplingParams,
        n_ctx: int,
        choice: int = 0,
        completion_ids: Iterable[int] = (),
        salt: bytes = b"",
        priority: int = 0,
        max_num_rounds: int = 1,
    ) -> None:
        """Make a waiting sequence.

        `seq_id` is unique and grows with arrival. `completion_ids` are tokens delivered by an
        engine that died since: they continue, and count, as if this engine had drawn them.
        Sequences share prefixes only under equal `salt`. Smaller `priority` goes first.
        `max_num_rounds` is how many of its tokens may be drawn before anyone looks at the first.
        Raises PromptTooLong.
        """
        self.seq_id = seq_id
        self.request_id = request_id
        self.choice = choice
        self.params = params
        self.salt = salt
        self.priority = priority
        self.max_num_rounds = max_num_rounds
        self.order = (priority, seq_id)  # first come, first served within a priority
        self.token_ids = list(prompt_ids)  # prompt, then completion
        self.num_prompt_tokens = len(self.token_ids)
        self.token_ids += completion_ids
        # Where drawing ends. A sequence already there is computed and finishes without a draw.
        self.max_num_tokens = min(self.num_prompt_tokens + params.max_tokens, n_ctx)
        self.stop_token_ids = frozenset(params.stop_token_ids)
        self.block_hashes: list[bytes] = []  # of its first full blocks, as far as needed so far
        self.state: SequenceState = "waiting"
        self.finish_reason: FinishReason | None = None
        self.num_computed_tokens = 0  # tokens whose K and V are in the cache
        self.num_cached_tokens = 0  # prompt tokens another request had computed (for `usage`)
        self.num_preemptions = 0
        self.scheduled_at = 0.0  # time.monotonic() of its first step; the engine writes it
        if self.num_prompt_tokens > n_ctx:
            raise PromptTooLong(num_tokens=self.num_prompt_tokens, n_ctx=n_ctx)
        assert self.num_prompt_tokens, "a prompt has at least one token: bos, if nothing else"
        assert self.num_tokens <= self.max_num_tokens, "more was delivered than was asked for"

    @property
    def num_tokens(self) -> int:
        """Prompt and completion tokens so far."""
        return len(self.token_ids)

    @property
    def num_completion_tokens(self) -> int:
        """Tokens drawn so far, those by an earlier engine included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def completion_ids(self) -> list[int]:
        """The tokens drawn so far, a copy."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will be computed or drawn."""
        return self.state == "finished"

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether every prompt position's logits are needed, so nothing may come from the cache.

        Once for all choices of a request; and they were delivered by the time of the first draw.
        """
        return (
            self.params.prompt_logprobs is not None
            and self.choice == 0
            and self.num_completion_tokens == 0
        )
