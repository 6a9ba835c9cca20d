"""An engine of our own that says what it is told to, so that a test sees the server alone."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.client import EngineState
from engine.errors import EngineError
from engine.messages import Ready, TokenOutput, TopLogprobs
from engine.sampling_params import SamplingParams
from engine.token_stream import TokenStream

Script = Callable[[list[int], SamplingParams, int], list[int]]  # prompt, params, choice -> ids

FACTS = Ready(
    pid=1,
    device="cpu",
    dtype="float32",
    kv_cache_dtype="float32",
    products="AVX-512",
    compiled_for="a processor",
    numerics="float32 was asked for; products with AVX-512",
    n_ctx=64,
    vocab_size=268,
    num_blocks=64,
    block_size=16,
    weights_bytes=1000,
    working_bytes=1000,
    kv_cache_bytes=1000,
    available_bytes=10_000,
    weights_id="ab" * 32,
    is_batch_invariant=True,
)


def counting(prompt_ids: list[int], params: SamplingParams, choice: int) -> list[int]:
    """The letters a, b, c, ... as ids of a vocabulary whose first 256 are the bytes."""
    return [97 + (i + choice) % 26 for i in range(params.max_tokens)]


@dataclass
class Submitted:
    """What the server gave to the engine."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    num_choices: int
    salt: bytes
    priority: int
    stream: TokenStream
    aborted: set[int] = field(default_factory=set)
    is_closed: bool = False
    scheduled_at: float = field(default_factory=time.monotonic)  # at once, before all else


class FakeEngine:
    """Brings every live choice a token a step, as the script has it; `pause` holds it."""

    def __init__(self, script: Script = counting, *, eos: int | None = None) -> None:
        self.script = script
        self.eos = eos
        self.state = EngineState.READY
        self.reason = ""
        self.facts: Ready | None = FACTS
        self.num_restarts = 0
        self.num_dropped_tokens = 0
        self.seconds_without_sign = 0.0
        self.submitted: list[Submitted] = []
        self.running = asyncio.Event()
        self.running.set()
        self.failure: EngineError | None = None  # ends a stream after its first token
        self.bad_choice: int | None = None  # which fails
        self.bad_code = "non_finite_logits"  # and how
        self.tokens_together = 1  # steps whose tokens arrive at once
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        num_choices: int = 1,
        salt: bytes = b"",
        priority: int = 0,
    ) -> TokenStream:
        def close() -> None:
            request.is_closed = True

        stream = TokenStream(close)
        request = Submitted(request_id, prompt_ids, params, num_choices, salt, priority, stream)
        self.submitted.append(request)
        task = asyncio.create_task(self._generate(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    def abort_choice(self, request_id: str, choice: int) -> None:
        (request,) = (r for r in self.submitted if r.request_id == request_id)
        request.aborted.add(choice)
        if len(request.aborted) == request.num_choices:
            request.stream.finish()

    async def _generate(self, request: Submitted) -> None:
        params = request.params
        ids = [self.script(request.prompt_ids, params, i) for i in range(request.num_choices)]
        if params.prompt_logprobs is not None:
            rest = request.prompt_ids[1:]
            await asyncio.sleep(0)
            for part in (rest[:2], rest[2:]):  # in pieces, as long prompts have it
                tops = [top(i, params.prompt_logprobs) for i in part]
                request.stream.put(0, TokenOutput(seq_id=0, prompt_logprobs=tops))
        for step in range(max(1, params.max_tokens)):
            await self.running.wait()
            for _ in range(
                20 if step % self.tokens_together == 0 else 0
            ):  # so that a step's tokens have left before the next step's come
                await asyncio.sleep(0)
            if self.failure is not None and step == 1:
                request.stream.finish(self.failure)
                return
            if request.is_closed:
                return
            for index, tokens in enumerate(ids):
                is_over = step >= len(tokens) and params.max_tokens
                if index in request.aborted or is_over:
                    continue
                output = self._output(
                    params, tokens[step] if tokens else None, step, index,
                    num_cached=min(3, len(request.prompt_ids) - 1),
                    scheduled_at=request.scheduled_at,
                )  # fmt: skip
                if output.finish_reason is not None:
                    request.aborted.add(index)
                request.stream.put(index, output)
            if len(request.aborted) == request.num_choices:
                break
        request.stream.finish()

    def _output(
        self,
        params: SamplingParams,
        token: int | None,
        step: int,
        index: int,
        *,
        num_cached: int,
        scheduled_at: float,
    ) -> TokenOutput:
        reason = None
        if token is not None and (token == self.eos or token in params.stop_token_ids):
            reason = "stop"
        elif step + 1 >= params.max_tokens:
            reason = "length"
        if index == self.bad_choice:
            return TokenOutput(
                seq_id=index, finish_reason="error", error="So it is.", error_code=self.bad_code
            )
        is_telling = step == 0 or reason is not None
        return TokenOutput(
            seq_id=index,
            token_id=token,
            finish_reason=reason,
            logprobs=None
            if params.logprobs is None or token is None
            else top(token, params.logprobs, penalty=index),
            num_cached_tokens=num_cached if is_telling else 0,
            scheduled_at=scheduled_at if is_telling else 0.0,
        )


def top(token_id: int, count: int, *, penalty: int = 0) -> TopLogprobs:
    """A logprob of -0.5 and less for later choices, and alternatives that leave the token out."""
    ids = [(token_id + 1 + i) % FACTS.vocab_size for i in range(count)]
    return TopLogprobs(
        logprob=-0.5 - penalty * 0.25, token_ids=ids, logprobs=[-1.0 - i for i in range(count)]
    )
