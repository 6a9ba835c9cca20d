"""The memory ledger: what weights, a step and the KV cache take, and so how many blocks fit."""

from dataclasses import dataclass

from engine.config import SCORED_ROWS, EngineConfig
from engine.errors import DoesNotFit
from model.config import GPTConfig

# Of what is free beside weights and working memory, the cache may take so much.
_CACHE_SHARE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where the memory goes, in bytes."""

    available_bytes: int  # before the cache, after the weights
    weights_bytes: int
    working_bytes: int  # the most that one step needs besides
    bytes_per_block: int
    num_blocks: int  # block 0, the padding, included
    block_size: int  # tokens
    n_ctx: int

    @property
    def kv_cache_bytes(self) -> int:
        """Keys and values when every block is in use."""
        return self.num_blocks * self.bytes_per_block

    @property
    def num_full_sequences(self) -> int:
        """Sequences as long as the context that fit at a time."""
        return (self.num_blocks - 1) // -(-self.n_ctx // self.block_size)


def working_bytes(config: GPTConfig, engine: EngineConfig) -> int:
    """The most that one step's intermediate values take.

    All in float32, as a CPU has it. Rows of the residual stream, of q, k, v and of the MLP, each
    layer's in place of the last's; scores of every row and head; logits of every sequence, and as
    much twice again while they are filtered, or those of scored prompt positions.
    """
    rows = engine.step_tokens
    hidden = 4 * rows * (6 * config.n_embd + 2 * config.mlp_width)
    scores = 4 * rows * config.n_head * config.n_ctx
    logits = 4 * config.vocab_size * max(3 * engine.max_num_sequences, SCORED_ROWS)
    return hidden + scores + logits


def plan_memory(
    config: GPTConfig,
    engine: EngineConfig,
    *,
    kv_bytes_per_token: int,
    weights_bytes: int,
    available_bytes: int,
    kv_cache_bytes: int | None,
) -> MemoryPlan:
    """Decide how many blocks the KV cache has, whose values may be smaller than the model's.

    As many as `engine.num_blocks` or `kv_cache_bytes` say; without either, enough for
    `max_num_sequences` full contexts, if the share of the free memory that is the cache's allows.
    Raises DoesNotFit where not even one context fits, or what was asked for exceeds what is free.
    """
    bytes_per_block = engine.block_size * kv_bytes_per_token
    blocks_per_sequence = -(-config.n_ctx // engine.block_size)
    working = working_bytes(config, engine)
    free = available_bytes - working
    if engine.num_blocks is not None:
        num_blocks = engine.num_blocks
    elif kv_cache_bytes is not None:
        num_blocks = kv_cache_bytes // bytes_per_block
    else:
        wanted = 1 + engine.max_num_sequences * blocks_per_sequence
        num_blocks = min(wanted, int(_CACHE_SHARE * free) // bytes_per_block)
    smallest = 1 + blocks_per_sequence
    if num_blocks < smallest:
        raise DoesNotFit(
            f"The KV cache would have {max(0, num_blocks)} blocks of {engine.block_size} tokens, "
            f"and one context of {config.n_ctx} tokens needs {smallest}, "
            f"{smallest * bytes_per_block / 1e6:.0f} MB: "
            + (
                f"only {available_bytes / 1e6:.0f} MB are free, {working / 1e6:.0f} MB of them "
                "needed by a step. Lower max_num_scheduled_tokens or max_num_sequences, free "
                "memory, or take a smaller dtype."
                if engine.num_blocks is None and kv_cache_bytes is None
                else f"raise num_blocks to {smallest} or kv_cache_bytes to "
                f"{smallest * bytes_per_block}."
            )
        )
    if num_blocks * bytes_per_block > free:
        most = max(0, free // bytes_per_block)
        raise DoesNotFit(
            f"A KV cache of {num_blocks} blocks takes {num_blocks * bytes_per_block / 1e6:.0f} MB, "
            f"and only {max(0, free) / 1e6:.0f} MB are free beside a step's own "
            f"{working / 1e6:.0f} MB: lower num_blocks to at most {most}, or kv_cache_bytes to "
            f"{most * bytes_per_block}."
        )
    return MemoryPlan(
        available_bytes=available_bytes,
        weights_bytes=weights_bytes,
        working_bytes=working,
        bytes_per_block=bytes_per_block,
        num_blocks=num_blocks,
        block_size=engine.block_size,
        n_ctx=config.n_ctx,
    )
