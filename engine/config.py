"""The engine's limits and switches: plain values, checked once; knows no model and no memory."""

from dataclasses import dataclass, replace

# What the C libraries of threads read before torch is imported. A thread looks for its next piece
# of work for some tens of microseconds, about what lies between two products, and then sleeps.
# Sleeping at once made a step 1.4 times longer; looking for ever keeps the server and others from
# the cores, and made decoding 70 times slower on a busy machine.
THREADS_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}

# Tokens of a step where nobody says how many: what a CPU computes while the others' tokens wait,
# and what an H200 computes in a millisecond.
_STEP_TOKENS = {"cpu": 256, "cuda": 2048}

# Of these, prompts get so much of a step in which others decode, whose tokens then wait less; a
# little more each costs next to nothing, and much less would leave the weights read for few rows.
_PROMPT_SHARE = 5 / 8

_MAX_NUM_THREADS = 1024  # far more than any machine has use for, and no system runs out of them

# Prompt positions whose logits are held at a time. With fewer, the head's weights are read more
# often than they need be: 32 made scoring a twentieth slower.
SCORED_ROWS = 256

# What keys and values may be stored in; which of them where, `engine.loading` knows.
KV_CACHE_DTYPES = ("auto", "float32", "bfloat16", "int8", "float8")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How much the engine does at once, and what it may share.

    Raises ValueError, naming field, value and remedy.
    """

    block_size: int = 16  # tokens per KV-cache block
    num_blocks: int | None = None  # block 0, the padding, included; None: as memory allows
    max_num_sequences: int = 256  # running at once; the others wait
    # Token budget of a step, which bounds how long it takes; None: see `step_tokens`.
    max_num_scheduled_tokens: int | None = None
    # Tokens of a sequence that a device which feeds itself (CUDA) draws before the engine looks at
    # the first; 1: it looks at each. Who arrives waits for up to twice as many.
    max_num_rounds: int = 4
    enable_prefix_cache: bool = True  # share the K and V of equal prefixes
    # False: only blocks that lie wholly in the prompt are shared. Right where K and V of a
    # decoded token differ in their last bits from those of the same token in a prompt (CUDA).
    share_completion_blocks: bool = False

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_sequences", "max_num_rounds"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.num_blocks is not None and self.num_blocks < 2:
            raise ValueError(
                f"num_blocks must be at least 2 (block 0 is padding), or absent to follow "
                f"from memory, got {self.num_blocks}"
            )
        budget = self.max_num_scheduled_tokens
        if budget is not None and budget < self.max_num_sequences:
            raise ValueError(
                f"max_num_scheduled_tokens must be at least max_num_sequences "
                f"({self.max_num_sequences}), or a step could not give every running sequence "
                f"its token; got {budget}: raise it, "
                f"or lower max_num_sequences"
            )

    @property
    def step_tokens(self) -> int:
        """The most tokens of a step: as many as were asked for, or as a CPU should have."""
        return self.max_num_scheduled_tokens or max(_STEP_TOKENS["cpu"], self.max_num_sequences)

    @property
    def prompt_tokens(self) -> int:
        """The most tokens of prompts in a step in which other sequences decode."""
        return max(1, int(_PROMPT_SHARE * self.step_tokens))

    def for_device(self, device_type: str) -> "EngineConfig":
        """Decide what was left to the device."""
        if self.max_num_scheduled_tokens is not None:
            return self
        most = max(_STEP_TOKENS[device_type], self.max_num_sequences)
        return replace(self, max_num_scheduled_tokens=most)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """What a worker loads and runs; everything it needs to start again as it was."""

    model: str  # checkpoint directory
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # auto, float32, bfloat16, int8
    kv_cache_dtype: str = "auto"  # one of KV_CACHE_DTYPES; auto: what the model computes in
    # A request gives the same bytes whatever runs beside it. False lets CUDA choose its products
    # by their shape; a CPU has no use for it.
    same_bytes: bool = True
    kv_cache_bytes: int | None = None  # None: as memory allows
    num_threads: int | None = None  # of a CPU engine; None: see `engine.cpu_threads`
    # Ids that may be sampled, for whoever has read the tokenizer; None: it is read again.
    vocab_size: int | None = None
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "bfloat16", "int8"):
            raise ValueError(
                f"dtype must be one of auto, float32, bfloat16, int8, got {self.dtype!r}"
            )
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ValueError(
                f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}, "
                f"got {self.kv_cache_dtype!r}"
            )
        for name in ("kv_cache_bytes", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or absent, got {value}")
        if self.num_threads is not None and self.num_threads > _MAX_NUM_THREADS:
            raise ValueError(
                f"num_threads must be at most {_MAX_NUM_THREADS}, got {self.num_threads}: more "
                "than cores only wait for each other"
            )
        if self.kv_cache_bytes is not None and self.engine.num_blocks is not None:
            raise ValueError(
                f"kv_cache_bytes and num_blocks both say how large the KV cache is, got "
                f"{self.kv_cache_bytes} and {self.engine.num_blocks}: leave one of them out"
            )
