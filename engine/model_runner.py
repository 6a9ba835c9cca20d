"""A scheduled batch in, draws out: the one place where a step touches the model."""

import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.attention import PagedAttention
from engine.attention_cpu import CPUPagedAttention
from engine.batch import BatchBuilder
from engine.cuda_graph import (
    NOT_FINITE,
    AttentionFactory,
    DecodeLoop,
    DecodeStep,
    DecodeStepFactory,
    Draw,
    Sampling,
    sampling_of,
)
from engine.draw import draw as draw_by_definition
from engine.kv_cache import KVCache
from engine.linear import Head, pack
from engine.linear_avx512 import PackedWeights
from engine.messages import TopLogprobs
from engine.sampler import sample, token_logprobs
from engine.sampling_params import SamplingParams
from engine.sampling_row import SamplingRow
from engine.scheduler import ScheduledBatch
from engine.sequence import Sequence
from model.gpt import GPT, Block

_LOGPROB_ROWS = 32  # prompt positions whose logits are held at a time
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
        """Take over a model, whose layers are replaced in place where that pays.

        `use_triton`, for the kernels of a GPU, and `decode_step`, for decoding from what lies on
        the device, are what CUDA is for; None leaves them to the device. With `quantizes`
        the products on a CPU have weights of 8 bits. Without `same_bytes` those of
        the kernels are the library's, which are fast at many rows.
        """
        on_cuda = model.wte.weight.device.type == "cuda"
        if use_triton is None:
            use_triton = on_cuda and importlib.util.find_spec("triton") is not None
        draw: Draw = draw_by_definition
        if use_triton:
            from engine.attention_triton import TritonPagedAttention
            from engine.block_triton import fuse
            from engine.draw_triton import draw as draw_by_kernel

            draw = draw_by_kernel
            self._head: nn.Module = fuse(model, vocab_size, same_bytes=same_bytes)
            attention = attention or TritonPagedAttention
        else:
            self._head = Head(model.wte.weight, vocab_size, norm=model.ln_f, quantizes=quantizes)
            setattr(model, "ln_f", nn.Identity())  # noqa: B010  it is the head's now
            if attention is None:
                on_cpu = model.wte.weight.device.type == "cpu"
                attention = CPUPagedAttention if on_cpu else PagedAttention
            # Layers that run as one know no other attention than their own.
            pack(model, quantizes=quantizes, fuses=attention is CPUPagedAttention)
        self._model = model
        self._cache = cache
        self._builder = builder
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._attention = attention
        self._decode_loop: DecodeLoop | None = None
        if on_cuda and decode_step is None:
            decode_step = DecodeStep
        if decode_step is not None:
            step = decode_step(
                model,
                self._head,
                cache,
                attention,
                max_num_sequences=max_num_sequences,
                vocab_size=vocab_size,
                draw=draw,
            )
            self._decode_loop = DecodeLoop(step, builder, max_num_sequences=max_num_sequences)
        self._sampling_rows: dict[int, SamplingRow] = {}  # by sequence

    @torch.inference_mode()
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
        model_input = self._builder.build(batch)
        attend = self._attention(self._model.config, self._cache, model_input)
        start = time.perf_counter()
        hidden = self._model(model_input.tokens, model_input.positions, attend)  # (N, C)
        result = StepResult(draws=[])
        if batch.sampled_rows:
            found = hidden
            if len(batch.sampled_rows) != len(hidden):  # in a step that only decodes, all are
                ends = np.cumsum(batch.num_scheduled_tokens) - 1  # the last token of each row
                found = hidden[torch.from_numpy(ends[batch.sampled_rows]).to(hidden.device)]
            result = self._draw(batch, self._head(found))
        self._score_prompts(batch, hidden, result)
        result.kernel_seconds = time.perf_counter() - start
        return Launched(batch, lambda: [result], feeds_itself=False)

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
                result = self._draw(batch, found)
                loop.feed(torch.tensor(result.draws, device=found.device))
                result.kernel_seconds = time.perf_counter() - start
                return Launched(batch, lambda: [result], feeds_itself=False)
            read = loop.read(found)
        except BaseException:
            loop.forget()  # who knows how far it came
            raise

        def collect() -> list[StepResult]:
            waiting_since = time.perf_counter()
            try:
                rounds = read()
            except BaseException:
                loop.forget()
                raise
            results = [StepResult(draws, _not_finite(draws)) for draws in rounds]
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
        held: dict[int, int] = {}
        for module in (*self._model.modules(), *self._head.modules()):
            for values in (module._parameters, module._buffers, module.__dict__):
                _count_bytes(values, held)
        return sum(held.values())

    @torch.inference_mode()
    def is_batch_invariant(self) -> bool:
        """Whether a row of each kind of product comes out in the same bytes at any row count."""
        weight = self._model.wte.weight
        counts = _PROBED_COUNTS_ON_CUDA if weight.is_cuda else _PROBED_COUNTS
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(counts[-1], weight.shape[1], generator=generator)
        x = x.to(weight.device, weight.dtype)
        block: Any = self._model.h[0]
        products: tuple[Any, ...]
        if isinstance(block, Block):
            products = (block.attn.c_attn, block.attn.c_proj, block.mlp, self._head)
        else:
            products = (*block.products, self._head)
        return all(
            torch.equal(product(x)[:count], product(x[:count]))
            for product in products
            for count in counts
        )

    def _draw(self, batch: ScheduledBatch, logits: Tensor) -> StepResult:
        """Choose a token for each of the rows that have caught up, from their logits (R, V)."""
        rows = [self._sampling_row(batch.sequences[row]) for row in batch.sampled_rows]
        sampled = sample(logits, rows)
        result = StepResult(draws=sampled.token_ids.tolist())
        for row, is_finite in zip(batch.sampled_rows, sampled.is_finite.tolist(), strict=True):
            if not is_finite:
                result.failed_rows.append(row)
        for place, (logprob, token_ids, logprobs) in sampled.logprobs_by_row().items():
            result.logprobs[batch.sampled_rows[place]] = TopLogprobs(logprob, token_ids, logprobs)
        return result

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
                for place in range(0, len(targets), _LOGPROB_ROWS):
                    some = slice(place, place + _LOGPROB_ROWS)
                    logits = self._head(hidden[first : first + len(targets)][some])
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


def _count_bytes(value: object, held: dict[int, int]) -> None:
    """Add the tensors and arrays in a value, by where they lie, with the bytes of each."""
    if isinstance(value, Tensor):
        is_packed = value.is_mkldnn  # opaque: it does not tell where it lies
        held[id(value) if is_packed else value.data_ptr()] = value.numel() * value.itemsize
    elif isinstance(value, np.ndarray):
        held[value.ctypes.data] = value.nbytes
    elif isinstance(value, PackedWeights):
        _count_bytes(value.weights, held)
    elif isinstance(value, dict):
        for part in value.values():
            _count_bytes(part, held)
    elif isinstance(value, list | tuple):
        for part in value:
            _count_bytes(part, held)
