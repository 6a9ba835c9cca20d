"""Whether the GPU path is right: kernels, bytes and the whole engine against float32 on the CPU."""

import copy
import traceback
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.report import Report
from benchmarks.gpu.workbench import Workbench, make_batch
from engine import draw_triton, step_ends, step_triton
from engine.attention import PagedAttention
from engine.attention_triton import TritonPagedAttention
from engine.block_triton import TritonLayerNorm
from engine.draw import draw
from engine.engine import Engine
from engine.kv_cache import KVCache
from engine.linear_triton import TritonLinear
from engine.random_stream import NoiseKeys
from engine.sampling_params import SamplingParams
from engine.step_ends import Slots
from model.attention import CausalAttention

# By name: what a kernel gives here, and what plain torch gives in float32.
_Pairs = Iterable[tuple[str, Tensor, Tensor]]
_EXACT = ("draw", "a step's beginning", "a step's end")


def check_kernels(bench: Workbench, report: Report) -> None:
    """Compare each kernel with plain torch in float32 on the CPU, from the same inputs."""
    rows: list[tuple[object, ...]] = []
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        for kind, pairs in _PAIRS.items():
            try:
                for name, ours, theirs in pairs(bench, dtype):
                    error = (ours.cpu().float() - theirs).abs().max().item()
                    allowed = tolerance * max(1.0, theirs.abs().max().item())
                    if name in _EXACT:
                        allowed = 0.0
                    verdict = "pass" if error <= allowed else "FAIL"
                    rows.append((name, str(dtype)[6:], f"{error:.1e}", f"{allowed:.1e}", verdict))
            except Exception:  # as in a part: the others' verdicts are still wanted
                rows.append((kind, str(dtype)[6:], "none: it failed", "-", "FAIL"))
                report.parts.append(f"{kind} failed:\n\n```\n{traceback.format_exc()}```")
    report.add_table(("kernel", "dtype", "largest error", "allowed", "verdict"), rows)
    report.values["kernels"] = float(all(row[-1] == "pass" for row in rows))


def check_bytes(bench: Workbench, report: Report) -> None:
    """Look whether a row's bytes depend on how many rows came with it, per dtype."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        engine = bench.engine(str(dtype)[6:], is_captured=dtype == torch.bfloat16)
        rows.append((str(dtype)[6:], "yes" if engine.is_batch_invariant() else "NO"))
    report.add_table(("dtype", "products give the same bytes at any row count"), rows)
    alone, together = (
        _draw_by(bench, bench.engine("bfloat16"), count)
        for count in (1, 3 if bench.is_smoke else 9)
    )
    are_equal = alone[0] == together[0]
    verdict = "the same tokens" if are_equal else "OTHER TOKENS"
    report.parts.append(f"A sampled request alone and among others, bfloat16: {verdict}.")
    report.values["bytes"] = float(all(row[1] == "yes" for row in rows) and are_equal)


def check_engine(bench: Workbench, report: Report) -> None:
    """Compare tokens and logprobs of the engine with the plain model's."""
    rows = []
    prompts = bench.prompts(2 if bench.is_smoke else 3, 40)
    num_tokens = 4 if bench.is_smoke else 24
    is_right = True
    for dtype, allowed in (("float32", 2e-3), ("bfloat16", 0.1)):
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True, logprobs=0)
        engine = bench.engine(dtype, is_captured=dtype == "bfloat16")
        outputs = bench.run(engine, prompts, params)
        worst, num_other = 0.0, 0
        for prompt, (tokens, logprobs) in zip(prompts, outputs, strict=True):
            ids = torch.tensor(prompt + tokens[:-1])
            with torch.inference_mode():
                hidden = bench.model(ids, torch.arange(len(ids)), CausalAttention(bench.config))
                exact = bench.model.logits(hidden[len(prompt) - 1 :]).log_softmax(-1)
            best, chosen = exact.max(-1), exact[range(len(tokens)), tokens]
            worst = max(worst, (chosen - torch.tensor(logprobs)).abs().max().item())
            # Another token is right, too, where rounding decides.
            num_other += int((best.values - chosen > allowed).sum())
        is_right = is_right and worst <= allowed and num_other == 0
        rows.append((dtype, f"{worst:.1e}", f"{allowed:.0e}", num_other))
    headings = ("dtype", "largest error of a logprob", "allowed", "tokens clearly not the best")
    report.add_table(headings, rows)
    report.values["engine"] = float(is_right)
    count = 2 if bench.is_smoke else 5
    by_graph = _draw_by(bench, bench.engine("bfloat16"), count)
    by_call = _draw_by(bench, bench.engine("bfloat16", is_captured=False), count)
    report.values["graphs"] = float(by_graph == by_call)
    verdict = "the same tokens" if by_graph == by_call else "OTHER TOKENS"
    report.parts.append(f"Graphs, a step ahead, against plain calls: {verdict}.")


