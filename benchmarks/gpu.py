"""Check and time the GPU path in one go, and write what came out as Markdown, with the goals.

`benchmarks/gpu.sh` calls this. Every part runs by itself: what fails is reported as failed, and the
rest goes on. `--device cpu --smoke` tries the whole script on a small model in Triton's interpreter
(`TRITON_INTERPRET=1`): its checks mean something there, its times do not.
"""

import argparse
import copy
import importlib
import importlib.util
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import draw_triton
from engine.attention import PagedAttention
from engine.attention_triton import TritonPagedAttention
from engine.batch import ModelInput, Span
from engine.block_triton import TritonLayerNorm
from engine.config import EngineConfig
from engine.cuda_graph import DecodeStep
from engine.draw import draw
from engine.engine import Engine
from engine.kv_cache import KVCache
from engine.linear_triton import TritonLinear
from engine.messages import Choice, Submit
from engine.random_stream import NoiseKeys
from engine.sampling_params import SamplingParams
from model.attention import CausalAttention
from model.config import GPTConfig
from model.gpt import GPT

GPT2 = GPTConfig(n_layer=12, n_head=12, n_embd=768, n_ctx=1024, vocab_size=50257)
SMALL = GPTConfig(n_layer=1, n_head=1, n_embd=32, n_ctx=128, vocab_size=211)

# Packages of the engine, of the checkpoint files, of the server, and of the peers.
PACKAGES = (
    *("torch", "triton", "numpy", "numba", "msgspec", "rich", "safetensors", "tiktoken"),
    *("pytest", "hypothesis", "fastapi", "starlette", "pydantic", "uvicorn", "uvloop"),
    *("httptools", "prometheus_client", "transformers"),
)


@dataclass(frozen=True, slots=True)
class Goal:
    """A number to reach on an H200 with GPT-2 124M in bfloat16."""

    name: str
    limit: float
    unit: str
    is_at_least: bool = True

    def verdict(self, value: float | None) -> str:
        """Say pass or fail, or that nothing was measured."""
        if value is None:
            return "not measured"
        has_passed = value >= self.limit if self.is_at_least else value <= self.limit
        return "pass" if has_passed else "FAIL"


GOALS = {
    "kernels": Goal("every kernel equals float32 on the CPU", 1, "yes = 1"),
    "bytes": Goal("same bytes in any batch", 1, "yes = 1"),
    "engine": Goal("the engine draws what float32 on the CPU draws", 1, "yes = 1"),
    "graphs": Goal("graphs draw what plain calls draw", 1, "yes = 1"),
    "1": Goal("1 sequence", 3_500, "tokens/s"),
    "64": Goal("64 sequences, about 512 tokens long", 80_000, "tokens/s"),
    "256": Goal("256 sequences, about 512 tokens long", 110_000, "tokens/s"),
    "ttft": Goal("first token of a 1,024-token prompt", 5, "ms", is_at_least=False),
    "ready": Goal("engine built, graphs captured", 10, "s", is_at_least=False),
    "layer": Goal("kernels a layer in a decode step", 7, "", is_at_least=False),
    "cost": Goal("what the same bytes cost a step of 64", 10, "%", is_at_least=False),
    "host": Goal("the host's own time a step of 256", 1, "ms", is_at_least=False),
    "peer": Goal("1 sequence, against transformers", 2, "times"),
    "http": Goal("256 streams over HTTP", 50_000, "tokens/s"),
}

_CHECKS = ("kernels", "bytes", "engine", "graphs")  # the rest are times


