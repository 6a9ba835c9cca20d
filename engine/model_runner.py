"""A scheduled batch in, draws out: the one place where a step touches the model."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from engine.attention import PagedAttention
from engine.attention_cpu import CPUPagedAttention
from engine.batch import BatchBuilder, ModelInput
from engine.kv_cache import KVCache
from engine.linear import FusedBlock, Head, pack
from engine.messages import TopLogprobs
from engine.sampler import sample, token_logprobs
from engine.sampling_row import SamplingRow
from engine.scheduler import ScheduledBatch
from engine.sequence import Sequence
from model.attention import Attend
from model.config import GPTConfig
from model.gpt import GPT, Block

AttentionFactory = Callable[[GPTConfig, KVCache, ModelInput], Attend]

_LOGPROB_ROWS = 32  # prompt positions whose logits are held at a time
_PROBED_COUNTS = (1, 2, 3, 7, 16, 33, 64)  # of rows


@dataclass(slots=True)
class StepResult:
    """What the model made of a batch; rows are the batch's."""

    draws: list[int]  # a token for each of `batch.sampled_rows`
    failed_rows: list[int] = field(default_factory=list)  # logits not finite
    logprobs: dict[int, TopLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TopLogprobs]] = field(default_factory=dict)
    kernel_seconds: float = 0.0  # in model, head and sampler


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
        attention: AttentionFactory | None = None,
        quantizes: bool = False,
    ) -> None:
        """Take over a model, whose blocks are packed in place where that pays.

        With `quantizes` its products have weights of 8 bits.
        """
        self._head = Head(model.wte.weight, vocab_size, norm=model.ln_f, quantizes=quantizes)
        setattr(model, "ln_f", nn.Identity())  # noqa: B010  it is the head's now
        pack(model, quantizes=quantizes)
        self._model = model
        self._cache = cache
        self._builder = builder
        self._eos_token_ids = eos_token_ids
        if attention is None:
            on_cpu = model.wte.weight.device.type == "cpu"
            attention = CPUPagedAttention if on_cpu else PagedAttention
        self._attention = attention
        self._sampling_rows: dict[int, SamplingRow] = {}  # by sequence

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> StepResult:
        """Compute one step; raises what torch raises, after which the step may be taken back."""
        for seq_id in batch.released_seq_ids:
            self._sampling_rows.pop(seq_id, None)
        if batch.blocks_to_clear:
            self._cache.clear(batch.blocks_to_clear)
        model_input = self._builder.build(batch)
        attend = self._attention(self._model.config, self._cache, model_input)
        start = time.perf_counter()
        hidden = self._model(model_input.tokens, model_input.positions, attend)  # (N, C)
        result = self._draw(batch, hidden)
        self._score_prompts(batch, hidden, result)
        result.kernel_seconds = time.perf_counter() - start
        return result

    @torch.inference_mode()
    def is_batch_invariant(self) -> bool:
        """Whether a row of each kind of product comes out in the same bytes at any row count."""
        weight = self._model.wte.weight
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(_PROBED_COUNTS[-1], weight.shape[1], generator=generator)
        x = x.to(weight.device, weight.dtype)
        block = self._model.h[0]
        if isinstance(block, Block):
            products = [block.attn.c_attn, block.attn.c_proj, block.mlp, self._head]
        else:
            assert isinstance(block, FusedBlock)
            products = [block.c_attn, block.attn_c_proj, block.c_fc, self._head]
        return all(
            torch.equal(product(x)[:count], product(x[:count]))
            for product in products
            for count in _PROBED_COUNTS
        )

    def _draw(self, batch: ScheduledBatch, hidden: Tensor) -> StepResult:
        """Choose a token for each of the rows that have caught up, from hidden states (N, C)."""
        if not batch.sampled_rows:
            return StepResult(draws=[])
        ends = np.cumsum(batch.num_scheduled_tokens) - 1  # the last token of each row
        last = torch.from_numpy(ends[batch.sampled_rows]).to(hidden.device)
        rows = [self._sampling_row(batch.sequences[row]) for row in batch.sampled_rows]
        sampled = sample(self._head(hidden[last]), rows)
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
