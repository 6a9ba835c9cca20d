"""The frames that cross the process door, and their framing; knows no sockets and no torch.

Both sides run the same code of the same version, so frames are positional and carry no names.
"""

import msgspec

from engine.config import LaunchConfig
from engine.sampling_params import SamplingParams

LENGTH_BYTES = 4  # a frame is its length, little-endian, and then msgpack


class Start(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """First frame to the worker: what to load and how to run it."""

    config: LaunchConfig


class Choice(msgspec.Struct, frozen=True, array_like=True):
    """One of a request's generations, with what an earlier engine delivered of it."""

    seq_id: int  # unique, growing in the order of arrival
    index: int
    completion_ids: list[int] = []


class Submit(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A request to the worker. Its choices share their prompt through the prefix cache."""

    request_id: str
    prompt_ids: list[int]
    choices: list[Choice]
    params: SamplingParams
    salt: bytes = b""
    priority: int = 0


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Give up a request, or one choice of it; crossing with its end does no harm."""

    request_id: str
    choice: int | None = None


class TopLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """A token's logprob, and the most probable alternatives in descending order."""

    logprob: float
    token_ids: list[int]
    logprobs: list[float]


class TokenOutput(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """What a step brought one choice: a token, an end, or both."""

    seq_id: int
    token_id: int | None = None
    finish_reason: str | None = None  # stop, length, abort, error
    logprobs: TopLogprobs | None = None
    prompt_logprobs: list[TopLogprobs] | None = None  # of the prompt tokens after the first
    error: str | None = None  # a sentence for people
    error_code: str | None = None  # and a word for programs: non_finite_logits, out_of_memory
    # With the first token, and again with the end.
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    scheduled_at: float = 0.0  # time.monotonic() when it first took part in a step


class StepStats(msgspec.Struct, frozen=True, array_like=True):
    """The engine's counts after a step; totals count from the worker's start."""

    num_waiting: int
    num_running: int
    num_free_blocks: int
    num_cached_blocks: int
    num_used_blocks: int
    num_scheduled_tokens: int  # in this step
    num_preemptions: int  # total, as are the following
    num_prefix_query_tokens: int
    num_prefix_hit_tokens: int


class StepOutput(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One frame for all that a step brought."""

    outputs: list[TokenOutput]
    stats: StepStats


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The worker has loaded the model and takes requests."""

    pid: int
    device: str
    dtype: str  # of the weights: float32, bfloat16 or int8
    products: str  # the instructions that multiply, or GPU
    compiled_for: str  # what kernels were compiled for and by: with others, last bits may differ
    numerics: str  # why these two, for people
    kv_cache_dtype: str
    n_ctx: int
    vocab_size: int  # ids that may be sampled, and sent
    num_blocks: int
    block_size: int
    weights_bytes: int  # as they are held, the output head's own copy included
    working_bytes: int  # the most one step needs besides
    kv_cache_bytes: int
    available_bytes: int  # was free before the cache
    weights_id: str  # sha256 of what was loaded, in hex
    is_batch_invariant: bool
    same_bytes: bool = True  # were asked for
    threads: str = ""  # how many on a CPU, and why, for people


class StartFailed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The worker cannot start, and why; it exits."""

    reason: str


ToWorker = Start | Submit | Abort
FromWorker = Ready | StartFailed | StepOutput

_encoder = msgspec.msgpack.Encoder()
_to_worker_decoder = msgspec.msgpack.Decoder(ToWorker)
_from_worker_decoder = msgspec.msgpack.Decoder(FromWorker)


def pack(frame: ToWorker | FromWorker) -> bytes:
    """Encode a frame, length first."""
    body = _encoder.encode(frame)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def unpack_to_worker(body: bytes) -> ToWorker:
    """Decode a frame to the worker, without its length."""
    frame: ToWorker = _to_worker_decoder.decode(body)
    return frame


def unpack_from_worker(body: bytes) -> FromWorker:
    """Decode a frame from the worker, without its length."""
    frame: FromWorker = _from_worker_decoder.decode(body)
    return frame
