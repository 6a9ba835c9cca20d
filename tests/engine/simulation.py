"""A machine that computes nothing but remembers everything: the oracle of the policy's tests.

For every slot of the cache it keeps which tokens, at which position, after which prefix, were
written there, and it checks at each row of each step that every position the row reads holds what
a run of that sequence alone, undisturbed, would have put there.
"""

from collections.abc import Collection, Iterable

from engine.block_manager import BlockManager
from engine.config import EngineConfig
from engine.sampling_params import SamplingParams
from engine.scheduler import Outcome, ScheduledBatch, Scheduler
from engine.sequence import Sequence

NAN = -1  # what a row with a fault writes; a history is never negative
ZERO = -2  # what a cleared slot holds
JUNK = -3  # what a row writes behind the end of its sequence
EOS = 0
VOCAB_SIZE = 4


def extend_history(history: int, token_id: int, is_completion: bool) -> int:
    """The history of a position: a number that depends on everything its K and V depend on."""
    return hash((history, token_id, is_completion)) & 0x7FFF_FFFF_FFFF_FFFF


def histories(sequence: Sequence, share_completion_blocks: bool) -> list[int]:
    """The history of every position of a sequence, run alone.

    Where completion blocks may not be shared, a decoded token's K and V differ from a prompt's.
    """
    history, result = int.from_bytes(sequence.salt, "little"), []
    for position, token_id in enumerate(sequence.token_ids):
        is_completion = not share_completion_blocks and position >= sequence.num_prompt_tokens
        history = extend_history(history, token_id, is_completion)
        result.append(history)
    return result


def draw(history: int, params: SamplingParams) -> int:
    """The next token after a history: any function will do that depends on all of it."""
    return hash((history, params.seed)) % VOCAB_SIZE


def undisturbed_completion(
    sequence: Sequence, share_completion_blocks: bool
) -> tuple[list[int], str]:
    """Completion and finish reason of a sequence run alone, without cache, chunks or faults."""
    alone = Sequence(
        seq_id=0,
        request_id="",
        prompt_ids=sequence.token_ids[: sequence.num_prompt_tokens],
        params=sequence.params,
        n_ctx=sequence.max_num_tokens,
        salt=sequence.salt,
    )
    while alone.num_tokens < sequence.max_num_tokens:
        token_id = draw(histories(alone, share_completion_blocks)[-1], alone.params)
        alone.token_ids.append(token_id)
        if (token_id == EOS and not alone.params.ignore_eos) or (
            token_id in alone.params.stop_token_ids
        ):
            return alone.completion_ids, "stop"
    return alone.completion_ids, "length"


