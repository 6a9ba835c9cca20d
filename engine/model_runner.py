"""A scheduled batch in, draws out: the one place where a step touches the model."""

import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from engine.batch import BatchBuilder, Rows, Span
from engine.config import SCORED_ROWS
from engine.cuda_graph import (
    AttentionFactory,
    DecodeLoop,
    DecodeStep,
    DecodeStepFactory,
    Sampling,
    sampling_of,
)
from engine.kv_cache import KVCache
from engine.messages import TopLogprobs
from engine.network import ModularNetwork, Network, make_network
from engine.sampler import bare_options, sample, token_logprobs
from engine.sampler_cpu import Options
from engine.sampling_params import SamplingParams
from engine.sampling_row import SamplingRow
from engine.scheduler import ScheduledBatch
from engine.sequence import Sequence
from engine.step_ends import BY_DEFINITION, NOT_FINITE
from model.gpt import GPT

_PROBED_COUNTS = (1, 2, 3, 7, 16, 33, 64)  # of rows
_PROBED_COUNTS_ON_CUDA = (*_PROBED_COUNTS, 65, 130, 300)  # and where other tiles begin


@dataclass(slots=True)
class StepResult:
    """What the model made of a batch; rows are the batch's."""

    draws: list[int]  # a token for each of `batch.sampled_rows`
    failed_rows: list[int] = field(default_factory=list)  # logits not finite
    logprobs: dict[int, TopLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TopLogprobs]] = field(default_factory=dict)
    kernel_seconds: float = 0.0  # in model, head and sampler, or waiting for them

    def note_failures(self, batch: ScheduledBatch, is_finite: list[bool]) -> None:
        """Take down whose logits are not finite, of the rows that have caught up."""
        if not all(is_finite):
            rows = zip(batch.sampled_rows, is_finite, strict=True)
            self.failed_rows += [row for row, finite in rows if not finite]


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that was started, and may be running still."""

    batch: ScheduledBatch
    collect: Callable[[], list[StepResult]]  # waits for it; a result for each round
    feeds_itself: bool  # the next may be started before this one is collected


class ModelRunner:
    """Runs the network over a paged cache and draws the tokens.

    Decode rows and prompt chunks share every matrix product; logits are computed for the rows that
    are sampled, and for prompt positions whose logprobs were asked for.
    """

    def __init__(
        self,
        model: GPT,
        cache: KVCache,
        builder: BatchBuilder,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        max_num_sequences: int,
        attention: AttentionFactory | None = None,
        use_triton: bool | None = None,
        decode_step: DecodeStepFactory | None = None,
        quantizes: bool = False,
        same_bytes: bool = True,
    ) -> None:
        """Take over a model; what computes it is for `engine.network` to choose.

        `use_triton`, for the kernels of a GPU, and `decode_step`, for decoding from what lies on
        the device, are what CUDA is for; None leaves them to the device. With `quantizes`
        the products on a CPU have weights of 8 bits. Without `same_bytes` those of
        the kernels are the library's, which are fast at many rows.
        """
        on_cuda = model.wte.weight.device.type == "cuda"
        if use_triton is None:
            use_triton = on_cuda and importlib.util.find_spec("triton") is not None
        if on_cuda and decode_step is None:
            decode_step = DecodeStep
        network = make_network(
            model,
            cache,
            vocab_size=vocab_size,
            attention=attention,
            use_triton=use_triton,
            quantizes=quantizes,
            same_bytes=same_bytes,
            fuses=decode_step is None,
        )
        self._network: Network = network
        self._cache = cache
        self._builder = builder
        self._eos_token_ids = eos_token_ids
        self._n_ctx, self._vocab_size = model.config.n_ctx, vocab_size
        self._on_cuda, self._on_cpu = on_cuda, model.wte.weight.device.type == "cpu"
        self._kernels = BY_DEFINITION
        if use_triton:
            from engine.step_triton import KERNELS

            self._kernels = KERNELS
        self._decode_loop: DecodeLoop | None = None
        if decode_step is not None:
            assert isinstance(network, ModularNetwork)
            step = decode_step(
                model,
                network.head,
                cache,
                network.attention,
                max_num_sequences=max_num_sequences,
                vocab_size=vocab_size,
                kernels=self._kernels,
            )
            self._decode_loop = DecodeLoop(step, builder, max_num_sequences=max_num_sequences)
        self._sampling_rows: dict[int, SamplingRow] = {}  # by sequence

    def launch(self, batch: ScheduledBatch) -> "Launched":
        """Start a step. Raises what torch raises, after which the step may be taken back."""
        start = time.perf_counter()
        for seq_id in batch.released_seq_ids:
            self._sampling_rows.pop(seq_id, None)
        if batch.blocks_to_clear:
            self._cache.clear(batch.blocks_to_clear)
        loop = self._decode_loop
        if loop is not None:
            loop.forget(batch.released_seq_ids)
            if batch.is_decode:
                return self._launch_decode(batch, loop, start)
        rows = self._builder.build(batch)
        chosen = None  # all, as in a step that only decodes
        if len(batch.sampled_rows) != len(rows.tokens):
            ends = np.cumsum(batch.num_scheduled_tokens) - 1  # the last token of each row
            chosen = ends[batch.sampled_rows]
        wanted = self._sampling_rows_of(batch)
        start = time.perf_counter()
        wants_best = all(row.is_plain for row in wanted)
        # Now, while the rows are in the caches.
        options = bare_options(wanted) if self._on_cpu and not wants_best else None
        output = self._network.run(rows, chosen, wants_best=wants_best)
        if not wanted:
            result = StepResult(draws=[])
        elif output.best is not None and output.is_finite is not None:
            result = StepResult(draws=output.best.tolist())
            result.note_failures(batch, output.is_finite.tolist())
        else:
            result = self._draw(batch, wanted, output.logits, options)
        self._score_prompts(batch, output.hidden, result)
        result.kernel_seconds = time.perf_counter() - start
        return Launched(batch, lambda: [result], feeds_itself=False)

    @torch.inference_mode()
    def _launch_decode(self, batch: ScheduledBatch, loop: DecodeLoop, start: float) -> "Launched":
        """Start a step in which every row is the next one of its completion."""
        slots = self._builder.place(batch)
        try:
            found = loop.run(
                batch.sequences,
                slots,
                num_rounds=batch.num_rounds,
                num_ahead=batch.num_ahead,
            )
            if loop.needs_host:
                result = self._draw(batch, self._sampling_rows_of(batch), found)
                loop.feed(torch.tensor(result.draws, device=found.device))
                result.kernel_seconds = time.perf_counter() - start
                return Launched(batch, lambda: [result], feeds_itself=False)
            read = loop.read(found)
        except BaseException:
            loop.forget()  # who knows how far it came
            raise

        def collect() -> list[StepResult]:
            waiting_since = time.perf_counter()
            # If this raises, what the device remembers is right all the same: it came that far.
            results = [StepResult(draws, _not_finite(draws)) for draws in read()]
            results[0].kernel_seconds = time.perf_counter() - waiting_since
            return results

        return Launched(batch, collect, feeds_itself=True)

    def feeds_itself(self, params: SamplingParams) -> bool:
        """Whether the device draws the tokens of such a request, and knows them before the host."""
        if self._decode_loop is None:
            return False
        return sampling_of(params, self._vocab_size) != Sampling.BY_HOST

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Record what can be, so that no request waits for it."""
        if self._decode_loop is not None:
            self._decode_loop.capture_all()

    @property
    def weights_bytes(self) -> int:
        """What model and head hold, in whatever form they were packed; shared memory once."""
        return self._network.weights_bytes

    def is_batch_invariant(self) -> bool:
        """Whether the rows of a prompt come out in the same bytes in a chunk of any length.

        Before any request is there: it writes into blocks of the cache.
        """
        probed = _PROBED_COUNTS_ON_CUDA if self._on_cuda else _PROBED_COUNTS
        counts = [count for count in probed if count <= self._n_ctx]
        output = self._network.run(self._probe(counts[-1]))
        hidden, logits = output.hidden.clone(), output.logits.clone()
        for count in counts:
            output = self._network.run(self._probe(count))
            if not (
                torch.equal(output.hidden, hidden[:count])
                and torch.equal(output.logits, logits[:count])
            ):
                return False
        return True

    def _probe(self, count: int) -> Rows:
        """The first rows of a prompt that is long enough for every count."""
        num_blocks = -(-self._n_ctx // self._cache.block_size)
        positions = np.arange(count)
        return Rows(
            tokens=positions % self._vocab_size,
            positions=positions,
            row_sequences=np.zeros(count, np.int64),
            block_tables=np.arange(1, num_blocks + 1, dtype=np.int32)[None],
            spans=(Span(0, 0, count, self._n_ctx),),
        )

    def _draw(
        self,
        batch: ScheduledBatch,
        rows: list[SamplingRow],
        logits: Tensor,
        options: Options | None = None,
    ) -> StepResult:
        """Choose a token for each of the rows that have caught up, from their logits (R, V)."""
        sampled = sample(logits, rows, options, draw=self._kernels.draw)
        result = StepResult(draws=sampled.token_ids.tolist())
        result.note_failures(batch, sampled.is_finite.tolist())
        for place, (logprob, token_ids, logprobs) in sampled.logprobs_by_row().items():
            result.logprobs[batch.sampled_rows[place]] = TopLogprobs(logprob, token_ids, logprobs)
        return result

    def _sampling_rows_of(self, batch: ScheduledBatch) -> list[SamplingRow]:
        """What the sampler knows of the rows that have caught up."""
        return [self._sampling_row(batch.sequences[row]) for row in batch.sampled_rows]

    def _sampling_row(self, sequence: Sequence) -> SamplingRow:
        """The sampler's state of a sequence, brought up to date."""
        row = self._sampling_rows.get(sequence.seq_id)
        if row is None:
            row = self._sampling_rows[sequence.seq_id] = SamplingRow(
                sequence.params,
                choice=sequence.choice,
                prompt_ids=sequence.token_ids[: sequence.num_prompt_tokens],
                eos_ids=self._eos_token_ids,
            )
        if not row.is_plain:  # else all that came before is the same to it
            row.extend(sequence.token_ids[row.num_tokens :])
        return row

    def _score_prompts(self, batch: ScheduledBatch, hidden: Tensor, result: StepResult) -> None:
        """Compute logprobs of prompt tokens from hidden states (N, C), where they were asked for.

        Position p predicts the token at p + 1, so a chunk tells of the tokens after its own.
        """
        first = 0
        for row, count in enumerate(batch.num_scheduled_tokens):
            sequence = batch.sequences[row]
            num_top = sequence.params.prompt_logprobs
            if sequence.wants_prompt_logprobs and num_top is not None:
                start = sequence.num_computed_tokens + 1
                end = min(start + count, sequence.num_prompt_tokens)
                targets = torch.tensor(sequence.token_ids[start:end], device=hidden.device)
                found: list[TopLogprobs] = []
                for place in range(0, len(targets), SCORED_ROWS):
                    some = slice(place, place + SCORED_ROWS)
                    logits = self._network.logits(hidden[first : first + len(targets)][some])
                    logprobs = token_logprobs(logits, targets[some], num_top)
                    found += [TopLogprobs(*values) for values in logprobs.tolist()]
                result.prompt_logprobs[row] = found
                is_finite = all(math.isfinite(one.logprob) for one in found)
                if not is_finite and row not in result.failed_rows:
                    result.failed_rows.append(row)
            first += count


def _not_finite(draws: list[int]) -> list[int]:
    """The rows that could draw nothing."""
    return [row for row, token_id in enumerate(draws) if token_id == NOT_FINITE]
