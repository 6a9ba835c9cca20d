"""Any sequence of calls: scheduler and block manager against a machine that forgets nothing.

`simulation.py` holds the invariants. For a night's run raise the numbers in the last line.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.config import EngineConfig
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from tests.engine.simulation import SimulatedEngine

# Few and repetitive, so that prefixes are shared and completions meet prompts.
PATTERNS = ([1], [1, 2], [1, 1, 1, 2], [0, 1, 2, 3])

RARELY = st.sampled_from([False, False, False, False, True])


class PolicyStateMachine(RuleBasedStateMachine):
    """Requests come, run, fail, go and come back; the engine dies now and then."""

    @initialize(
        block_size=st.integers(1, 4),
        n_ctx=st.integers(4, 24),
        num_spare_blocks=st.sampled_from([0, 0, 1, 2, 4, 8, 16]),
        max_num_sequences=st.integers(1, 6),
        num_spare_tokens=st.integers(0, 8),
        enable_prefix_cache=st.sampled_from([True, True, True, False]),
        share_completion_blocks=st.booleans(),
    )
    def start(
        self,
        block_size: int,
        n_ctx: int,
        num_spare_blocks: int,
        max_num_sequences: int,
        num_spare_tokens: int,
        enable_prefix_cache: bool,
        share_completion_blocks: bool,
    ) -> None:
        self.config = EngineConfig(
            block_size=block_size,
            num_blocks=-(-n_ctx // block_size) + 1 + num_spare_blocks,
            max_num_sequences=max_num_sequences,
            max_num_scheduled_tokens=max_num_sequences + num_spare_tokens,
            enable_prefix_cache=enable_prefix_cache,
            share_completion_blocks=share_completion_blocks,
        )
        self.engine = SimulatedEngine(self.config, n_ctx=n_ctx)
        self.num_requests = 0

    def live(self) -> list[Sequence]:
        return self.engine.waiting() + self.engine.running()

    @rule(
        pattern=st.sampled_from(PATTERNS),
        num_prompt_tokens=st.sampled_from([1, 2, 3, 4, 5, 6, 8, 12, 16, 24]),
        num_choices=st.sampled_from([1, 2, 3]),
        max_tokens=st.sampled_from([24, 24, 24, 10, 3, 1, 0]),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        salt=st.sampled_from([b"", b"", b"", b"salt"]),
        ignore_eos=st.sampled_from([True, True, False]),
        stop_token_ids=st.sampled_from([(), (), (), (3,)]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        max_num_rounds=st.sampled_from([1, 2, 4, 8, 8, 8]),
    )
    def add(
        self,
        pattern: list[int],
        num_prompt_tokens: int,
        num_choices: int,
        max_tokens: int,
        priority: int,
        salt: bytes,
        ignore_eos: bool,
        stop_token_ids: tuple[int, ...],
        prompt_logprobs: int | None,
        max_num_rounds: int,
    ) -> None:
        num_prompt_tokens = min(num_prompt_tokens, self.engine.n_ctx)
        prompt_ids = (pattern * num_prompt_tokens)[:num_prompt_tokens]
        self.num_requests += 1
        for choice in range(num_choices):
            self.engine.add(
                prompt_ids,
                request_id=f"r{self.num_requests}",
                choice=choice,
                salt=salt,
                priority=priority,
                max_num_rounds=max_num_rounds,
                params=SamplingParams(
                    max_tokens=max_tokens,
                    ignore_eos=ignore_eos,
                    stop_token_ids=stop_token_ids,
                    prompt_logprobs=prompt_logprobs,
                    seed=choice % 2,  # equal for 0 and 2: their blocks fill up with equal tokens
                ),
            )

    @rule(num_steps=st.integers(1, 12))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.engine.step()

    @precondition(lambda self: self.live())
    @rule(data=st.data(), has_fault=st.booleans(), num_aborts=st.integers(0, 2))
    def step_with_faults(self, data: st.DataObject, has_fault: bool, num_aborts: int) -> None:
        """Rows give NaN, and requests are aborted while the step is in flight."""
        batch = self.engine.schedule()
        rows = st.integers(0, len(batch.sequences) - 1)
        faulty_rows = {data.draw(rows)} if has_fault else set()
        faulty_round = data.draw(st.integers(0, batch.num_rounds - 1))
        for number in range(batch.num_rounds):
            draws, failed_rows = self.engine.machine.execute(
                batch, faulty_rows if number == faulty_round else ()
            )
            if number == 0:
                for _ in range(num_aborts):
                    self.abort(data)
            is_over = number == batch.num_rounds - 1
            self.engine.update(batch, draws, failed_rows, is_over=is_over)

    @precondition(lambda self: self.live())
    @rule(
        data=st.data(), has_begun=st.booleans(), num_aborts=st.integers(0, 2), is_too_large=RARELY
    )
    def step_that_raises(
        self, data: st.DataObject, has_begun: bool, num_aborts: int, is_too_large: bool
    ) -> None:
        """The step raises, before the machine touched the batch or after it prepared it."""
        batch = self.engine.schedule()
        if has_begun:
            self.engine.machine.prepare(batch)
        for _ in range(num_aborts):
            self.abort(data)
        if is_too_large:
            self.engine.give_up_youngest(batch)
        else:
            self.engine.scheduler.fail(batch)
        self.engine.check()

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        live = self.live()
        if not live:
            return
        sequence = data.draw(st.sampled_from(live))
        siblings = [s for s in live if s.request_id == sequence.request_id]
        if data.draw(st.booleans()):
            assert self.engine.scheduler.abort(sequence.request_id) == len(siblings)
            assert all(s.finish_reason == "abort" for s in siblings)
        else:
            assert self.engine.scheduler.abort(sequence.request_id, sequence.choice) == 1
        assert self.engine.scheduler.abort(sequence.request_id, sequence.choice) == 0

    @precondition(lambda self: self.live())
    @rule(happens=RARELY)
    def die_and_come_back(self, happens: bool) -> None:
        """A new engine gets every live request again, in order, with what was delivered."""
        if not happens:
            return
        old, live = self.engine, sorted(self.live(), key=lambda s: s.seq_id)
        self.engine = SimulatedEngine(self.config, n_ctx=old.n_ctx)
        for sequence in live:
            self.engine.add(
                sequence.token_ids[: sequence.num_prompt_tokens],
                request_id=sequence.request_id,
                choice=sequence.choice,
                completion_ids=old.delivered[sequence.seq_id],
                salt=sequence.salt,
                priority=sequence.priority,
                max_num_rounds=sequence.max_num_rounds,
                params=sequence.params,
            )

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def resubmit_one(self, data: st.DataObject) -> None:
        """One comes back with its completion into a cache that still knows it."""
        sequence = data.draw(st.sampled_from(self.live()))
        self.engine.scheduler.abort(sequence.request_id, sequence.choice)
        self.num_requests += 1
        self.engine.add(
            sequence.token_ids[: sequence.num_prompt_tokens],
            request_id=f"r{self.num_requests}",
            completion_ids=sequence.completion_ids,
            salt=sequence.salt,
            priority=sequence.priority,
            max_num_rounds=sequence.max_num_rounds,
            params=sequence.params,
        )

    @rule(happens=RARELY)
    def run_to_rest(self, happens: bool) -> None:
        if happens:
            self.engine.run()
            self.engine.check_at_rest()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.run()
            self.engine.check_at_rest()


TestPolicy = PolicyStateMachine.TestCase
TestPolicy.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
