"""The engine: schedule, execute, update. Synchronous and in-process; token ids in, token ids out.

Knows no text, no HTTP and no processes; `worker.py` gives it one of its own.
"""

import logging
import time
from collections.abc import Iterator

import torch

from engine.batch import BatchBuilder
from engine.block_manager import BlockManager
from engine.config import EngineConfig
from engine.cuda_graph import AttentionFactory, DecodeStepFactory
from engine.errors import DoesNotFit
from engine.flight_recorder import FlightRecorder
from engine.kv_cache import KVCache
from engine.messages import Abort, Choice, StepOutput, StepStats, Submit, TokenOutput
from engine.model_runner import Launched, ModelRunner, StepResult
from engine.sampling_params import SamplingParams
from engine.scheduler import Outcome, ScheduledBatch, Scheduler
from engine.sequence import Sequence
from engine.validation import check_request
from model.gpt import GPT

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = "out_of_memory"  # as a client reads it
_ROUNDS_WITH_STOP_STRINGS = 4  # what lies behind such a string was drawn for nothing


class Engine:
    """Continuous batching of one model over a paged KV cache."""

    def __init__(
        self,
        model: GPT,
        config: EngineConfig,
        *,
        num_blocks: int,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        weights_id: bytes = b"",
        attention: AttentionFactory | None = None,
        use_triton: bool | None = None,
        decode_step: DecodeStepFactory | None = None,
        quantizes: bool = False,
        kv_cache_dtype: torch.dtype | None = None,
        same_bytes: bool = True,
    ) -> None:
        """Take over a model in evaluation mode and allocate its cache.

        `vocab_size` is the tokenizer's: ids from there on are padding. `weights_id` keys the
        prefix cache; `quantizes` asks for weights of 8 bits, `kv_cache_dtype` is the model's
        unless given, and without `same_bytes` CUDA may choose its products by their shape. What
        else may be None is then chosen by the device. Raises CacheTooSmall if `num_blocks` hold
        less than one context.
        """
        self.n_ctx = model.config.n_ctx
        self.vocab_size = vocab_size
        weight = model.wte.weight
        self._block_manager = BlockManager(
            num_blocks=num_blocks,
            block_size=config.block_size,
            enable_prefix_cache=config.enable_prefix_cache,
            share_completion_blocks=config.share_completion_blocks,
            weights_id=weights_id,
        )
        self._scheduler = Scheduler(
            config, self._block_manager, n_ctx=self.n_ctx, eos_ids=eos_token_ids
        )
        self._cache = KVCache(
            model.config,
            num_blocks=num_blocks,
            block_size=config.block_size,
            dtype=kv_cache_dtype or weight.dtype,
            device=weight.device,
        )
        self._runner = ModelRunner(
            model,
            self._cache,
            BatchBuilder(
                self._block_manager,
                max_num_sequences=config.max_num_sequences,
                n_ctx=self.n_ctx,
            ),
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            max_num_sequences=config.max_num_sequences,
            attention=attention,
            use_triton=use_triton,
            decode_step=decode_step,
            quantizes=quantizes,
            same_bytes=same_bytes,
        )
        self._max_num_rounds = config.max_num_rounds
        self._ahead: Launched | None = None  # a step started before the last one was collected
        self._next_seq_id = 0  # for `generate`
        self.kernel_seconds = 0.0  # of the last step, in model, head and sampler

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do until a request comes."""
        return self._scheduler.is_idle and self._ahead is None

    def add(self, request: Submit) -> None:
        """Let a request wait for its turn. Raises PromptTooLong, TokenOutOfRange."""
        check_request(
            request.prompt_ids, request.params, n_ctx=self.n_ctx, vocab_size=self.vocab_size
        )
        max_num_rounds = self._max_num_rounds
        if not self._runner.feeds_itself(request.params):
            max_num_rounds = 1
        elif request.params.has_stop_strings:
            max_num_rounds = min(max_num_rounds, _ROUNDS_WITH_STOP_STRINGS)
        for choice in request.choices:
            self._scheduler.add(
                Sequence(
                    seq_id=choice.seq_id,
                    request_id=request.request_id,
                    choice=choice.index,
                    prompt_ids=request.prompt_ids,
                    completion_ids=choice.completion_ids,
                    params=request.params,
                    n_ctx=self.n_ctx,
                    salt=request.salt,
                    priority=request.priority,
                    max_num_rounds=max_num_rounds,
                )
            )

    def abort(self, abort: Abort) -> None:
        """Give up a request or one of its choices; nothing happens if it has ended."""
        self._scheduler.abort(abort.request_id, abort.choice)

    def step(self, recorder: FlightRecorder | None = None) -> StepOutput | None:
        """Advance every running sequence by one batch; None when there was nothing to do.

        Raises what the machine raises; the step is then taken back and may be tried again. Where
        the memory is too small for it, its youngest sequence fails, and the next step is the same
        without it.
        """
        step, self._ahead = self._ahead, None
        batch = self._scheduler.schedule() if step is None else step.batch
        if not batch.sequences:
            return None
        if recorder is not None:
            recorder.start_step([sequence.seq_id for sequence in batch.sequences])
        now = time.monotonic()
        for sequence in batch.sequences[len(batch.sequences) - batch.num_admitted :]:
            sequence.scheduled_at = sequence.scheduled_at or now  # the first time counts
        following: ScheduledBatch | None = None
        try:
            step = step or self._runner.launch(batch)
            if step.feeds_itself and (following := self._scheduler.schedule_ahead()) is not None:
                # Before anything waits: the device goes from one step to the next.
                self._ahead = self._runner.launch(following)
            results = step.collect()
        except torch.OutOfMemoryError:
            self._take_back(batch, following)
            output = self._give_up_youngest(batch)
        except BaseException:
            self._take_back(batch, following)
            raise
        else:
            self.kernel_seconds = sum(result.kernel_seconds for result in results)
            output = self._take_in(batch, results)
        if recorder is not None:
            recorder.end_step()
            if following is not None and self._ahead is not None:
                recorder.start_step([sequence.seq_id for sequence in following.sequences])
        return output

    def prepare_memory(self) -> bool:
        """Get a little of the memory that coming requests will need, while there is nothing to do.

        Takes some milliseconds. False if there is enough of it for a while.
        """
        return self._cache.prepare(self._block_manager.num_ever_used)

    def generate(
        self, prompt_ids: list[int], params: SamplingParams, *, num_choices: int = 1
    ) -> Iterator[tuple[int, TokenOutput]]:
        """Run one request by itself, yielding (choice, output) as they come."""
        first = self._next_seq_id
        self._next_seq_id += num_choices
        choices = [Choice(seq_id=first + index, index=index) for index in range(num_choices)]
        request_id = f"generate-{first}"
        self.add(
            Submit(request_id=request_id, prompt_ids=prompt_ids, choices=choices, params=params)
        )
        try:
            while (output := self.step()) is not None:
                for token in output.outputs:
                    yield token.seq_id - first, token
        finally:
            self.abort(Abort(request_id=request_id))  # if the caller had enough

    def warm_up(self) -> None:
        """Compile and load what a first step would, before anyone waits for it.

        Raises DoesNotFit if there is no memory for even this.
        """
        # Prompt logprobs, because a request with them leaves no trace in the prefix cache's counts.
        # On a CPU one kernel chooses every kind of token and another scores them: this needs both.
        params = SamplingParams(
            max_tokens=3, temperature=1.0, top_p=0.9, ignore_eos=True, logprobs=0, prompt_logprobs=0
        )
        outputs: list[StepOutput | None] = []
        for _ in range(2):  # the second one's prompt beside a row of the first that decodes
            seq_id = self._next_seq_id
            self._next_seq_id += 1
            self.add(
                Submit(
                    request_id=f"warm-up-{seq_id}",
                    prompt_ids=[0, 0],
                    choices=[Choice(seq_id=seq_id, index=0)],
                    params=params,
                )
            )
            outputs.append(self.step())
        while outputs[-1] is not None:
            outputs.append(self.step())
        failures = (token.error_code for output in outputs if output for token in output.outputs)
        if _OUT_OF_MEMORY in failures:
            raise DoesNotFit(
                "Beside the weights and the KV cache the device has no memory left for a step "
                "of two tokens: lower kv_cache_bytes or num_blocks, or free memory."
            )
        try:
            self._runner.warm_up()
        except torch.OutOfMemoryError as error:
            raise DoesNotFit(
                "Beside the weights and the KV cache the device has no memory left for the graphs "
                "of decoding: lower kv_cache_bytes, num_blocks or max_num_sequences."
            ) from error

    @property
    def weights_bytes(self) -> int:
        """What the weights take as they are held, packed or not."""
        return self._runner.weights_bytes

    def is_batch_invariant(self) -> bool:
        """Whether a row comes out in the same bytes however many come with it, as measured now."""
        return self._runner.is_batch_invariant()

    def counts(self) -> StepOutput:
        """The counts alone: an abort changed them, and no step will tell."""
        return StepOutput(outputs=[], stats=self._stats(0))

    def _take_back(self, batch: ScheduledBatch, following: ScheduledBatch | None) -> None:
        """Undo a step that failed, and the one behind it."""
        self._ahead = None
        if following is not None:
            self._scheduler.fail(following)
        self._scheduler.fail(batch)

    def _give_up_youngest(self, batch: ScheduledBatch) -> StepOutput:
        """Fail one sequence of a step that did not fit into the memory; the others know nothing."""
        victim = self._scheduler.give_up_youngest(batch)
        assert victim is not None, "nobody aborts while a step runs"
        num_sequences, num_tokens = len(batch.sequences), batch.num_tokens
        logger.error(
            "out of memory id=%s sequences=%d tokens=%d",
            victim.request_id, num_sequences, num_tokens,
        )  # fmt: skip
        error = (
            f"The device ran out of memory in a step of {num_sequences} sequences and {num_tokens} "
            "tokens, and this sequence, the youngest, was given up. What helps: fewer requests at "
            "once, or a server with smaller --max-num-scheduled-tokens, --max-num-sequences or "
            "--kv-cache-bytes."
        )
        failed = TokenOutput(
            seq_id=victim.seq_id, finish_reason="error", error=error, error_code=_OUT_OF_MEMORY
        )
        return StepOutput(outputs=[failed], stats=self._stats(0))

    def _take_in(self, batch: ScheduledBatch, results: list[StepResult]) -> StepOutput:
        """Bring the sequences up to date, round by round, and tell what each brought."""
        outputs: list[TokenOutput] = []
        for result in results:
            outcomes = self._scheduler.update(batch, result.draws, result.failed_rows)
            outputs += [self._describe(result, outcome) for outcome in outcomes]
            told = {outcome.row for outcome in outcomes}
            for row, logprobs in result.prompt_logprobs.items():
                if row not in told:  # a chunk of a prompt that is not through yet
                    seq_id = batch.sequences[row].seq_id
                    outputs.append(TokenOutput(seq_id=seq_id, prompt_logprobs=logprobs))
        return StepOutput(outputs=outputs, stats=self._stats(batch.num_tokens))

    def _stats(self, num_scheduled_tokens: int) -> StepStats:
        scheduler, blocks = self._scheduler, self._block_manager
        return StepStats(
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            num_free_blocks=blocks.num_free_blocks,
            num_cached_blocks=blocks.num_cached_blocks,
            num_used_blocks=blocks.num_used_blocks,
            num_scheduled_tokens=num_scheduled_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_prefix_query_tokens=scheduler.num_prefix_query_tokens,
            num_prefix_hit_tokens=scheduler.num_prefix_hit_tokens,
        )

    def _describe(self, result: StepResult, outcome: Outcome) -> TokenOutput:
        sequence = outcome.sequence
        has_failed = sequence.finish_reason == "error"
        tells_all = sequence.is_finished or sequence.num_completion_tokens == 1
        return TokenOutput(
            seq_id=sequence.seq_id,
            token_id=outcome.token_id,
            finish_reason=sequence.finish_reason,
            logprobs=result.logprobs.get(outcome.row),
            prompt_logprobs=result.prompt_logprobs.get(outcome.row),
            error="The model's logits were not finite for this sequence." if has_failed else None,
            error_code="non_finite_logits" if has_failed else None,
            num_cached_tokens=sequence.num_cached_tokens if tells_all else 0,
            num_preemptions=sequence.num_preemptions if tells_all else 0,
            scheduled_at=sequence.scheduled_at if tells_all else 0.0,
        )