@dataclass(slots=True)
class Report:
    """Markdown as it grows, and the numbers that goals are about."""

    has_times: bool  # that mean something
    parts: list[str] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)

    def add_table(self, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Append a table."""
        lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
        lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
        self.parts.append("\n".join(lines))

    def goals(self) -> str:
        """Every goal with its verdict, those that nothing was measured for included."""
        table = Report(self.has_times)
        rows: list[tuple[str, ...]] = []
        for name, goal in GOALS.items():
            is_known = name in self.values and (self.has_times or name in _CHECKS)
            value = self.values[name] if is_known else None
            bound = "at least" if goal.is_at_least else "at most"
            measured = "-" if value is None else f"{value:,.2f}"
            rows.append(
                (goal.name, f"{bound} {goal.limit:,} {goal.unit}", measured, goal.verdict(value))
            )
        table.add_table(("goal", "limit", "measured", "verdict"), rows)
        return table.parts[0]

    def markdown(self) -> str:
        """The whole report, goals first."""
        return "\n\n".join(["# The GPU path", "## Goals", self.goals(), *self.parts]) + "\n"


class Bench:
    """The parts of the report, in the order in which they run."""

    def __init__(self, *, device: str, is_smoke: bool, report: Report) -> None:
        self.device = torch.device(device)
        self.is_smoke = is_smoke
        self.report = report
        self.config = SMALL if is_smoke else GPT2
        torch.manual_seed(0)
        self.model = GPT(self.config).eval()  # float32, on the CPU: the truth
        self._engines: dict[str, Engine] = {}

    def parts(self) -> list[tuple[str, Callable[[], None]]]:
        """Every part with its heading."""
        return [
            ("Machine", self.describe_machine),
            ("Kernels against float32 on the CPU", self.check_kernels),
            ("Same bytes", self.check_bytes),
            ("The engine against float32 on the CPU", self.check_engine),
            ("Start", self.time_start),
            ("Decoding, the engine alone", self.time_decode),
            ("First token", self.time_first_token),
            ("A step's kernels", self.profile_step),
            ("Products: fixed tiles against cuBLAS", self.time_products),
            ("Attention", self.time_attention),
            ("Against transformers", self.time_transformers),
        ]

    # What it runs on

    def describe_machine(self) -> None:
        """Name the machine and what can be imported."""
        is_cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if is_cuda else platform.processor()
        missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
        rows: list[tuple[str, object]] = [
            ("device", name),
            ("python", platform.python_version()),
            ("torch", torch.__version__),
            ("triton", importlib.import_module("triton").__version__),
            ("not importable", ", ".join(missing) or "nothing that is needed"),
        ]
        if is_cuda:
            size = 2**28
            source = torch.empty(size, dtype=torch.float32, device=self.device)
            target = torch.empty_like(source)
            seconds = self.seconds(lambda: target.copy_(source))
            rows.append(("copy on the device", f"{8 * size / seconds / 1e12:.2f} TB/s"))
        self.report.add_table(("what", "value"), rows)

    # Checks

    def check_kernels(self) -> None:
        """Compare each kernel with plain torch in float32 on the CPU, from the same inputs."""
        rows: list[tuple[object, ...]] = []
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
            for name, ours, theirs in self._kernel_pairs(dtype):
                error = (ours.cpu().float() - theirs).abs().max().item()
                allowed = tolerance * max(1.0, theirs.abs().max().item())
                if name == "draw":
                    allowed = 0.0
                verdict = "pass" if error <= allowed else "FAIL"
                rows.append((name, str(dtype)[6:], f"{error:.1e}", f"{allowed:.1e}", verdict))
        self.report.add_table(("kernel", "dtype", "largest error", "allowed", "verdict"), rows)
        self.report.values["kernels"] = float(all(row[-1] == "pass" for row in rows))

    def _kernel_pairs(self, dtype: torch.dtype) -> Iterable[tuple[str, Tensor, Tensor]]:
        """What a kernel gives here and what plain torch gives in float32, by name."""
        width = self.config.n_embd

        def random(*shape: int) -> Tensor:
            return torch.randn(shape).to(dtype)

        norm = torch.nn.LayerNorm(width)
        torch.nn.init.normal_(norm.weight, mean=1.0)
        x = random(5, width)
        ours = TritonLayerNorm(copy.deepcopy(norm).to(self.device, dtype))(x.to(self.device))
        norm.to(dtype).float()
        yield "LayerNorm", ours, norm(x.float()).detach()
        for num_in, num_out in ((width, 3 * width), (width, width), (4 * width, width)):
            for num_rows in (1, 7, 70):
                x, residual = random(num_rows, num_in), random(num_rows, num_out)
                weight, bias = random(num_out, num_in) / num_in**0.5, random(num_out)
                linear = TritonLinear(
                    weight.to(self.device), bias.to(self.device), activation="gelu_new"
                )
                ours = linear(x.to(self.device), residual.to(self.device))
                product = F.linear(x.float(), weight.float(), bias.float())
                theirs = F.gelu(product, approximate="tanh") + residual.float()
                yield f"product {num_in} to {num_out}, {num_rows} rows", ours, theirs
        if dtype == torch.float32:
            logits = torch.randn(9, self.config.vocab_size) * 3 - 100
            temperature = torch.rand(9, dtype=torch.float64) + 0.5
            columns = torch.arange(27).view(3, 9)
            ours = draw_triton.draw(
                logits.to(self.device),
                temperature.to(self.device),
                NoiseKeys(*columns.to(self.device).unbind()),
            )
            theirs = draw(logits, temperature, NoiseKeys(*columns.unbind()))
            yield "draw", ours, theirs.float()
        for name, spans in self._span_cases().items():
            yield f"attention, {name}", *self._attention_pair(spans, dtype)

    def _span_cases(self) -> dict[str, list[tuple[int, int, int]]]:
        """Rows of sequences by (first position, end, prompt tokens)."""
        end = self.config.n_ctx
        return {
            "decoding": [(0, 1, 0), (end // 3, end // 3 + 1, 4), (end - 1, end, 9)],
            "prefill": [(0, 70, 70), (end - 30, end, end)],
            "both": [(40, 100, 60), (end - 1, end, 9), (3, 4, 4)],
        }

    def _attention_pair(
        self, spans: list[tuple[int, int, int]], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        shape = {"num_blocks": 1 + 4 * (config.n_ctx // 16), "block_size": 16}
        cache = KVCache(config, **shape, dtype=dtype, device=self.device)
        exact = KVCache(config, **shape, dtype=torch.float32, device="cpu")
        for ours, theirs in ((cache.k, exact.k), (cache.v, exact.v)):
            theirs.copy_(torch.randn(theirs.shape).to(dtype))
            ours.copy_(theirs)
        rows = torch.randn(sum(end - first for first, end, _ in spans), 3 * config.n_embd)
        rows = rows.to(dtype)
        q, k, v = rows.view(len(rows), 3, config.n_head, -1).unbind(1)
        batch = make_batch(spans, n_ctx=config.n_ctx, device=self.device)
        on_cpu = make_batch(spans, n_ctx=config.n_ctx, device=torch.device("cpu"))
        on_device = (t.to(self.device) for t in (q, k, v))
        ours = TritonPagedAttention(config, cache, batch)(0, *on_device)
        theirs = PagedAttention(config, exact, on_cpu)(0, q.float(), k.float(), v.float())
        return ours, theirs

    def check_bytes(self) -> None:
        """Look whether a row's bytes depend on how many rows came with it, per dtype."""
        rows = []
        for dtype in (torch.float32, torch.bfloat16):
            engine = self.engine(str(dtype)[6:], is_captured=dtype == torch.bfloat16)
            rows.append((str(dtype)[6:], "yes" if engine.is_batch_invariant() else "NO"))
        self.report.add_table(("dtype", "products give the same bytes at any row count"), rows)
        alone, together = (
            self._draw_by(self.engine("bfloat16"), count)
            for count in (1, 3 if self.is_smoke else 9)
        )
        are_equal = alone[0] == together[0]
        verdict = "the same tokens" if are_equal else "OTHER TOKENS"
        self.report.parts.append(f"A sampled request alone and among others, bfloat16: {verdict}.")
        self.report.values["bytes"] = float(all(row[1] == "yes" for row in rows) and are_equal)

    def check_engine(self) -> None:
        """Compare tokens and logprobs of the engine with the plain model's."""
        rows = []
        prompts = self._prompts(2 if self.is_smoke else 3, 40)
        num_tokens = 4 if self.is_smoke else 24
        is_right = True
        for dtype, allowed in (("float32", 2e-3), ("bfloat16", 0.1)):
            params = SamplingParams(
                max_tokens=num_tokens, temperature=0, ignore_eos=True, logprobs=0
            )
            engine = self.engine(dtype, is_captured=dtype == "bfloat16")
            outputs = self._run(engine, prompts, params)
            worst, num_other = 0.0, 0
            for prompt, (tokens, logprobs) in zip(prompts, outputs, strict=True):
                ids = torch.tensor(prompt + tokens[:-1])
                with torch.inference_mode():
                    hidden = self.model(ids, torch.arange(len(ids)), CausalAttention(self.config))
                    exact = self.model.logits(hidden[len(prompt) - 1 :]).log_softmax(-1)
                best, chosen = exact.max(-1), exact[range(len(tokens)), tokens]
                worst = max(worst, (chosen - torch.tensor(logprobs)).abs().max().item())
                # Another token is right, too, where rounding decides.
                num_other += int((best.values - chosen > allowed).sum())
            is_right = is_right and worst <= allowed and num_other == 0
            rows.append((dtype, f"{worst:.1e}", f"{allowed:.0e}", num_other))
        headings = ("dtype", "largest error of a logprob", "allowed", "tokens clearly not the best")
        self.report.add_table(headings, rows)
        self.report.values["engine"] = float(is_right)
        count = 2 if self.is_smoke else 5
        by_graph = self._draw_by(self.engine("bfloat16"), count)
        by_call = self._draw_by(self.engine("bfloat16", is_captured=False), count)
        self.report.values["graphs"] = float(by_graph == by_call)
        verdict = "the same tokens" if by_graph == by_call else "OTHER TOKENS"
        self.report.parts.append(f"Graphs, a step ahead, against plain calls: {verdict}.")

    def _draw_by(self, engine: Engine, num_sequences: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.95, ignore_eos=True, seed=5)
        outputs = self._run(engine, self._prompts(num_sequences, 30), params)
        return [tokens for tokens, _ in outputs]

    # Times

    def time_start(self) -> None:
        """Time building an engine and capturing its graphs; what was compiled before is cached."""
        start = time.perf_counter()
        self._engines.clear()
        self.engine("bfloat16")
        seconds = time.perf_counter() - start
        self.report.parts.append(f"Engine built and warmed in {seconds:.1f} s, weights at hand.")
        self.report.values["ready"] = seconds

    def time_decode(self) -> None:
        """Time decoding of 1, 64 and 256 sequences."""
        engine = self.engine("bfloat16")
        prompt_tokens, num_tokens = (16, 4) if self.is_smoke else (384, 256)
        rows = []
        for count in (1, 3) if self.is_smoke else (1, 64, 256):
            params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
            for kind, one in (
                ("greedy", params),
                ("sampled", SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=1)),
            ):
                step, outside = self._steps(engine, self._prompts(count, prompt_tokens), one)
                rows.append(
                    (count, kind, f"{count / step:,.0f}", f"{step * 1e3:.3f} ms",
                     f"{outside * 1e3:.3f} ms")
                )  # fmt: skip
                if kind == "greedy":
                    self.report.values[str(count)] = count / step
                    if count == 256:
                        self.report.values["host"] = outside * 1e3
        headings = ("sequences", "draw", "tokens/s", "a step", "of it, the host not waiting")
        self.report.add_table(headings, rows)

    def time_first_token(self) -> None:
        """Time a long prompt on an idle engine, nothing of it in the prefix cache."""
        engine = self.engine("bfloat16")
        length = self.config.n_ctx - 1
        params = SamplingParams(max_tokens=1, temperature=0)
        times = []
        for _ in range(2 if self.is_smoke else 8):
            self._submit(engine, self._prompts(1, length), params)
            start = time.perf_counter()
            while engine.step() is not None:
                pass
            times.append(time.perf_counter() - start)
        milliseconds = statistics.median(times[1:]) * 1e3
        self.report.parts.append(f"{length} tokens: {milliseconds:.2f} ms to the first token.")
        self.report.values["ttft"] = milliseconds

    def profile_step(self) -> None:
        """List the kernels of a decode step with their shares of its time."""
        if self.device.type != "cuda":
            self.report.parts.append("Needs CUDA.")
            return
        engine = self.engine("bfloat16")
        num_sequences, num_steps = 64, 20
        params = SamplingParams(max_tokens=80, temperature=0, ignore_eos=True)
        self._submit(engine, self._prompts(num_sequences, 384), params)
        for _ in range(60):  # past the prompts
            engine.step()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(num_steps - 5):
                engine.step()
            torch.cuda.synchronize()
        while engine.step() is not None:
            pass
        events = [e for e in profile.key_averages() if e.self_device_time_total > 0]
        total = sum(event.self_device_time_total for event in events)
        events.sort(key=lambda event: -event.self_device_time_total)
        num_steps -= 5
        self.report.add_table(
            ("kernel", "a step", "us a step", "share"),
            (
                (event.key[:60].replace("|", " "), f"{event.count / num_steps:.1f}",
                 f"{event.self_device_time_total / num_steps:.1f}",
                 f"{event.self_device_time_total / total:.1%}")
                for event in events[:25]
            ),
        )  # fmt: skip
        names = ("_layer_norm_kernel", "_linear_kernel", "_decode_kernel")
        in_layers = sum(e.count for e in events if e.key.startswith(names)) / num_steps
        # ln_f and the head are of these kinds too.
        self.report.values["layer"] = (in_layers - 2) / self.config.n_layer

    def time_products(self) -> None:
        """Time the products of a layer and the head, ours and cuBLAS's."""
        width, vocab_size = self.config.n_embd, self.config.vocab_size
        shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
        rows = []
        for num_rows in (1, 3) if self.is_smoke else (1, 64, 256, 1024):
            ours = theirs = 0.0
            for num_in, num_out in (*shapes, (width, vocab_size)):
                x = torch.randn(num_rows, num_in).to(self.device, torch.bfloat16)
                weight = torch.randn(num_out, num_in).to(self.device, torch.bfloat16)
                linear = TritonLinear(weight, None)
                times = 1 if num_out == vocab_size else self.config.n_layer
                ours += times * self.seconds(lambda: linear(x))  # noqa: B023  called at once
                theirs += times * self.seconds(lambda: F.linear(x, weight))  # noqa: B023
            rows.append(
                (num_rows, f"{ours * 1e6:.0f} us", f"{theirs * 1e6:.0f} us", f"{ours / theirs:.2f}")
            )
            if num_rows == 64 and "64" in self.report.values:
                step = 64 / self.report.values["64"]
                self.report.values["cost"] = 100 * (ours - theirs) / step
        headings = ("rows", "a step's products, fixed tiles", "cuBLAS", "ratio")
        self.report.add_table(headings, rows)

    def time_attention(self) -> None:
        """Time attention of one layer while decoding, and how fast it reads the cache."""
        config, dtype = self.config, torch.bfloat16
        rows = []
        for num_rows in (1, 2) if self.is_smoke else (1, 8, 64, 256):
            for length in (config.n_ctx // 2, config.n_ctx):
                blocks = num_rows * (config.n_ctx // 16)
                cache = KVCache(
                    config, num_blocks=1 + blocks, block_size=16, dtype=dtype, device=self.device
                )
                spans = [(length - 1, length, 1)] * num_rows
                batch = make_batch(spans, n_ctx=config.n_ctx, device=self.device)
                q, k, v = (
                    torch.randn(num_rows, 3, config.n_head, config.head_size)
                    .to(self.device, dtype)
                    .unbind(1)
                )
                attend = TritonPagedAttention(config, cache, batch)
                seconds = self.seconds(lambda: attend(0, q, k, v))  # noqa: B023  called at once
                num_bytes = 2 * 2 * num_rows * length * config.n_embd
                rows.append(
                    (num_rows, length, f"{seconds * 1e6:.1f} us",
                     f"{num_bytes / seconds / 1e12:.2f} TB/s")
                )  # fmt: skip
        self.report.add_table(("sequences", "tokens", "a layer", "reading"), rows)

    def time_transformers(self) -> None:
        """Time transformers' greedy `generate` with a static cache on weights of the same shape."""
        if importlib.util.find_spec("transformers") is None:
            self.report.parts.append("transformers is not importable.")
            return
        from transformers import GPT2Config, GPT2LMHeadModel

        config = self.config
        peer_config = GPT2Config(
            n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
            n_positions=config.n_ctx, vocab_size=config.vocab_size,
        )  # fmt: skip
        peer = GPT2LMHeadModel(peer_config).to(self.device, torch.bfloat16).eval()
        num_tokens = 4 if self.is_smoke else 64
        rows = []
        for count in (1,) if self.is_smoke else (1, 64):
            ids = torch.tensor(self._prompts(count, 64), device=self.device)
            times = []
            for _ in range(2):
                start = time.perf_counter()
                with torch.inference_mode():
                    peer.generate(
                        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                        min_new_tokens=num_tokens, max_new_tokens=num_tokens,
                        cache_implementation="static",
                    )  # fmt: skip
                self.synchronize()
                times.append(time.perf_counter() - start)
            theirs = count * num_tokens / times[-1]
            ours = self.report.values.get(str(count))
            ratio = "-" if ours is None else f"{ours / theirs:.2f}"
            rows.append((count, f"{theirs:,.0f}", ratio))
            if ours is not None and count == 1:
                self.report.values["peer"] = ours / theirs
        self.report.add_table(("sequences", "transformers tokens/s", "kvik : transformers"), rows)

    # Tools

    def engine(self, dtype: str, *, is_captured: bool = True) -> Engine:
        """An engine in a precision, warmed, its decode steps captured or plain calls."""
        name = f"{dtype} {is_captured}"
        if name not in self._engines:
            settings: dict[str, Any] = {"max_num_scheduled_tokens": 2048}
            if self.is_smoke:
                settings = {"max_num_sequences": 16, "max_num_scheduled_tokens": 128}
            config = EngineConfig(**settings)
            contexts = config.max_num_sequences * (self.config.n_ctx // config.block_size)
            # On a CPU nothing is captured, and plain means without a state on the device.
            plain = PlainStep if self.device.type == "cuda" else None
            engine = Engine(
                copy.deepcopy(self.model).to(self.device, getattr(torch, dtype)),
                config,
                num_blocks=1 + contexts,
                vocab_size=self.config.vocab_size,
                eos_token_ids=(),
                use_triton=True,
                decode_step=DecodeStep if is_captured else plain,
            )
            engine.warm_up()
            self._engines[name] = engine
        return self._engines[name]

    def _prompts(self, count: int, length: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(1)
        shape = (count, length)
        ids: list[list[int]] = torch.randint(
            self.config.vocab_size, shape, generator=generator
        ).tolist()
        return ids

    def _submit(self, engine: Engine, prompts: list[list[int]], params: SamplingParams) -> None:
        salt = time.monotonic_ns().to_bytes(8, "little")  # nothing is in the prefix cache
        for index, prompt in enumerate(prompts):
            choice = Choice(seq_id=index, index=0)
            engine.add(
                Submit(
                    request_id=f"gpu-{index}", prompt_ids=prompt, choices=[choice], params=params,
                    salt=salt,
                )
            )  # fmt: skip

    def _run(
        self, engine: Engine, prompts: list[list[int]], params: SamplingParams
    ) -> list[tuple[list[int], list[float]]]:
        """Tokens and their logprobs of each prompt."""
        self._submit(engine, prompts, params)
        found: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
        while (output := engine.step()) is not None:
            for token in output.outputs:
                if token.token_id is not None:
                    found[token.seq_id][0].append(token.token_id)
                if token.logprobs is not None:
                    found[token.seq_id][1].append(token.logprobs.logprob)
        return found

    def _steps(
        self, engine: Engine, prompts: list[list[int]], params: SamplingParams
    ) -> tuple[float, float]:
        """Medians over the steps that only decode: seconds, and of them the host not waiting."""
        self._submit(engine, prompts, params)
        steps: list[float] = []
        outside: list[float] = []
        before = time.perf_counter()
        while (output := engine.step()) is not None:
            now = time.perf_counter()
            if output.stats.num_scheduled_tokens == len(prompts) == len(output.outputs):
                steps.append(now - before)
                outside.append(now - before - engine.kernel_seconds)
            before = now
        return statistics.median(steps), statistics.median(outside)

    def seconds(self, run: Callable[[], object]) -> float:
        """Median time of a call on the device, in batches long enough to hide their start."""
        count = 1 if self.is_smoke else 20
        times: list[float] = []
        for _ in range(2 if self.is_smoke else 8):
            self.synchronize()
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                start.record()
                for _ in range(count):
                    run()
                end.record()
                self.synchronize()
                times.append(start.elapsed_time(end) / 1e3 / count)
            else:
                before = time.perf_counter()
                for _ in range(count):
                    run()
                times.append((time.perf_counter() - before) / count)
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


def run(*, device: str, is_smoke: bool, out: Path, limit_seconds: float) -> Report:
    """Run every part for which there is time, and write the report after each."""
    report = Report(has_times=not is_smoke)
    bench = Bench(device=device, is_smoke=is_smoke, report=report)
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    for heading, part in bench.parts():
        report.parts.append(f"## {heading}")
        began = time.monotonic()
        if began - start > limit_seconds:
            report.parts.append("Not run: the time was up.")
        else:
            try:
                part()
            except Exception:  # one part's failure is a finding, and the others are others
                report.parts.append(f"Failed:\n\n```\n{traceback.format_exc()}```")
            report.parts.append(f"({time.monotonic() - began:.1f} s)")
        (out / "gpu.md").write_text(report.markdown(), encoding="utf-8")
    return report


def main() -> None:
    """Read the options, run, print the goals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="a small model, and few of everything")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"))
    parser.add_argument("--limit-seconds", type=float, default=420)
    arguments = parser.parse_args()
    report = run(
        device=arguments.device,
        is_smoke=arguments.smoke,
        out=arguments.out,
        limit_seconds=arguments.limit_seconds,
    )
    print(report.markdown())


if __name__ == "__main__":
    main()