class SimulatedMachine:
    """Executes batches; keeps rows between steps, as a persistent batch on a device does."""

    def __init__(self, block_manager: BlockManager, share_completion_blocks: bool) -> None:
        self._blocks = block_manager
        self._share_completion_blocks = share_completion_blocks
        self._slots: dict[tuple[int, int], int] = {}
        self._rows: dict[int, int] = {}  # seq_id -> tokens computed so far
        self._current: ScheduledBatch | None = None

    def prepare(self, batch: ScheduledBatch) -> None:
        """What comes before the model: may be repeated, if the step fails."""
        for seq_id in batch.released_seq_ids:
            self._rows.pop(seq_id, None)
        for block in batch.blocks_to_clear:
            for offset in range(self._blocks.block_size):
                self._slots[block, offset] = ZERO

    def execute(
        self, batch: ScheduledBatch, faulty_rows: Collection[int] = ()
    ) -> tuple[list[int], list[int]]:
        """Run a step, or its next round: returns draws and the rows whose logits are not finite."""
        if batch is not self._current:
            self._current = batch
            self.prepare(batch)
            admitted = batch.sequences[len(batch.sequences) - batch.num_admitted :]
            for sequence in admitted:
                assert sequence.seq_id not in self._rows, "an admitted sequence has no row yet"
                self._rows[sequence.seq_id] = sequence.num_computed_tokens
        assert self._rows == {s.seq_id: s.num_computed_tokens for s in batch.sequences}, (
            "the rows that remain are the rows of the batch, each where its last step left it"
        )

        written: set[tuple[int, int]] = set()
        for row, sequence in enumerate(batch.sequences):
            start = sequence.num_computed_tokens
            end = start + batch.num_scheduled_tokens[row]
            content = self._content(sequence, end)
            # A fault spreads to all that is computed from it.
            is_faulty = row in faulty_rows or NAN in self._read(sequence, 0, start)
            for position in range(start, end):
                slot = self._slot(sequence, position)
                assert slot not in written, "two rows write to one slot"
                written.add(slot)
                self._slots[slot] = NAN if is_faulty else content[position]

        failed_rows, last_content = [], []
        for row, sequence in enumerate(batch.sequences):
            end = sequence.num_computed_tokens + batch.num_scheduled_tokens[row]
            read = self._read(sequence, 0, end)
            if NAN in read:
                failed_rows.append(row)
            else:
                assert read == self._content(sequence, end), (
                    "every position a row reads holds what an undisturbed run would hold"
                )
                rest = -end % self._blocks.block_size
                assert NAN not in self._read(sequence, end, end + rest), "0 * NaN is NaN"
            self._rows[sequence.seq_id] = end
            last_content.append(read[-1])
        draws = [draw(last_content[row], batch.sequences[row].params) for row in batch.sampled_rows]
        return draws, failed_rows

    def _content(self, sequence: Sequence, end: int) -> list[int]:
        """What an undisturbed run would hold; an ended sequence's row runs on to the last round."""
        content = histories(sequence, self._share_completion_blocks)[:end]
        assert sequence.is_finished or len(content) == end
        return content + [JUNK] * (end - len(content))

    def _slot(self, sequence: Sequence, position: int) -> tuple[int, int]:
        block_index, offset = divmod(position, self._blocks.block_size)
        block = self._blocks.block_table(sequence.seq_id)[block_index]
        assert block != 0, "the null block belongs to nobody"
        return block, offset

    def _read(self, sequence: Sequence, start: int, end: int) -> list[int]:
        slots = (self._slot(sequence, position) for position in range(start, end))
        return [self._slots.get(slot, ZERO) for slot in slots]


