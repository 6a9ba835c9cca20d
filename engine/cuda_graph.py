"""The decode step over buffers that stay: on CUDA one graph a batch size, on a CPU plain calls.

What a running sequence needs for its next token lies on the device, a slot each, and a step leaves
it ready for the next one: the token it draws is the next one's input. The host sends what changed.
Knows no queue and no requests beyond their sampling parameters.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from engine.batch import BatchBuilder, ModelInput
from engine.kv_cache import KVCache
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence as RunningSequence
from engine.step_ends import BY_DEFINITION, Slots, StepKernels, advance
from model.attention import Attend
from model.config import GPTConfig
from model.gpt import GPT

AttentionFactory = Callable[[GPTConfig, KVCache, ModelInput], Attend]
Head = Callable[[Tensor], Tensor]
DecodeStepFactory = Callable[..., "DecodeStep"]  # the class, or one that only pretends

_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256)
_NOBODY = -1


class Sampling(IntEnum):
    """How a step ends; each can do what those before it can, but for the last."""

    GREEDY = 0
    PLAIN = 1  # temperature
    FILTERED = 2  # and top_k, top_p, min_p
    BY_HOST = 3  # with logits: what the host keeps of a sequence decides, or logprobs are wanted


@dataclass(frozen=True, slots=True)
class _Change:
    """What the host sends before a step, a row for each sequence concerned."""

    progress: list[tuple[int, ...]]  # slot, token, position
    params: list[tuple[int, ...]]  # slot, seed, choice, top_k
    shares: list[tuple[float, ...]]  # temperature, top_p, min_p; of the same slots as params
    blocks: list[tuple[int, ...]]  # slot, place in the table, block


class DecodeStep:
    """One token for each of a number of slots, as a function of the device's own memory.

    `run` reads nothing back to the host and takes nothing from it, so it can be captured; slots
    that pad a batch are the last one, whose table is all null block.
    """

    can_capture = True  # where there is CUDA

    def __init__(
        self,
        model: GPT,
        head: Head,
        cache: KVCache,
        attention: AttentionFactory,
        *,
        max_num_sequences: int,
        vocab_size: int,
        kernels: StepKernels = BY_DEFINITION,
    ) -> None:
        """Allocate the slots. `kernels` are the device's own, equal to the default."""
        self._model, self._head, self._kernels = model, head, kernels
        self.cache, self._attention = cache, attention
        self.vocab_size = vocab_size
        device = cache.k.device
        num_slots = max_num_sequences + 1
        max_blocks = -(-model.config.n_ctx // cache.block_size)
        self._slots = Slots(
            integers=torch.zeros(5, num_slots, dtype=torch.int64, device=device),
            shares=torch.zeros(3, num_slots, dtype=torch.float64, device=device),
            tables=torch.zeros(num_slots, max_blocks, dtype=torch.int32, device=device),
        )
        self._chosen = torch.full((max_num_sequences,), max_num_sequences, device=device)

    @property
    def padding_slot(self) -> int:
        """The slot that is nobody's."""
        return len(self._slots.tables) - 1

    @property
    def device(self) -> torch.device:
        """Where all of this lies."""
        return self._chosen.device

    @property
    def static_buffers(self) -> list[Tensor]:
        """What a captured step reads and writes: the same memory for as long as this lives."""
        slots = self._slots
        return [slots.integers, slots.shares, slots.tables, self._chosen]

    def write(self, change: _Change) -> None:
        """Take in what the host knows better."""
        slots = self._slots
        if change.progress:
            progress = self._send(np.array(change.progress).T)
            slots.integers[:2, progress[0]] = progress[1:]
        if change.params:
            params = self._send(np.array(change.params).T)
            slots.integers[2:, params[0]] = params[1:]
            slots.shares[:, params[0]] = self._send(np.array(change.shares).T)
        if change.blocks:
            blocks = self._send(np.array(change.blocks).T)
            slots.tables[blocks[0], blocks[1]] = blocks[2].int()

    def choose_slots(self, slots: np.ndarray) -> None:
        """Say whose turn it is from now on; the rest is padding."""
        padded = np.full(len(self._chosen), self.padding_slot)
        padded[: len(slots)] = slots
        self._chosen.copy_(self._send(padded))

    def _send(self, array: np.ndarray) -> Tensor:
        """Copy to the device without waiting for it: it may be busy with the step before."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._chosen.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self._chosen.device, non_blocking=True)

    def run(self, num_rows: int, sampling: Sampling) -> Tensor:
        """Advance the first `num_rows` slots: their token ids (num_rows,), or NOT_FINITE.

        With BY_HOST the result is logits (num_rows, V) float32, the slots wait for `feed`.
        """
        kernels, chosen = self._kernels, self._chosen[:num_rows]
        config = self._model.config
        step = kernels.begin(self._model, self._slots, chosen, self.cache.block_size)
        attend = self._attention(config, self.cache, step.batch)
        logits = self._head(self._model.run_layers(step.x, attend))
        if sampling == Sampling.BY_HOST:
            return logits
        drawn: Tensor | None = None
        if sampling != Sampling.GREEDY:
            filters = step.filters if sampling == Sampling.FILTERED else None
            drawn = kernels.draw(logits, step.temperature, step.keys, filters)
        return kernels.finish(logits, self._slots, chosen, config.n_ctx, drawn)

    def feed(self, token_ids: Tensor) -> None:
        """Finish a step that ended with logits, by token ids (R,) for the first R slots."""
        chosen = self._chosen[: len(token_ids)]
        advance(self._slots, chosen, token_ids, self._model.config.n_ctx)

    def read(self, token_ids: Tensor) -> Callable[[], list[list[int]]]:
        """Begin to copy token ids to the host; the call waits for the copy, not for later steps."""
        if token_ids.device.type != "cuda":
            return token_ids.tolist
        # A new place each time, from torch's pool of pinned memory: the last may still be unread.
        on_host = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=True)
        on_host.copy_(token_ids, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()

        def wait() -> list[list[int]]:
            event.synchronize()
            values: list[list[int]] = on_host.tolist()
            return values

        return wait


class DecodeLoop:
    """Keeps a `DecodeStep` in line with the scheduler's sequences, and runs it."""

    def __init__(self, step: DecodeStep, builder: BatchBuilder, *, max_num_sequences: int) -> None:
        """Share the builder's rows: a sequence's slot is its row in the block tables."""
        self._step = step
        self._builder = builder
        self._max_num_sequences = max_num_sequences
        num_slots = max_num_sequences + 1
        self._owners = [_NOBODY] * num_slots  # sequence that the device knows, by slot
        self._positions = [0] * num_slots  # that the device computes next
        self._num_blocks = [0] * num_slots  # of the table, on the device
        self._levels = np.zeros(num_slots, np.int64)  # the Sampling that a sequence needs
        self._slots: list[int] = []
        self._sampling = Sampling.GREEDY
        self._steps: dict[tuple[int, Sampling], Callable[[], Tensor]] = {}
        self._stream: torch.cuda.Stream | None = None  # on which steps are recorded
        self._first_graph: torch.cuda.CUDAGraph | None = None  # whose memory the others share
        self._logits: Tensor | None = None  # where graphs leave them, one after the other

    @property
    def buckets(self) -> list[int]:
        """The batch sizes that exist, ascending; a batch is padded to the next one."""
        smaller = [size for size in _BUCKETS if size < self._max_num_sequences]
        return [*smaller, self._max_num_sequences]

    def forget(self, seq_ids: Iterable[int] | None = None) -> None:
        """Know nothing any more of some sequences, or (None) of any: they may return changed."""
        if seq_ids is None:
            self._owners = [_NOBODY] * len(self._owners)
            return
        gone = set(seq_ids)
        if gone:
            self._owners = [_NOBODY if owner in gone else owner for owner in self._owners]

    def run(
        self,
        sequences: Sequence[RunningSequence],
        slots: list[int],
        *,
        num_rounds: int = 1,
        num_ahead: int = 0,
    ) -> Tensor:
        """Start a step of sequences that decode: token ids (rounds, R), or logits (R, V).

        After logits (`needs_host`), of which there is one round, `feed` must follow. `num_ahead`
        rounds were started of which the host does not know yet what they drew.
        """
        self._prepare(sequences, slots, num_ahead, num_rounds)
        bucket = next(size for size in self.buckets if size >= len(slots))
        step, num_rows = self._callable(bucket, self._sampling), len(slots)
        if self.needs_host:
            assert num_rounds == 1, "the device does not know what the host will draw"
            return step()[:num_rows]
        if num_rounds == 1:
            return step()[:num_rows].unsqueeze(0)
        # Each round leaves its draws where the one before it had left its own.
        drawn = torch.empty(num_rounds, num_rows, dtype=torch.int64, device=self._step.device)
        for place in drawn:
            place.copy_(step()[:num_rows])
        return drawn

    @property
    def needs_host(self) -> bool:
        """Whether the last step ended with logits."""
        return self._sampling == Sampling.BY_HOST

    def feed(self, token_ids: Tensor) -> None:
        """Tell the device what was drawn from the logits of the last step."""
        self._step.feed(token_ids)

    def capture_all(self) -> int:
        """Make every graph there is; returns how many. The largest first: the others fit in it."""
        for sampling in reversed(Sampling):
            for bucket in reversed(self.buckets):
                self._callable(bucket, sampling)
        if self._stream is not None:
            torch.cuda.empty_cache()  # what the trials before the recordings took
        return len(self._steps)

    def read(self, token_ids: Tensor) -> Callable[[], list[list[int]]]:
        """Begin to copy a step's result to the host; the call waits for it, and for no more."""
        return self._step.read(token_ids)

    def _prepare(
        self,
        sequences: Sequence[RunningSequence],
        slots: list[int],
        num_ahead: int,
        num_rounds: int,
    ) -> None:
        """Send what changed. In the middle of decoding that is a block now and then."""
        change = _Change([], [], [], [])
        for sequence, slot in zip(sequences, slots, strict=True):
            position = sequence.num_computed_tokens + num_ahead
            if self._owners[slot] != sequence.seq_id:
                self._owners[slot] = sequence.seq_id
                self._num_blocks[slot] = 0
                self._positions[slot] = -1
                self._describe(change, sequence, slot)
            if self._positions[slot] != position:
                assert not num_ahead, "only the device knows the token"
                change.progress.append((slot, sequence.token_ids[position], position))
            self._positions[slot] = position + num_rounds
            num_blocks = self._builder.num_blocks(slot)
            if self._num_blocks[slot] != num_blocks:
                table = self._builder.table(slot)
                for place in range(self._num_blocks[slot], num_blocks):
                    change.blocks.append((slot, place, int(table[place])))
                self._num_blocks[slot] = num_blocks
        self._step.write(change)
        if slots != self._slots or change.params:
            self._slots = list(slots)
            self._step.choose_slots(np.array(slots))
            self._sampling = Sampling(int(self._levels[slots].max()))

    def _describe(self, change: _Change, sequence: RunningSequence, slot: int) -> None:
        params = sequence.params
        vocab_size = self._step.vocab_size
        top_k = min(params.top_k or vocab_size, vocab_size)
        change.params.append((slot, params.seed, sequence.choice, top_k))
        change.shares.append((params.temperature, params.top_p, params.min_p))
        self._levels[slot] = sampling_of(params, vocab_size)

    def _callable(self, bucket: int, sampling: Sampling) -> Callable[[], Tensor]:
        known = self._steps.get((bucket, sampling))
        if known is None:
            known = self._steps[bucket, sampling] = self._make(bucket, sampling)
        return known

    def _make(self, bucket: int, sampling: Sampling) -> Callable[[], Tensor]:
        def run() -> Tensor:
            return self._step.run(bucket, sampling)

        if not self._step.can_capture or self._step.static_buffers[0].device.type != "cuda":
            return run
        return self._capture(run)

    def _capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record a step; while that lasts, all its slots are padding.

        Begins and ends the capture itself: `torch.cuda.graph` waits for the device and gives all
        cached memory back before each one, and leaves its stream current where the end raises.
        """
        slots = self._slots
        self._step.choose_slots(np.array([], np.int64))
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        # One pool: a graph's temporaries may lie where another's do, since none run at a time.
        pool = None if self._first_graph is None else self._first_graph.pool()
        with torch.cuda.stream(self._stream):
            run()  # compiles kernels, loads modules, fills cuBLAS's workspaces
            # Whatever other threads do with the device is no part of it, and no fault.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = run()
                if result.is_floating_point():
                    result = self._keep(result)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        self._first_graph = self._first_graph or graph
        self._step.choose_slots(np.array(slots, np.int64))

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def _keep(self, logits: Tensor) -> Tensor:
        """Copy logits to where they outlive their graph; kept apart they would fill a gigabyte."""
        if self._logits is None:
            self._logits = logits.new_empty(self._max_num_sequences, logits.shape[1])
        self._logits[: len(logits)].copy_(logits)
        return self._logits[: len(logits)]


def sampling_of(params: SamplingParams, vocab_size: int) -> Sampling:
    """The least a request needs; what the host keeps count of stays with it for good."""
    if (
        params.logit_bias
        or params.allowed_token_ids is not None
        or params.min_tokens > 0
        or params.logprobs is not None
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or params.repetition_penalty != 1
        or params.typical_p < 1
    ):
        return Sampling.BY_HOST
    if params.is_greedy:
        return Sampling.GREEDY
    if 0 < params.top_k < vocab_size or params.top_p < 1 or params.min_p > 0:
        return Sampling.FILTERED
    return Sampling.PLAIN
