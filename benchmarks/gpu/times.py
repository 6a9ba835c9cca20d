"""How fast the GPU path is, part by part; without a GPU its numbers mean nothing."""

import dataclasses
import importlib
import importlib.util
import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu.report import Report
from benchmarks.gpu.workbench import Workbench, make_batch
from engine.attention_triton import TritonPagedAttention
from engine.config import EngineConfig
from engine.kv_cache import KVCache
from engine.linear_triton import LibraryLinear, Tile, TritonLinear
from engine.memory import working_bytes
from engine.sampling_params import SamplingParams
from weights.ledger import kv_bytes_per_token

# Packages of the engine, of the checkpoint files, of the server, and of the peers.
PACKAGES = (
    *("torch", "triton", "numpy", "numba", "msgspec", "rich", "safetensors", "tiktoken"),
    *("pytest", "hypothesis", "typer", "fastapi", "starlette", "pydantic", "uvicorn", "uvloop"),
    *("httptools", "prometheus_client", "transformers", "vllm"),
)


def describe_machine(bench: Workbench, report: Report) -> None:
    """Name the machine and what can be imported."""
    is_cuda = bench.device.type == "cuda"
    name = torch.cuda.get_device_name(bench.device) if is_cuda else platform.processor()
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
        source = torch.empty(size, dtype=torch.float32, device=bench.device)
        target = torch.empty_like(source)
        seconds = bench.seconds(lambda: target.copy_(source))
        rows.append(("copy on the device", f"{8 * size / seconds / 1e12:.2f} TB/s"))
    report.add_table(("what", "value"), rows)


def time_decode(bench: Workbench, report: Report) -> None:
    """Time decoding of 1, 64 and 256 sequences."""
    engine = bench.engine("bfloat16")
    prompt_tokens, num_tokens = (16, 4) if bench.is_smoke else (384, 256)
    rows = []
    for count in (1, 3) if bench.is_smoke else (1, 64, 256):
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        for kind, one in (
            ("greedy", params),
            ("sampled", SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=1)),
        ):
            step, outside = bench.steps(engine, bench.prompts(count, prompt_tokens), one)
            rows.append(
                (count, kind, f"{count / step:,.0f}", f"{step * 1e3:.3f} ms",
                 f"{outside * 1e3:.3f} ms")
            )  # fmt: skip
            if kind == "greedy":
                report.values[str(count)] = count / step
                if count == 1:
                    report.values["stretch"] = count / step
                if count == 256:
                    report.values["host"] = outside * 1e3
    headings = ("sequences", "draw", "tokens/s", "a step", "of it, the host not waiting")
    report.add_table(headings, rows)


def time_rounds(bench: Workbench, report: Report) -> None:
    """Time decoding of few sequences where the host looks after 1, 4 and 8 tokens of each."""
    prompt_tokens, num_tokens = (16, 10) if bench.is_smoke else (384, 256)
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    rows = []
    for count in (1,) if bench.is_smoke else (1, 4):
        for rounds in (1, 4, 8):
            engine = bench.engine("bfloat16", max_num_rounds=rounds)
            step, outside = bench.steps(engine, bench.prompts(count, prompt_tokens), params)
            rows.append(
                (count, rounds, f"{count / step:,.0f}", f"{step * 1e3:.3f} ms",
                 f"{outside * 1e3:.3f} ms")
            )  # fmt: skip
    headings = ("sequences", "rounds a step", "tokens/s", "a round", "of it, the host not waiting")
    report.add_table(headings, rows)


def time_first_token(bench: Workbench, report: Report) -> None:
    """Time a long prompt on an idle engine, nothing of it in the prefix cache."""
    engine = bench.engine("bfloat16")
    length = bench.config.n_ctx - 1
    params = SamplingParams(max_tokens=1, temperature=0)
    times = []
    for _ in range(2 if bench.is_smoke else 8):
        bench.submit(engine, bench.prompts(1, length), params)
        start = time.perf_counter()
        while engine.step() is not None:
            pass
        times.append(time.perf_counter() - start)
    milliseconds = statistics.median(times[1:]) * 1e3
    report.parts.append(f"{length} tokens: {milliseconds:.2f} ms to the first token.")
    report.values["ttft"] = milliseconds