class SimulatedEngine:
    """The policy on a simulated machine, with the checks that hold around every step."""

    def __init__(
        self, config: EngineConfig, *, n_ctx: int, eos_ids: Collection[int] = (EOS,)
    ) -> None:
        assert config.num_blocks is not None
        self.config = config
        self.n_ctx = n_ctx
        self.blocks = BlockManager(
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            enable_prefix_cache=config.enable_prefix_cache,
            share_completion_blocks=config.share_completion_blocks,
            weights_id=b"weights",
        )
        self.scheduler = Scheduler(config, self.blocks, n_ctx=n_ctx, eos_ids=eos_ids)
        self.machine = SimulatedMachine(self.blocks, config.share_completion_blocks)
        self.sequences: list[Sequence] = []  # all ever added, in order
        self.delivered: dict[int, list[int]] = {}
        self.ends: dict[int, str] = {}  # as told by outcomes

    def add(
        self,
        prompt_ids: Iterable[int],
        *,
        request_id: str | None = None,
        choice: int = 0,
        completion_ids: Iterable[int] = (),
        salt: bytes = b"",
        priority: int = 0,
        params: SamplingParams | None = None,
        max_num_rounds: int = 1,
    ) -> Sequence:
        """Make a sequence and let it wait; without a `request_id` it is its own request."""
        seq_id = len(self.sequences)
        sequence = Sequence(
            seq_id=seq_id,
            request_id=f"request-{seq_id}" if request_id is None else request_id,
            prompt_ids=prompt_ids,
            params=params or SamplingParams(max_tokens=4, ignore_eos=True),
            n_ctx=self.n_ctx,
            choice=choice,
            completion_ids=completion_ids,
            salt=salt,
            priority=priority,
            max_num_rounds=max_num_rounds,
        )
        self.sequences.append(sequence)
        self.delivered[seq_id] = sequence.completion_ids
        self.scheduler.add(sequence)
        return sequence

    def schedule(self) -> ScheduledBatch:
        """Schedule a step, and check what must hold of its batch."""
        running_before = self.running()
        num_preemptions_before = self.scheduler.num_preemptions
        batch = self.scheduler.schedule()
        num_preempted = self.scheduler.num_preemptions - num_preemptions_before
        block_size = self.config.block_size

        assert len(batch.sequences) == len(batch.num_scheduled_tokens)
        assert len(batch.sequences) <= self.config.max_num_sequences
        assert batch.num_tokens <= self.config.step_tokens * batch.num_rounds
        self._check_rounds(batch)
        assert min(batch.num_scheduled_tokens, default=1) >= 1
        assert {s.seq_id for s in batch.sequences} == {s.seq_id for s in self.running()}
        assert num_preempted < max(1, len(running_before)), "the oldest always advances"
        assert not (num_preempted and batch.num_admitted)
        assert num_preempted + len(batch.sequences) - batch.num_admitted == len(running_before)
        num_kept = len(batch.sequences) - batch.num_admitted
        kept, admitted = batch.sequences[:num_kept], batch.sequences[num_kept:]
        assert kept == running_before[:num_kept], "who is preempted is the last in order"
        if admitted and self.waiting():
            assert max(s.order for s in admitted) < min(s.order for s in self.waiting())
        assert batch.sequences or not self.waiting(), "with nothing running the head always fits"

        is_cut = False
        for row, sequence in enumerate(batch.sequences):
            end = sequence.num_computed_tokens + batch.num_scheduled_tokens[row]
            assert end <= sequence.num_tokens
            is_cut |= end < sequence.num_tokens
            is_sampled = end == sequence.num_tokens < sequence.max_num_tokens
            assert (row in batch.sampled_rows) == is_sampled
            num_held = len(self.blocks.block_table(sequence.seq_id))
            # A step that failed may have had more rounds than this one, and room for them.
            least, most = (
                -(-(sequence.num_tokens + num_rounds - 1) // block_size)
                for num_rounds in (batch.num_rounds, sequence.max_num_rounds)
            )
            assert least <= num_held <= most, "it exactly fits"
        num_running = len(batch.sequences) - batch.num_admitted
        num_of_prompts = sum(batch.num_scheduled_tokens) - num_running
        decodes = any(
            sequence.num_tokens == sequence.num_computed_tokens + 1
            for sequence in batch.sequences[:num_running]
        )
        if decodes and is_cut:
            assert num_of_prompts <= self.config.prompt_tokens
        if is_cut:
            is_used = batch.num_tokens == self.config.step_tokens
            is_used |= decodes and num_of_prompts == self.config.prompt_tokens
            assert is_used, "the budget is used"
        return batch

    def _check_rounds(self, batch: ScheduledBatch) -> None:
        """Nothing that should stop a step comes before its last round."""
        assert batch.num_rounds >= 1
        if batch.num_rounds > 1:
            assert batch.is_decode
            assert not self.waiting()
            assert not self.config.share_completion_blocks
            for sequence in batch.sequences:
                assert batch.num_rounds <= sequence.max_num_rounds
                assert sequence.num_tokens + batch.num_rounds <= sequence.max_num_tokens

    def finish(self, batch: ScheduledBatch, faulty_rows: Collection[int] = ()) -> list[Outcome]:
        """Run a scheduled step to its end, with a fault in its first round."""
        outcomes: list[Outcome] = []
        for number in range(batch.num_rounds):
            draws, failed_rows = self.machine.execute(batch, () if number else faulty_rows)
            is_over = number == batch.num_rounds - 1
            outcomes += self.update(batch, draws, failed_rows, is_over=is_over)
        return outcomes

    def update(
        self,
        batch: ScheduledBatch,
        draws: list[int],
        failed_rows: Collection[int] = (),
        *,
        is_over: bool = True,
    ) -> list[Outcome]:
        """Take in a round, deliver its outcomes, and compare each end with a run alone."""
        outcomes = self.scheduler.update(batch, draws, failed_rows)
        for row, sequence, token_id in outcomes:
            assert batch.sequences[row] is sequence
            assert sequence.seq_id not in self.ends, "an ended sequence yields nothing more"
            if token_id is not None:
                self.delivered[sequence.seq_id].append(token_id)
            if sequence.finish_reason is not None:
                self.ends[sequence.seq_id] = sequence.finish_reason
            if sequence.finish_reason in ("stop", "length"):
                completion_ids, reason = undisturbed_completion(
                    sequence, self.config.share_completion_blocks
                )
                assert (sequence.completion_ids, sequence.finish_reason) == (completion_ids, reason)
        if is_over:
            self.check()
        return outcomes

    def give_up_youngest(self, batch: ScheduledBatch) -> Sequence | None:
        """Take back a step for which the memory was too small, and end its youngest sequence."""
        self.scheduler.fail(batch)
        live = [sequence for sequence in batch.sequences if not sequence.is_finished]
        victim = self.scheduler.give_up_youngest(batch)
        if victim is not None:
            assert victim.order == max(sequence.order for sequence in live)
            self.ends[victim.seq_id] = "error"
        assert (victim is None) == (not live)
        self.check()
        return victim

    def step(self) -> list[Outcome]:
        """One whole step without faults."""
        batch = self.schedule()
        return self.finish(batch) if batch.sequences else []

    def run(self) -> None:
        """Step until idle, or for longer than any schedule that makes progress can need."""
        unfinished = [s for s in self.sequences if not s.is_finished]
        max_num_steps = (1 + len(unfinished)) * (1 + sum(s.max_num_tokens for s in unfinished))
        for _ in range(max_num_steps):
            if self.scheduler.is_idle:
                return
            self.step()
        assert self.scheduler.is_idle, "somebody starves"

    def waiting(self) -> list[Sequence]:
        return sorted((s for s in self.sequences if s.state == "waiting"), key=lambda s: s.order)

    def running(self) -> list[Sequence]:
        return sorted((s for s in self.sequences if s.state == "running"), key=lambda s: s.order)

    def check(self) -> None:
        """The invariants between steps."""
        running, waiting = self.running(), self.waiting()
        block_size = self.config.block_size
        assert self.scheduler.num_running == len(running)
        assert self.scheduler.num_waiting == len(waiting)
        assert self.scheduler.num_requests == len({s.request_id for s in running + waiting})
        assert self.scheduler.is_idle == (not running and not waiting)

        holders: dict[int, list[tuple[Sequence, int]]] = {}
        for sequence in running:
            table = self.blocks.block_table(sequence.seq_id)
            assert len(set(table)) == len(table)
            missing = -(-sequence.num_tokens // block_size) - len(table)
            num_spare = -(-(sequence.max_num_rounds - 1) // block_size)  # of rounds taken back
            assert -num_spare <= missing <= 1, "one short at most: the token just drawn"
            assert len(table) * block_size >= sequence.num_computed_tokens
            for index, block in enumerate(table):
                holders.setdefault(block, []).append((sequence, index))
        assert 0 not in holders
        for shared_by in holders.values():
            if len(shared_by) > 1:
                for sequence, index in shared_by:
                    assert (index + 1) * block_size <= sequence.num_computed_tokens, (
                        "a shared block is full, so nobody writes to it"
                    )
        # Equivalent to "each reference count is zero exactly when no table has the block".
        assert self.blocks.num_used_blocks == len(holders)
        assert self.blocks.num_free_blocks >= 0
        assert self.blocks.num_cached_blocks >= 0

        assert sum(s.num_tokens - s.num_computed_tokens > 1 for s in running) <= 1
        for sequence in self.sequences:
            assert sequence.num_cached_tokens <= sequence.num_prompt_tokens
            assert self.delivered[sequence.seq_id] == sequence.completion_ids
            assert sequence.is_finished == (sequence.finish_reason is not None)
            if sequence.state == "waiting":
                assert sequence.num_computed_tokens == 0
            if sequence.is_finished and sequence.finish_reason != "abort":
                assert self.ends[sequence.seq_id] == sequence.finish_reason
        assert self.scheduler.num_prefix_hit_tokens <= self.scheduler.num_prefix_query_tokens

    def check_at_rest(self) -> None:
        """Nothing is held; every block but the null block can be had, once."""
        assert self.scheduler.is_idle
        assert self.blocks.num_used_blocks == 0
        num_blocks = self.blocks.num_blocks - 1
        assert self.blocks.num_free_blocks + self.blocks.num_cached_blocks == num_blocks
        assert self.blocks.allocate(-1, num_blocks * self.config.block_size)
        assert sorted(self.blocks.block_table(-1)) == list(range(1, num_blocks + 1))
        self.blocks.free(-1)
