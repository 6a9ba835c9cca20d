"""What the parts of a run share: the model, engines over it, prompts, and clocks."""

import copy
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from engine.batch import ModelInput, Span
from engine.config import EngineConfig
from engine.cuda_graph import DecodeStep
from engine.engine import Engine
from engine.messages import Choice, Submit
from engine.sampling_params import SamplingParams
from model.config import GPTConfig
from model.gpt import GPT

GPT2 = GPTConfig(n_layer=12, n_head=12, n_embd=768, n_ctx=1024, vocab_size=50257)
SMALL = GPTConfig(n_layer=1, n_head=1, n_embd=32, n_ctx=128, vocab_size=300)


class Workbench:
    """A model with random weights, engines over it as they are asked for, and ways to time them."""

    def __init__(self, *, device: str, is_smoke: bool) -> None:
        self.device = torch.device(device)
        self.is_smoke = is_smoke
        self.config = SMALL if is_smoke else GPT2
        torch.manual_seed(0)
        self.model = GPT(self.config).eval()  # float32, on the CPU: the truth
        self._engines: dict[tuple[object, ...], Engine] = {}
        self.taken_bytes: dict[Engine, int] = {}  # of the device, by an engine and its warming up

    def forget_engines(self) -> None:
        """Let go of all engines and their memory."""
        self._engines.clear()
        self.taken_bytes.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def engine(
        self,
        dtype: str,
        *,
        is_captured: bool = True,
        same_bytes: bool = True,
        kv_cache_dtype: torch.dtype | None = None,
        max_num_rounds: int | None = None,
    ) -> Engine:
        """An engine in a precision, warmed, its decode steps captured or plain calls.

        Where `max_num_rounds` is given it has few places, and so its graphs are soon made.
        """
        kind = (dtype, is_captured, same_bytes, kv_cache_dtype, max_num_rounds)
        if kind not in self._engines:
            settings: dict[str, Any] = {}
            if self.is_smoke:
                settings = {"max_num_sequences": 16, "max_num_scheduled_tokens": 128}
            if max_num_rounds is not None:
                settings |= {"max_num_rounds": max_num_rounds, "max_num_sequences": 4}
            config = EngineConfig(**settings).for_device("cuda")
            contexts = config.max_num_sequences * (self.config.n_ctx // config.block_size)
            # On a CPU nothing is captured, and plain means without a state on the device.
            plain = PlainStep if self.device.type == "cuda" else None
            free = self._free_bytes()
            engine = Engine(
                copy.deepcopy(self.model).to(self.device, getattr(torch, dtype)),
                config,
                num_blocks=1 + contexts,
                vocab_size=self.config.vocab_size,
                eos_token_ids=(),
                use_triton=True,
                decode_step=DecodeStep if is_captured else plain,
                same_bytes=same_bytes,
                kv_cache_dtype=kv_cache_dtype,
            )
            engine.warm_up()
            self._engines[kind] = engine
            self.taken_bytes[engine] = free - self._free_bytes()
        return self._engines[kind]

    def _free_bytes(self) -> int:
        """What the device has left, with nothing kept for later by torch."""
        if self.device.type != "cuda":
            return 0
        gc.collect()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Random prompts, the same for the same numbers."""
        generator = torch.Generator().manual_seed(1)
        shape = (count, length)
        ids: list[list[int]] = torch.randint(
            self.config.vocab_size, shape, generator=generator
        ).tolist()
        return ids

    def submit(
        self,
        engine: Engine,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        first: int = 0,
    ) -> None:
        """Add a request for each prompt, numbered from `first` on."""
        salt = time.monotonic_ns().to_bytes(8, "little")  # nothing is in the prefix cache
        for index, prompt in enumerate(prompts, first):
            choice = Choice(seq_id=index, index=0)
            engine.add(
                Submit(
                    request_id=f"gpu-{index}", prompt_ids=prompt, choices=[choice], params=params,
                    salt=salt,
                )
            )  # fmt: skip

    def run(
        self, engine: Engine, prompts: list[list[int]], params: SamplingParams
    ) -> list[tuple[list[int], list[float]]]:
        """Tokens and their logprobs of each prompt."""
        self.submit(engine, prompts, params)
        found: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
        while (output := engine.step()) is not None:
            for token in output.outputs:
                if token.token_id is not None:
                    found[token.seq_id][0].append(token.token_id)
                if token.logprobs is not None:
                    found[token.seq_id][1].append(token.logprobs.logprob)
        return found

    def steps(
        self, engine: Engine, prompts: list[list[int]], params: SamplingParams
    ) -> tuple[float, float]:
        """Medians over the rounds that only decode: seconds, and of them the host not waiting."""
        self.submit(engine, prompts, params)
        steps: list[float] = []
        outside: list[float] = []
        before = time.perf_counter()
        while (output := engine.step()) is not None:
            now = time.perf_counter()
            num_rounds, rest = divmod(len(output.outputs), len(prompts))
            is_decode = output.stats.num_scheduled_tokens == len(output.outputs)
            if num_rounds and not rest and is_decode:
                steps.append((now - before) / num_rounds)
                outside.append((now - before - engine.kernel_seconds) / num_rounds)
            before = now
        return statistics.median(steps), statistics.median(outside)

    def seconds(self, run: Callable[[], object], *, count: int = 20) -> float:
        """Median time of a call on the device; on CUDA as a graph, so that no launch is in it."""
        if self.device.type != "cuda":
            times = []
            for _ in range(2):
                before = time.perf_counter()
                run()
                times.append(time.perf_counter() - before)
            return min(times)
        run()  # compiles
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                run()
        times = []
        for _ in range(8):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            self.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / count)
        return statistics.median(times[1:])

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class PlainStep(DecodeStep):
    """A decode step that is never captured."""

    can_capture = False


def make_batch(
    spans: list[tuple[int, int, int]], *, n_ctx: int, device: torch.device
) -> ModelInput:
    """Rows of sequences by (first position, end, prompt tokens), each with blocks of its own."""
    blocks_each = n_ctx // 16
    tables = (torch.arange(len(spans) * blocks_each) + 1).view(len(spans), blocks_each).int()
    positions = torch.cat([torch.arange(first, end) for first, end, _ in spans])
    counts = torch.tensor([end - first for first, end, _ in spans])
    rows = torch.repeat_interleave(torch.arange(len(spans)), counts)
    is_decode = all(end - first == 1 and first >= prompt for first, end, prompt in spans)
    described = tuple(Span(row, *span) for row, span in enumerate(spans))
    return ModelInput(
        tokens=torch.zeros_like(positions).to(device),
        positions=positions.to(device),
        row_sequences=rows.to(device),
        block_tables=tables.to(device),
        slot_blocks=tables[rows, positions // 16].long().to(device),
        slot_offsets=(positions % 16).to(device),
        spans=() if is_decode else described,
    )
