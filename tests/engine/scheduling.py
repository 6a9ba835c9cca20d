"""Small engines over the simulated machine, for those who test the scheduler's promises one by one.

`test_policy_state_machine.py` has them all at once.
"""

from engine.config import EngineConfig
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledBatch
from tests.engine.simulation import SimulatedEngine

BLOCK_SIZE = 4


def make_engine(
    *,
    num_blocks: int = 33,
    max_num_sequences: int = 4,
    max_num_scheduled_tokens: int = 32,
    share_completion_blocks: bool = True,
    n_ctx: int = 64,
) -> SimulatedEngine:
    """An engine whose cache holds two full contexts, and a null block."""
    return SimulatedEngine(
        EngineConfig(
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            max_num_sequences=max_num_sequences,
            max_num_scheduled_tokens=max_num_scheduled_tokens,
            share_completion_blocks=share_completion_blocks,
        ),
        n_ctx=n_ctx,
    )


def endless(
    max_tokens: int = 60, *, seed: int = 0, prompt_logprobs: int | None = None
) -> SamplingParams:
    """Parameters of a sequence that ends by length only."""
    return SamplingParams(
        max_tokens=max_tokens, ignore_eos=True, seed=seed, prompt_logprobs=prompt_logprobs
    )


def scheduled(batch: ScheduledBatch) -> dict[int, int]:
    """Tokens of a batch by seq_id."""
    seq_ids = [sequence.seq_id for sequence in batch.sequences]
    return dict(zip(seq_ids, batch.num_scheduled_tokens, strict=True))


def fill_until_preemption(engine: SimulatedEngine) -> None:
    """Step until the cache is full and somebody has to go."""
    while not engine.scheduler.num_preemptions:
        engine.step()