def check_rounds(bench: Workbench, report: Report) -> None:
    """Look whether a token depends on how many are drawn before the host looks."""
    prompts = bench.prompts(1, 5) if bench.is_smoke else bench.prompts(4, 30)
    num_tokens = 5 if bench.is_smoke else 100
    rows = []
    for name, temperature in (("greedy", 0.0), ("sampled", 0.9)):
        params = SamplingParams(
            max_tokens=num_tokens, temperature=temperature, ignore_eos=True, seed=5
        )
        by_one, by_eight = (
            bench.run(bench.engine("bfloat16", max_num_rounds=rounds), prompts, params)
            for rounds in (1, 8)
        )
        rows.append((name, "the same tokens" if by_one == by_eight else "OTHER TOKENS"))
    report.add_table(("draw", "up to 8 rounds a step, against 1"), rows)
    report.values["rounds"] = float(all(verdict == "the same tokens" for _, verdict in rows))


def _layer_pairs(bench: Workbench, dtype: torch.dtype) -> _Pairs:
    """What is not attention in the layers."""
    width = bench.config.n_embd

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    norm = torch.nn.LayerNorm(width)
    torch.nn.init.normal_(norm.weight, mean=1.0)
    x = random(5, width)
    ours = TritonLayerNorm(copy.deepcopy(norm).to(bench.device, dtype))(x.to(bench.device))
    norm.to(dtype).float()
    yield "LayerNorm", ours, norm(x.float()).detach()
    for num_in, num_out in ((width, 3 * width), (width, width), (4 * width, width)):
        for num_rows in (1, 7, 70):
            x, residual = random(num_rows, num_in), random(num_rows, num_out)
            weight, bias = random(num_out, num_in) / num_in**0.5, random(num_out)
            linear = TritonLinear(
                weight.to(bench.device), bias.to(bench.device), activation="gelu_new"
            )
            ours = linear(x.to(bench.device), residual.to(bench.device))
            product = F.linear(x.float(), weight.float(), bias.float())
            theirs = F.gelu(product, approximate="tanh") + residual.float()
            yield f"product {num_in} to {num_out}, {num_rows} rows", ours, theirs


def _draw_pairs(bench: Workbench, dtype: torch.dtype) -> _Pairs:
    """A draw without filters."""
    if dtype != torch.float32:
        return
    logits = torch.randn(9, bench.config.vocab_size) * 3 - 100
    temperature = torch.rand(9, dtype=torch.float64) + 0.5
    columns = torch.arange(27).view(3, 9)
    ours = draw_triton.draw(
        logits.to(bench.device),
        temperature.to(bench.device),
        NoiseKeys(*columns.to(bench.device).unbind()),
    )
    theirs = draw(logits, temperature, NoiseKeys(*columns.unbind()))
    yield "draw", ours, theirs.float()