def measure_memory(bench: Workbench, report: Report) -> None:
    """Hold what an engine takes beside weights and cache against what the ledger sets aside."""
    if bench.device.type != "cuda":
        report.parts.append("Needs CUDA.")
        return
    engine = bench.engine("bfloat16")
    taken = bench.taken_bytes[engine]
    config = EngineConfig().for_device("cuda")
    contexts = config.max_num_sequences * (bench.config.n_ctx // config.block_size)
    per_block = config.block_size * kv_bytes_per_token(bench.config, "bfloat16")
    cache = (1 + contexts) * per_block
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    # A step as full as may be, of prompts whose every position is scored.
    scored = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=5)
    length = bench.config.n_ctx - 1
    bench.run(engine, bench.prompts(1 + config.step_tokens // length, length), scored)
    peak = torch.cuda.max_memory_allocated() - before
    stays = taken - engine.weights_bytes - cache
    set_aside = working_bytes(bench.config, config)
    report.add_table(
        ("what", "MB"),
        (
            (name, f"{value / 1e6:,.0f}")
            for name, value in (
                ("weights", engine.weights_bytes), ("KV cache", cache),
                ("graphs, kernels and whatever else stays", stays),
                ("a full step of scored prompts, at most", peak),
                ("the last two together", stays + peak), ("the ledger sets aside", set_aside),
            )
        ),
    )  # fmt: skip
    report.values["memory"] = (stays + peak) / set_aside


def time_disturbances(bench: Workbench, report: Report) -> None:
    """Time decoding while something else goes on than plain drawing: what do neighbours pay?"""
    engine = bench.engine("bfloat16")
    num_tokens = 6 if bench.is_smoke else 160
    plain = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    short = SamplingParams(max_tokens=1, temperature=0)
    rows = []
    for count in (3,) if bench.is_smoke else (64, 256):
        prompts = bench.prompts(count, 24)
        arriving = iter(bench.prompts(num_tokens // 4, 25))
        found: dict[str, float] = {}
        for name, last, is_disturbed in (
            ("all greedy", plain, False),
            ("one with logprobs", dataclasses.replace(plain, logprobs=1), False),
            ("a prompt of 25 tokens every 4 steps", plain, True),
        ):
            bench.submit(engine, prompts[:-1], plain)
            bench.submit(engine, prompts[-1:], last, first=count - 1)
            begun: set[int] = set()
            step = num_drawn = 0
            start = 0.0
            while (output := engine.step()) is not None:
                step += 1
                drawn = [
                    token.seq_id
                    for token in output.outputs
                    if token.token_id is not None and token.seq_id < count
                ]
                if len(begun) < count:
                    begun.update(drawn)  # the first tokens came, and with them their prompts' cost
                    start = time.perf_counter()
                else:
                    num_drawn += len(drawn)
                if is_disturbed and step % 4 == 0 and (prompt := next(arriving, None)) is not None:
                    bench.submit(engine, [prompt], short, first=count + step)
            found[name] = num_drawn / (time.perf_counter() - start)
        rows += [
            (count, name, f"{rate:,.0f}", f"{rate / found['all greedy']:.2f}")
            for name, rate in found.items()
        ]
    report.add_table(("sequences", "of which", "tokens/s", "all greedy = 1"), rows)


def profile_step(bench: Workbench, report: Report) -> None:
    """List the kernels of a decode step with their shares of its time."""
    if bench.device.type != "cuda":
        report.parts.append("Needs CUDA.")
        return
    engine = bench.engine("bfloat16")
    num_sequences, num_steps = 64, 20
    params = SamplingParams(max_tokens=80, temperature=0, ignore_eos=True)
    bench.submit(engine, bench.prompts(num_sequences, 384), params)
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
    report.add_table(
        ("kernel", "a step", "us a step", "share"),
        (
            (event.key[:60].replace("|", " "), f"{event.count / num_steps:.1f}",
             f"{event.self_device_time_total / num_steps:.1f}",
             f"{event.self_device_time_total / total:.1%}")
            for event in events[:25]
        ),
    )  # fmt: skip
    on_device = [event for event in profile.events() if event.device_type.name == "CUDA"]
    on_device.sort(key=lambda event: event.time_range.start)
    in_layers, around = count_kernels([event.name for event in on_device])
    report.values["layer"] = in_layers / bench.config.n_layer
    report.values["around"] = around


def count_kernels(names: Sequence[str]) -> tuple[float, float]:
    """How many kernels a decode step has in its layers and around them, of kernels by time.

    Medians over whole steps: where a profile begins and ends, steps are cut. What the host sends
    now and then comes between steps.
    """
    kinds = ("_layer_norm_kernel", "_linear_kernel", "_decode_kernel")
    counts: list[tuple[int, int]] = []
    first: int | None = None
    for place, name in enumerate(names):
        if name.startswith("_begin_kernel"):
            first = place
        elif name.startswith("_finish_kernel") and first is not None:
            step = names[first : place + 1]
            in_layers = sum(one.startswith(kinds) for one in step)
            in_layers -= 2  # ln_f and the head are of these kinds too
            counts.append((in_layers, len(step) - in_layers))
            first = None
    assert counts, "no step has a kernel at its beginning and one at its end"
    in_layers, around = (statistics.median(column) for column in zip(*counts, strict=True))
    return in_layers, around


def time_variants(bench: Workbench, report: Report) -> None:
    """Time decoding with what can be chosen: other bytes in other company, a cache of 8 bits."""
    prompt_tokens, num_tokens = (16, 4) if bench.is_smoke else (384, 96)
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    variants: dict[str, dict[str, Any]] = {
        "as served": {},
        "without same bytes": {"same_bytes": False},
        "a cache of 8 bits": {"kv_cache_dtype": torch.float8_e4m3fn},
    }
    rows = []
    for count in (1, 3) if bench.is_smoke else (1, 64, 256):
        steps: dict[str, float] = {}
        for name, settings in variants.items():
            engine = bench.engine("bfloat16", **settings)
            steps[name], _ = bench.steps(engine, bench.prompts(count, prompt_tokens), params)
        base = steps["as served"]
        rows += [
            (count, name, f"{step * 1e3:.3f} ms", f"{base / step:.2f}")
            for name, step in steps.items()
        ]
        if count == 64:
            report.values["cost"] = 100 * (base / steps["without same bytes"] - 1)
    report.add_table(("sequences", "variant", "a step", "speed, as served = 1"), rows)


def time_products(bench: Workbench, report: Report) -> None:
    """Time a step's products, every layer's weights in turn as a step reads them."""
    config, dtype = bench.config, torch.bfloat16
    width = config.n_embd
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    weights = [
        (torch.randn(shape) / shape[1] ** 0.5).to(bench.device, dtype)
        for _ in range(config.n_layer)
        for shape in shapes
    ]
    head = torch.randn(config.vocab_size, width).to(bench.device, dtype)
    rows = []
    for num_rows in (1, 3) if bench.is_smoke else (1, 64, 256, 1024):
        inputs = {n: torch.randn(num_rows, n).to(bench.device, dtype) for n in (width, 4 * width)}
        times = []
        for kind in (TritonLinear, LibraryLinear):
            products = [kind(weight, None) for weight in weights]
            products.append(kind(head, None, out_dtype=torch.float32))
            ins = [inputs[weight.shape[1]] for weight in (*weights, head)]

            def step(products: list[Any] = products, ins: list[torch.Tensor] = ins) -> None:
                for product, x in zip(products, ins, strict=True):
                    product(x)

            times.append(bench.seconds(step, count=2))
        ours, theirs = times
        rows.append(
            (num_rows, f"{ours * 1e6:.0f} us", f"{theirs * 1e6:.0f} us", f"{ours / theirs:.2f}")
        )
    headings = ("rows", "a step's products, fixed tiles", "cuBLAS", "ratio")
    report.add_table(headings, rows)


def time_tiles(bench: Workbench, report: Report) -> None:
    """Time other tiles for each product, and look whether they give the same bytes as ours."""
    width = bench.config.n_embd
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    shapes.append((bench.config.vocab_size, width))
    counts = (1,) if bench.is_smoke else (1, 64, 256)
    rows = []
    for num_out, num_in in shapes:
        # More weights than the caches hold, as a step has them.
        num_copies = 1 if bench.is_smoke else max(2, 100_000_000 // (2 * num_out * num_in))
        linears = [
            TritonLinear(torch.randn(num_out, num_in).to(bench.device, torch.bfloat16), None)
            for _ in range(num_copies)
        ]
        ours = linears[0].tile
        inputs = [torch.randn(n, num_in).to(bench.device, torch.bfloat16) for n in counts]
        expected = [linears[0](x) for x in inputs]
        for tile in (ours, *_other_tiles(ours, is_smoke=bench.is_smoke)):
            for linear in linears:
                linear.tile = tile
            found = [linears[0](x) for x in inputs]
            is_same = all(map(torch.equal, expected, found))
            times = []
            for x in inputs:

                def run(x: torch.Tensor = x, linears: list[TritonLinear] = linears) -> None:
                    for linear in linears:
                        linear(x)

                times.append(f"{bench.seconds(run, count=1) / num_copies * 1e6:.2f}")
            name = "x".join(str(number) for number in tile) + (" (ours)" if tile == ours else "")
            rows.append((f"{num_in} to {num_out}", name, *times, "yes" if is_same else "no"))
    headings = ("product", "rows x outs x ins x warps x stages", *(f"us, {n} rows" for n in counts))
    report.add_table((*headings, "same bytes as ours"), rows)


def _other_tiles(ours: Tile, *, is_smoke: bool) -> list[Tile]:
    if is_smoke:
        return [ours._replace(ins=32)]
    tiles = [
        Tile(rows, outs, ins, num_warps=4 * rows // 64, num_stages=stages)
        for rows in (64, 128)
        for outs in (16, 32, 64, 128)
        for ins, stages in ((64, 4), (128, 4), (256, 3), (256, 4))
    ]
    near = (ours.outs // 2, ours.outs, 2 * ours.outs)
    return [
        tile
        for tile in tiles
        if tile != ours
        and tile.outs in near
        and tile.shared_bytes(2) <= 227 * 1024
        and (tile.rows == ours.rows or tile.ins <= 128)
    ]


def time_attention(bench: Workbench, report: Report) -> None:
    """Time attention of one layer while decoding, and how fast it reads the cache."""
    config, dtype = bench.config, torch.bfloat16
    rows = []
    for num_rows in (1, 2) if bench.is_smoke else (1, 8, 64, 256):
        for length in (config.n_ctx // 2, config.n_ctx):
            blocks = num_rows * (config.n_ctx // 16)
            cache = KVCache(
                config, num_blocks=1 + blocks, block_size=16, dtype=dtype, device=bench.device
            )
            spans = [(length - 1, length, 1)] * num_rows
            batch = make_batch(spans, n_ctx=config.n_ctx, device=bench.device)
            q, k, v = (
                torch.randn(num_rows, 3, config.n_head, config.head_size)
                .to(bench.device, dtype)
                .unbind(1)
            )
            attend = TritonPagedAttention(config, cache, batch)
            seconds = bench.seconds(lambda: attend(0, q, k, v))  # noqa: B023  called at once
            num_bytes = 2 * 2 * num_rows * length * config.n_embd
            rows.append(
                (num_rows, length, f"{seconds * 1e6:.1f} us",
                 f"{num_bytes / seconds / 1e12:.2f} TB/s")
            )  # fmt: skip
    report.add_table(("sequences", "tokens", "a layer", "reading"), rows)
