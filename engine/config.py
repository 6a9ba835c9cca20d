"""The engine's limits and switches: plain values, checked once; knows no model and no memory."""

from dataclasses import dataclass

# What the C libraries of threads read before torch is imported. A thread looks for its next piece
# of work for some tens of microseconds, about what lies between two products, and then sleeps.
# Sleeping at once made a step 1.4 times longer; looking for ever keeps the server and others from
# the cores, and made decoding 70 times slower on a busy machine.
THREADS_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How much the engine does at once, and what it may share.

    Raises ValueError, naming field, value and remedy.
    """

    block_size: int = 16  # tokens per KV-cache block
    num_blocks: int | None = None  # block 0, the padding, included; None: as memory allows
    max_num_sequences: int = 256  # running at once; the others wait
    max_num_scheduled_tokens: int = 256  # token budget of a step: bounds how long a step takes
    enable_prefix_cache: bool = True  # share the K and V of equal prefixes
    # False: only blocks that lie wholly in the prompt are shared. Right where K and V of a
    # decoded token differ in their last bits from those of the same token in a prompt (CUDA).
    share_completion_blocks: bool = False

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_sequences"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.num_blocks is not None and self.num_blocks < 2:
            raise ValueError(
                f"num_blocks must be at least 2 (block 0 is padding), or absent to follow "
                f"from memory, got {self.num_blocks}"
            )
        if self.max_num_scheduled_tokens < self.max_num_sequences:
            raise ValueError(
                f"max_num_scheduled_tokens must be at least max_num_sequences "
                f"({self.max_num_sequences}), or a step could not give every running sequence "
                f"its token; got {self.max_num_scheduled_tokens}: raise it, "
                f"or lower max_num_sequences"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """What a worker loads and runs; everything it needs to start again as it was."""

    model: str  # checkpoint directory
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # auto, float32, bfloat16, int8
    kv_cache_dtype: str = "auto"  # auto (as it computes), float32, bfloat16, int8
    kv_cache_bytes: int | None = None  # None: as memory allows
    num_threads: int | None = None  # of the CPU's products; None: as torch chooses
    # Ids that may be sampled, for whoever has read the tokenizer; None: it is read again.
    vocab_size: int | None = None
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        for name in ("dtype", "kv_cache_dtype"):
            dtype = getattr(self, name)
            if dtype not in ("auto", "float32", "bfloat16", "int8"):
                raise ValueError(
                    f"{name} must be one of auto, float32, bfloat16, int8, got {dtype!r}"
                )
        for name in ("kv_cache_bytes", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or absent, got {value}")