def _end_pairs(bench: Workbench, dtype: torch.dtype) -> _Pairs:
    """What a decode step does before and behind its layers."""
    model, n_ctx = copy.deepcopy(bench.model).to(dtype), bench.config.n_ctx
    num_slots = 9  # the last is padding, and was chosen twice
    integers = torch.arange(5 * num_slots).view(5, num_slots) + n_ctx - num_slots - 9
    integers[0] = 7 * torch.arange(num_slots)
    shares = torch.rand(3, num_slots, dtype=torch.float64)
    shares[0, ::2] = 0
    tables = torch.arange(num_slots * (n_ctx // 16)).view(num_slots, -1).int()
    integers[:, -1], shares[:, -1], tables[-1] = 0, 0, 0
    chosen = torch.tensor([3, 0, 7, 4, 8, 8])
    logits = torch.randn(len(chosen), bench.config.vocab_size).round() - 100  # with many ties
    logits[3, 11] = torch.nan
    drawn = torch.arange(len(chosen))

    slots = Slots(integers, shares, tables)
    on_device = Slots(*(t.to(bench.device, copy=True) for t in (integers, shares, tables)))
    theirs = step_ends.begin(model, slots, chosen, 16)
    ours = step_triton.begin(
        copy.deepcopy(model).to(bench.device), on_device, chosen.to(bench.device), 16
    )
    yield "embedding", ours.x.detach(), theirs.x.detach().float()
    if dtype != torch.float32:
        return
    gathered, exact = (
        torch.stack(
            [
                *(step.batch.tokens, step.batch.positions),
                *(step.batch.slot_blocks, step.batch.slot_offsets),
                *(step.keys.seed, step.keys.choice, step.keys.position),
                *(step.filters.top_k, step.filters.top_p, step.filters.min_p, step.temperature),
            ]
        ).float()
        for step in (ours, theirs)
    )
    yield "a step's beginning", gathered, exact
    expected = step_ends.finish(logits, slots, chosen, n_ctx, drawn)
    found = step_triton.finish(
        logits.to(bench.device), on_device, chosen.to(bench.device), n_ctx, drawn.to(bench.device)
    )
    left = torch.cat((found, on_device.integers.flatten()))
    yield "a step's end", left, torch.cat((expected, slots.integers.flatten())).float()


def _attention_pairs(bench: Workbench, dtype: torch.dtype) -> _Pairs:
    for name, spans in _span_cases(bench).items():
        yield f"attention, {name}", *_attention_pair(bench, spans, dtype)


def _span_cases(bench: Workbench) -> dict[str, list[tuple[int, int, int]]]:
    """Rows of sequences by (first position, end, prompt tokens)."""
    end = bench.config.n_ctx
    return {
        "decoding": [(0, 1, 0), (end // 3, end // 3 + 1, 4), (end - 1, end, 9)],
        "prefill": [(0, 70, 70), (end - 30, end, end)],
        "both": [(40, 100, 60), (end - 1, end, 9), (3, 4, 4)],
    }


def _attention_pair(
    bench: Workbench, spans: list[tuple[int, int, int]], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    config = bench.config
    shape = {"num_blocks": 1 + 4 * (config.n_ctx // 16), "block_size": 16}
    cache = KVCache(config, **shape, dtype=dtype, device=bench.device)
    exact = KVCache(config, **shape, dtype=torch.float32, device="cpu")
    for ours, theirs in ((cache.k, exact.k), (cache.v, exact.v)):
        theirs.copy_(torch.randn(theirs.shape).to(dtype))
        ours.copy_(theirs)
    rows = torch.randn(sum(end - first for first, end, _ in spans), 3 * config.n_embd)
    rows = rows.to(dtype)
    q, k, v = rows.view(len(rows), 3, config.n_head, -1).unbind(1)
    batch = make_batch(spans, n_ctx=config.n_ctx, device=bench.device)
    on_cpu = make_batch(spans, n_ctx=config.n_ctx, device=torch.device("cpu"))
    on_device = (t.to(bench.device) for t in (q, k, v))
    ours = TritonPagedAttention(config, cache, batch)(0, *on_device)
    theirs = PagedAttention(config, exact, on_cpu)(0, q.float(), k.float(), v.float())
    return ours, theirs


def _draw_by(bench: Workbench, engine: Engine, num_sequences: int) -> list[list[int]]:
    params = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.95, ignore_eos=True, seed=5)
    outputs = bench.run(engine, bench.prompts(num_sequences, 30), params)
    return [tokens for tokens, _ in outputs]


_PAIRS: dict[str, Callable[[Workbench, torch.dtype], _Pairs]] = {
    "layers": _layer_pairs,
    "draws": _draw_pairs,
    "a step's ends": _end_pairs,
    "attention": _attention_pairs,
}
