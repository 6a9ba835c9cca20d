"""Who computes how many tokens in the next step; knows no tensors, no text and no clock.

There are no phases. A sequence has tokens and a count of those whose K and V are in the cache,
and wants to catch up; decoding, chunked prefill, prefix hits and recomputation after preemption
are one rule. (The idea is vLLM's; preemption by recomputation: arXiv:2309.06180, section 4.5.)
"""

from bisect import bisect_left, insort
from collections.abc import Collection
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from engine.block_manager import BlockManager
from engine.config import EngineConfig
from engine.errors import CacheTooSmall
from engine.sequence import FinishReason, Sequence

_order = attrgetter("order")

# The most tokens of a step's rounds together. Rounds of more rows take longer, and the host is no
# slower than one of them: there would be less to gain, and more to wait for whoever arrives.
_MAX_UNSEEN_TOKENS = 64


@dataclass(slots=True)
class ScheduledBatch:
    """The work of one step, a row for each sequence: those that ran before, then those admitted.

    Row r computes `num_scheduled_tokens[r]` tokens of `sequences[r]`, from its
    `num_computed_tokens` on (which moves only in `Scheduler.update`); its block table is
    `BlockManager.block_table(seq_id)`. A step that decodes may have several rounds: each computes
    the token that the one before it drew, without anyone looking.
    """

    sequences: list[Sequence] = field(default_factory=list)
    num_scheduled_tokens: list[int] = field(default_factory=list)
    sampled_rows: list[int] = field(default_factory=list)  # the rows that yield a draw, ascending
    num_rounds: int = 1  # of which each computes `num_scheduled_tokens` and draws
    # Rounds of the step before it whose draws are still to come: each row begins so much further.
    num_ahead: int = 0
    num_admitted: int = 0  # the last so many rows were waiting before this step
    published_blocks: list[int] = field(default_factory=list)  # shareable if the step succeeds
    # For the machine, before the step and in this order. Both also name what a failed step had
    # to do, whether it did or not.
    released_seq_ids: list[int] = field(default_factory=list)  # rows of earlier steps: drop them
    blocks_to_clear: list[int] = field(default_factory=list)  # may hold NaN: zero them

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows in all rounds."""
        return self.num_rounds * sum(self.num_scheduled_tokens)

    @property
    def is_decode(self) -> bool:
        """Whether every row is one token of a completion, and yields the next."""
        if self.num_ahead or self.num_rounds > 1:
            return True
        return len(self.sampled_rows) == self.num_tokens and all(
            sequence.num_computed_tokens >= sequence.num_prompt_tokens
            for sequence in self.sequences
        )


class Outcome(NamedTuple):
    """What a step brought one sequence: a token, an end (`sequence.finish_reason`), or both."""

    row: int  # in the batch
    sequence: Sequence
    token_id: int | None


class Scheduler:
    """Owns the waiting and the running sequences; one step is `schedule`, then `update` or `fail`.

    `waiting` and `running` are sorted by (priority, arrival). Insertion and removal shift
    pointers, which for thousands of sequences costs a microsecond or two, and lets an abort find
    its sequence by bisection; a heap would keep aborted ones until they surface.
    """

    def __init__(
        self,
        config: EngineConfig,
        block_manager: BlockManager,
        *,
        n_ctx: int,
        eos_ids: Collection[int],
    ) -> None:
        """Raises CacheTooSmall: progress rests on any one sequence fitting into the cache."""
        num_blocks, block_size = block_manager.num_blocks, block_manager.block_size
        if (num_blocks - 1) * block_size < n_ctx:
            raise CacheTooSmall(num_blocks=num_blocks, block_size=block_size, n_ctx=n_ctx)
        self._config = config
        self._block_manager = block_manager
        self._n_ctx = n_ctx
        self._eos_ids = frozenset(eos_ids)
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._requests: dict[str, dict[int, Sequence]] = {}  # unfinished, by request and choice
        self._in_flight: list[ScheduledBatch] = []  # at most two, in order
        self._num_rounds_over = 0  # of the first of them
        self._released_seq_ids: list[int] = []
        self._blocks_to_clear: list[int] = []
        self.num_preemptions = 0  # since the start, as are the two below
        self.num_prefix_query_tokens = 0  # tokens looked up in the prefix cache at admission
        self.num_prefix_hit_tokens = 0  # of those, found, and computed by another request

    @property
    def num_waiting(self) -> int:
        """Sequences waiting, the preempted included."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences running; all of them are in every step."""
        return len(self._running)

    @property
    def num_requests(self) -> int:
        """Requests of which a choice is waiting or running."""
        return len(self._requests)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to schedule."""
        return not self._waiting and not self._running

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait for its turn."""
        choices = self._requests.setdefault(sequence.request_id, {})
        assert sequence.choice not in choices, "(request_id, choice) is unique"
        assert sequence.max_num_tokens <= self._n_ctx, "the sequence is of this model"
        choices[sequence.choice] = sequence
        insort(self._waiting, sequence, key=_order)

    def abort(self, request_id: str, choice: int | None = None) -> int:
        """End a request, or one choice of it, at any moment; returns how many sequences ended.

        What has ended already, or was never here, counts nothing: the end of a sequence and its
        abort may cross on their way. A step in flight keeps its blocks until it is over, so that
        nobody else gets a block which the device still writes; its draw is discarded.
        """
        choices = self._requests.get(request_id, {})
        sequences = [s for s in choices.values() if choice is None or s.choice == choice]
        for sequence in sequences:
            self._end(sequence, "abort")
        if not self._in_flight:
            self._release_finished()
        return len(sequences)

    def schedule(self) -> ScheduledBatch:
        """Choose the rows of the next step: running sequences first, then waiting ones.

        Every running sequence gets one token; what is left of the budget goes to those that
        want more, oldest first. Beside others that decode it is smaller, where it is not enough
        anyway: so a long prompt delays the others by a chunk at most. A batch without rows, which
        needs neither `update` nor `fail`, means that nothing is left to do.

        A sequence that gets fewer tokens than it wants has used the budget up. Hence at most one
        running sequence is short of its prompt, nobody is admitted beside it, and whoever waits
        with the same prefix (its siblings first of all) finds it published when admitted: a
        prompt is never computed twice at a time, and this needs no code.
        """
        assert not self._in_flight, "one step at a time, but for `schedule_ahead`"
        batch = ScheduledBatch()
        num_preempted = self._grow_running()
        budget = self._config.step_tokens - len(self._running)
        decodes = any(s.num_tokens == s.num_computed_tokens + 1 for s in self._running)
        # What one step can finish is not cut: that would only add a step.
        if decodes and self._wants_more_than(budget):
            budget = min(budget, self._config.prompt_tokens)
        for sequence in self._running:
            num_extra = min(sequence.num_tokens - sequence.num_computed_tokens - 1, budget)
            budget -= num_extra
            self._add_row(batch, sequence, 1 + num_extra)
        if not num_preempted:  # a newcomer would take the room just made
            self._admit(batch, budget)
        if batch.sequences:
            self._add_rounds(batch)
            self._blocks_to_clear += self._block_manager.take_blocks_to_clear()
            batch.released_seq_ids = self._released_seq_ids
            batch.blocks_to_clear = self._blocks_to_clear
            self._in_flight.append(batch)
        return batch

    def schedule_ahead(self) -> ScheduledBatch | None:
        """Choose the step after the one in flight, whose draws are still to come, if it can be.

        For a machine that knows them first and runs its steps in order: the same rows, each so
        much further, but for those that end at their limit. None where others should come in, or
        room is short. A row whose sequence turns out to have ended means nothing: its blocks may
        by then be another's, who writes them in a later step, before reading.
        """
        (current,) = self._in_flight
        # A block of a completion that may have ended already must not be shared.
        if self._config.share_completion_blocks or not current.is_decode:
            return None
        if self._waiting and len(self._running) < self._config.max_num_sequences:
            return None
        num_ahead = current.num_rounds
        sequences = [
            sequence
            for sequence in current.sequences
            if not sequence.is_finished
            and sequence.num_tokens + num_ahead < sequence.max_num_tokens
        ]
        if not sequences:
            return None
        for sequence in sequences:
            if not self._block_manager.allocate(sequence.seq_id, sequence.num_tokens + num_ahead):
                return None
        num_rows = len(sequences)
        batch = ScheduledBatch(sequences, [1] * num_rows, list(range(num_rows)))
        batch.num_ahead = num_ahead
        self._add_rounds(batch)
        unclean = self._block_manager.take_blocks_to_clear()
        # A new list: the batch has this one.
        self._blocks_to_clear = self._blocks_to_clear + unclean
        if unclean:
            return None
        self._in_flight.append(batch)
        return batch

    def update(
        self, batch: ScheduledBatch, draws: list[int], failed_rows: Collection[int] = ()
    ) -> list[Outcome]:
        """Take in the result of a step's next round: a draw for each of `batch.sampled_rows`.

        `failed_rows` are those whose logits, or last hidden state where nothing is sampled, were
        not finite: a chunk that goes unreported leaves NaN for others to share. Their sequences
        finish with "error", their draws mean nothing, their blocks are never shared again; who
        shared them within this very step has read them, and fails with them. Returns what there
        is to tell, in no order; of sequences aborted meanwhile, or ended in an earlier round, there
        is nothing. With its last round the step is over, and not before are blocks free.
        """
        assert batch is self._in_flight[0], "steps end in order"
        outcomes: list[Outcome] = []
        for row in failed_rows:
            sequence = batch.sequences[row]
            if batch.num_ahead and not self._block_manager.holds(sequence.seq_id):
                continue  # it ended before: there is nothing left to withdraw
            self._block_manager.withdraw(self._block_manager.block_table(sequence.seq_id))
            if not sequence.is_finished:
                self._finish(sequence, "error")
                outcomes.append(Outcome(row, sequence, None))
        for row, sequence in enumerate(batch.sequences):
            sequence.num_computed_tokens += batch.num_scheduled_tokens[row]
            # Elsewhere the last token is never computed: here there was nothing to draw.
            if sequence.num_computed_tokens == sequence.max_num_tokens and not sequence.is_finished:
                self._finish(sequence, "length")
                outcomes.append(Outcome(row, sequence, None))
        for row, token_id in zip(batch.sampled_rows, draws, strict=True):
            sequence = batch.sequences[row]
            if not sequence.is_finished:
                self._append(sequence, token_id)
                outcomes.append(Outcome(row, sequence, token_id))
        self._num_rounds_over += 1
        if self._num_rounds_over < batch.num_rounds:
            return outcomes
        self._num_rounds_over = 0
        del self._in_flight[0]
        self._released_seq_ids = self._released_seq_ids[len(batch.released_seq_ids) :]
        self._blocks_to_clear = self._blocks_to_clear[len(batch.blocks_to_clear) :]
        self._release_finished()
        return outcomes

    def fail(self, batch: ScheduledBatch) -> None:
        """Take back a step that raised: it can be scheduled again as if it had never been.

        Sequences that ran before keep their blocks, computed by earlier steps. Those admitted
        wait again: they may have counted on blocks which this step was to compute.
        """
        assert batch is self._in_flight[-1], "the last goes first"
        self._block_manager.withdraw(batch.published_blocks)
        del self._in_flight[-1]
        if not self._in_flight:
            self._release_finished()
        for sequence in batch.sequences[len(batch.sequences) - batch.num_admitted :]:
            if not sequence.is_finished:
                self._running.remove(sequence)
                self._send_back(sequence)

    def give_up_youngest(self, batch: ScheduledBatch) -> Sequence | None:
        """End with "error" the one of a failed step's sequences that would be preempted first.

        After `fail`, for a step that was too large: the next one is tried without that sequence.
        None if all of them were aborted meanwhile.
        """
        assert not self._in_flight, "between steps"
        victim = max((s for s in batch.sequences if not s.is_finished), key=_order, default=None)
        if victim is not None:
            self._end(victim, "error")
            self._release_finished()
        return victim

    def _grow_running(self) -> int:
        """Give every running sequence room for its tokens; returns how many were preempted."""
        num_running = len(self._running)
        row = 0
        while row < len(self._running):
            sequence = self._running[row]
            if self._block_manager.allocate(sequence.seq_id, sequence.num_tokens):
                row += 1
            else:
                # Preempt the youngest of the lowest priority, perhaps the sequence itself: the
                # oldest always advances, so preemption cannot go round in circles.
                victim = self._running.pop()
                victim.num_preemptions += 1
                self._send_back(victim)
        num_preempted = num_running - len(self._running)
        self.num_preemptions += num_preempted
        return num_preempted

    def _wants_more_than(self, budget: int) -> bool:
        """Whether the prompts at hand take more tokens, were nothing of them cached."""
        budget -= sum(s.num_tokens - s.num_computed_tokens - 1 for s in self._running)
        for sequence in self._waiting:
            if budget < 0:
                break
            budget -= sequence.num_tokens
        return budget < 0

    def _admit(self, batch: ScheduledBatch, budget: int) -> None:
        """Start waiting sequences in order until budget, places or blocks run out.

        Nobody overtakes: a head that does not fit is next when it does. A sequence gets room for
        all its tokens at once, and leaves a block for each that runs: a newcomer who filled the
        cache would be preempted, its work undone, as soon as one of the others grows.
        """
        while self._waiting and budget and len(self._running) < self._config.max_num_sequences:
            sequence = self._waiting[0]
            looks_up = not sequence.wants_prompt_logprobs
            prefix = self._block_manager.match_prefix(sequence) if looks_up else []
            if not self._block_manager.allocate(
                sequence.seq_id, sequence.num_tokens, prefix=prefix, reserve=len(self._running)
            ):
                break
            del self._waiting[0]
            insort(self._running, sequence, key=_order)
            sequence.state = "running"
            sequence.num_computed_tokens = len(prefix) * self._block_manager.block_size
            if looks_up and sequence.num_preemptions == 0:
                num_found = self._block_manager.num_tokens_from_others(sequence, prefix)
                sequence.num_cached_tokens = min(num_found, sequence.num_prompt_tokens)
                self.num_prefix_query_tokens += sequence.num_tokens
                self.num_prefix_hit_tokens += num_found
            num_tokens = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
            budget -= num_tokens
            batch.num_admitted += 1
            self._add_row(batch, sequence, num_tokens)

    def _add_rounds(self, batch: ScheduledBatch) -> None:
        """Let a step that decodes go on while nothing stops it, with blocks for all of it.

        The nearest limit stops it, and what the sequences allow; where anybody waits, who may come
        in with the next end, or blocks are few, there is one round.
        """
        sequences = batch.sequences
        # Where completions are shared, each step publishes the blocks that it fills.
        if self._waiting or self._config.share_completion_blocks:
            return
        if 2 * len(sequences) > _MAX_UNSEEN_TOKENS or not batch.is_decode:
            return
        num_rounds = _MAX_UNSEEN_TOKENS // len(sequences)
        for sequence in sequences:
            num_left = sequence.max_num_tokens - sequence.num_tokens - batch.num_ahead
            num_rounds = min(num_rounds, num_left, sequence.max_num_rounds)
        blocks = self._block_manager
        num_needed = len(sequences) * -(-num_rounds // blocks.block_size)  # at most
        if num_needed > blocks.num_free_blocks + blocks.num_cached_blocks:
            return
        for sequence in sequences:
            num_tokens = sequence.num_tokens + batch.num_ahead + num_rounds - 1
            has_room = blocks.allocate(sequence.seq_id, num_tokens)
            assert has_room, "each needs no more than was counted"
        batch.num_rounds = num_rounds

    def _add_row(self, batch: ScheduledBatch, sequence: Sequence, num_tokens: int) -> None:
        end = sequence.num_computed_tokens + num_tokens
        if end == sequence.num_tokens < sequence.max_num_tokens:
            batch.sampled_rows.append(len(batch.sequences))
        batch.sequences.append(sequence)
        batch.num_scheduled_tokens.append(num_tokens)
        batch.published_blocks += self._block_manager.publish(sequence, num_tokens)

    def _append(self, sequence: Sequence, token_id: int) -> None:
        """Append a draw, and finish where it ends the completion. min_tokens is the sampler's."""
        sequence.token_ids.append(token_id)
        is_eos = token_id in self._eos_ids and not sequence.params.ignore_eos
        if is_eos or token_id in sequence.stop_token_ids:
            self._finish(sequence, "stop")
        elif sequence.num_tokens == sequence.max_num_tokens:
            self._finish(sequence, "length")

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        """Finish a sequence wherever it is; a running one is still to be released."""
        if sequence.state == "waiting":
            del self._waiting[bisect_left(self._waiting, sequence.order, key=_order)]
        self._finish(sequence, reason)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.state = "finished"
        sequence.finish_reason = reason
        choices = self._requests[sequence.request_id]
        del choices[sequence.choice]
        if not choices:
            del self._requests[sequence.request_id]

    def _release_finished(self) -> None:
        for sequence in self._running:
            if sequence.is_finished:
                self._release(sequence)
        self._running = [s for s in self._running if not s.is_finished]

    def _send_back(self, sequence: Sequence) -> None:
        """Return a sequence to its place among the waiting, nothing of it computed."""
        self._release(sequence)
        sequence.state = "waiting"
        sequence.num_computed_tokens = 0
        insort(self._waiting, sequence, key=_order)

    def _release(self, sequence: Sequence) -> None:
        self._block_manager.free(sequence.seq_id)
        self._released_seq_ids.append(sequence.seq_id)
