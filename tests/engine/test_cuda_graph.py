"""The decode step over fixed buffers: here as plain calls, on CUDA as graphs of the same calls."""

import copy
import importlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from engine.attention import PagedAttention
from engine.batch import BatchBuilder
from engine.cuda_graph import DecodeLoop, DecodeStep, Sampling, sampling_of
from engine.engine import Engine
from engine.kv_cache import KVCache
from engine.messages import Abort, Choice, Submit
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.step_ends import BY_DEFINITION, NOT_FINITE, StepKernels
from model.gpt import GPT
from tests.engine.decoding import ON_DEVICE, params
from tests.engine.engines import CONFIG, Request, make_engine, random_prompt, run
from tests.tiny_models import tiny_gpt

# In numpy, as the interpreter computes, a row that is not finite or has no token left is warned of.
pytestmark = pytest.mark.filterwarnings("ignore:(All-NaN|invalid value):RuntimeWarning")

HAS_CUDA = torch.cuda.is_available()
VOCAB_SIZE = 95
GREEDY = params(temperature=0)
PLAIN = params(temperature=0.8, seed=3)
FILTERED = params(temperature=1.3, top_k=20, top_p=0.9, min_p=0.01, seed=-5)
BY_HOST = params(temperature=1.0, repetition_penalty=1.3, logit_bias={5: 4.0}, logprobs=3)


@pytest.fixture(params=["torch", "triton"])
def kernels(request: pytest.FixtureRequest) -> StepKernels:
    """What a step may begin and end with; all else is torch's, so the bits are the same."""
    if request.param == "torch":
        return BY_DEFINITION
    pytest.importorskip("triton", reason="comes with torch on CUDA and with the test extra")
    if HAS_CUDA:
        pytest.skip("these steps lie on a CPU, where only interpreted kernels run")
    of_a_gpu: StepKernels = importlib.import_module("engine.step_triton").KERNELS
    return of_a_gpu


def step_with(kernels: StepKernels) -> Callable[..., DecodeStep]:
    """Decode steps that begin and end so, whatever the device is."""
    return lambda *arguments, **keywords: DecodeStep(*arguments, **{**keywords, "kernels": kernels})


def requests(*kinds: SamplingParams, **settings: Any) -> list[Request]:
    """One of each kind, with prompts of different lengths that arrive one after the other."""
    return [
        Request(random_prompt(3 + 5 * index, seed=index), kind, arrives=2 * index, **settings)
        for index, kind in enumerate(kinds)
    ]


def drawn(engine: Engine, workload: list[Request]) -> list[Any]:
    return [[choice.drawn for choice in choices] for choices in run(engine, workload)]


@pytest.mark.parametrize(
    "workload",
    [
        requests(GREEDY, GREEDY, GREEDY),
        requests(PLAIN, GREEDY, PLAIN),
        requests(FILTERED, PLAIN, GREEDY),
        requests(BY_HOST, FILTERED, PLAIN, GREEDY),
        requests(PLAIN, GREEDY, num_choices=3),
        requests(GREEDY, params(max_tokens=1), params(max_tokens=40)),
    ],
)
def test_decoding_from_the_device_draws_what_decoding_from_the_host_draws(
    workload: list[Request], kernels: StepKernels
) -> None:
    usual = make_engine(attention=PagedAttention)
    ours = make_engine(**{**ON_DEVICE, "decode_step": step_with(kernels)})

    assert drawn(ours, workload) == drawn(usual, workload)


def test_preemption_changes_nothing() -> None:
    workload = [Request(random_prompt(9, seed=s), params(max_tokens=40, seed=s)) for s in range(6)]
    roomy = make_engine(attention=PagedAttention)
    tight = make_engine(
        attention=PagedAttention,
        decode_step=DecodeStep,
        share_completion_blocks=False,
        num_blocks=30,
    )

    results = run(tight, workload)

    assert sum(result.num_preemptions for (result,) in results) > 0
    assert [[r.drawn for r in choices] for choices in results] == drawn(roomy, workload)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_changes_nothing(seed: int) -> None:
    """Ends and arrivals that the step ahead did not know of, little room, few places."""
    chance = random.Random(seed)
    workload = [
        Request(
            random_prompt(chance.randint(1, 12), seed=100 * seed + index),
            params(
                max_tokens=chance.randint(1, 30),
                temperature=chance.choice([0.0, 1.0]),
                top_k=chance.choice([0, 0, 10]),
                logprobs=chance.choice([None, None, None, 1]),
                seed=index,
                ignore_eos=False,
            ),
            arrives=chance.randint(0, 25),
            num_choices=chance.choice([1, 1, 2]),
        )
        for index in range(8)
    ]
    settings: dict[str, Any] = {
        "attention": PagedAttention,
        "eos_token_ids": tuple(range(0, 95, 9)),
        "share_completion_blocks": False,
    }
    usual = make_engine(**settings)
    ours = make_engine(
        decode_step=DecodeStep, num_blocks=22, max_num_sequences=chance.choice([3, 8]), **settings
    )

    assert drawn(ours, workload) == drawn(usual, workload)


class Recording(DecodeStep):
    """Notes when steps are started and when they are read."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.events: list[str] = []
        self._num_reads = self._num_runs = 0

    def run(self, num_rows: int, sampling: Sampling) -> torch.Tensor:
        self.events.append(f"start {self._num_runs}")
        self._num_runs += 1
        return super().run(num_rows, sampling)

    def read(self, token_ids: torch.Tensor) -> Callable[[], list[list[int]]]:
        number = self._num_reads
        self._num_reads += 1

        def wait() -> list[list[int]]:
            self.events.append(f"read {number}")
            values: list[list[int]] = token_ids.tolist()
            return values

        return wait


@pytest.mark.parametrize(
    ("max_num_rounds", "num_tokens", "events"),
    [
        (
            1,
            5,
            ["start 0", "start 1", "read 0", "start 2", "read 1", "start 3", "read 2", "read 3"],
        ),
        (2, 6, [*(f"start {i}" for i in range(4)), "read 0", "start 4", "read 1", "read 2"]),
    ],
)
def test_the_next_step_starts_before_the_last_one_is_read(
    max_num_rounds: int, num_tokens: int, events: list[str]
) -> None:
    steps: list[Recording] = []

    def make(*arguments: Any, **keywords: Any) -> Recording:
        steps.append(Recording(*arguments, **keywords))
        return steps[-1]

    engine = make_engine(**{**ON_DEVICE, "decode_step": make}, max_num_rounds=max_num_rounds)
    run(engine, [Request([1, 2, 3], params(max_tokens=num_tokens))])

    (step,) = steps
    assert step.events == events


def test_an_engine_is_not_idle_while_a_step_is_under_way() -> None:
    engine = make_engine(**ON_DEVICE)
    choice = Choice(seq_id=0, index=0)
    engine.add(Submit(request_id="a", prompt_ids=[1], choices=[choice], params=params()))
    for _ in range(3):
        engine.step()

    engine.abort(Abort(request_id="a"))
    was_idle = engine.is_idle
    output = engine.step()

    assert not was_idle
    assert output is not None
    assert output.outputs == []
    assert output.stats.num_used_blocks == 0
    assert engine.is_idle
    assert engine.step() is None


def test_slots_of_finished_sequences_serve_others() -> None:
    workload = [
        Request(random_prompt(4, seed=s), params(max_tokens=3 + s % 4, seed=s), arrives=s)
        for s in range(12)
    ]
    settings: dict[str, Any] = {"attention": PagedAttention, "max_num_sequences": 3}
    usual = make_engine(**settings)
    ours = make_engine(decode_step=DecodeStep, share_completion_blocks=False, **settings)

    assert drawn(ours, workload) == drawn(usual, workload)


def test_a_row_that_is_not_finite_fails_alone(kernels: StepKernels) -> None:
    model = tiny_gpt(CONFIG)
    with torch.no_grad():
        model.wpe.weight[9] = torch.nan
    workload = [
        Request(random_prompt(8, seed=1), GREEDY),
        Request(random_prompt(2, seed=2), params(max_tokens=7)),
    ]
    settings = {**ON_DEVICE, "decode_step": step_with(kernels)}
    (watched, _), (broken, healthy) = (
        run(make_engine(model, max_num_rounds=max_num_rounds, **settings), workload)
        for max_num_rounds in (1, 8)
    )

    assert broken[0].finish_reason == "error"
    assert healthy[0].finish_reason == "length"
    assert broken[0].drawn == watched[0].drawn


class FailsOnce:
    """PagedAttention whose nth call raises, in the middle of a step."""

    def __init__(self, *, at: int) -> None:
        self._remaining = at

    def __call__(self, *arguments: Any) -> Any:
        attend = PagedAttention(*arguments)

        def fail_or_attend(layer: int, *qkv: torch.Tensor) -> torch.Tensor:
            self._remaining -= 1
            if self._remaining == 0:
                raise RuntimeError("planted")
            return attend(layer, *qkv)

        return fail_or_attend


def test_a_failed_step_can_be_repeated() -> None:
    workload = requests(PLAIN)
    expected = drawn(make_engine(attention=PagedAttention), workload)
    engine = make_engine(**{**ON_DEVICE, "attention": FailsOnce(at=10)})
    step, failures = engine.step, []

    def step_again(*arguments: Any) -> Any:
        try:
            return step(*arguments)
        except RuntimeError as error:
            failures.append(error)
            return step(*arguments)

    engine.step = step_again  # type: ignore[method-assign, assignment]

    assert drawn(engine, workload) == expected
    assert len(failures) == 1


def make_step(
    model: GPT,
    *,
    device: str,
    max_num_sequences: int = 4,
    kernels: StepKernels = BY_DEFINITION,
) -> DecodeStep:
    with torch.device(device):
        cache = KVCache(CONFIG, num_blocks=100, block_size=4, dtype=torch.float32, device=device)
        return DecodeStep(
            model,
            lambda hidden: model.logits(hidden)[:, :VOCAB_SIZE],
            cache,
            PagedAttention,
            max_num_sequences=max_num_sequences,
            vocab_size=VOCAB_SIZE,
            kernels=kernels,
        )


@pytest.mark.parametrize("sampling", Sampling)
def test_the_step_reads_nothing_back_to_the_host(sampling: Sampling) -> None:
    with torch.device("meta"):
        model = GPT(CONFIG).eval()
    step = make_step(model, device="meta")

    result = step.run(3, sampling)

    by_host = sampling == Sampling.BY_HOST
    assert result.shape == ((3, VOCAB_SIZE) if by_host else (3,))
    assert result.device.type == "meta"


@pytest.mark.parametrize("kind", [GREEDY, PLAIN, FILTERED])
@torch.inference_mode()
def test_several_rounds_read_nothing_back_to_the_host(kind: SamplingParams) -> None:
    with torch.device("meta"):
        model = GPT(CONFIG).eval()
    loop = DecodeLoop(make_step(model, device="meta"), Tables([1, 2, 3, 4]), max_num_sequences=4)
    sequence = Sequence(
        seq_id=7, request_id="a", prompt_ids=[1] * 6, params=kind, n_ctx=CONFIG.n_ctx
    )
    sequence.num_computed_tokens = 5

    drawn = loop.run([sequence], [2], num_rounds=8)

    assert drawn.shape == (8, 1)
    assert drawn.device.type == "meta"


@pytest.mark.parametrize("sampling", [Sampling.GREEDY, Sampling.PLAIN, Sampling.FILTERED])
@torch.inference_mode()
def test_the_step_runs_on_without_the_host(sampling: Sampling, kernels: StepKernels) -> None:
    """What it leaves in its buffers is all that the next one needs."""
    engine = make_engine(attention=PagedAttention)
    kind = {Sampling.GREEDY: GREEDY, Sampling.PLAIN: PLAIN, Sampling.FILTERED: FILTERED}[sampling]
    prompt = [3]
    expected = drawn(engine, [Request(prompt, kind)])[0][0][0]
    step = make_step(tiny_gpt(CONFIG), device="cpu", kernels=kernels)
    integers, shares, tables, slots = step.static_buffers
    where = [buffer.data_ptr() for buffer in step.static_buffers]
    integers[:, 2] = torch.tensor([prompt[0], 0, kind.seed, 0, kind.top_k or VOCAB_SIZE])
    shares[:, 2] = torch.tensor([kind.temperature, kind.top_p, kind.min_p])
    tables[2] = torch.arange(1, 17)
    slots[1] = 2

    found = [step.run(2, sampling)[1].item() for _ in range(kind.max_tokens)]

    assert found == expected
    assert [buffer.data_ptr() for buffer in step.static_buffers] == where
    assert not integers[:, -1].any(), "padding stays where it is"


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
@pytest.mark.parametrize("sampling", Sampling)
@torch.inference_mode()
def test_a_step_by_kernels_leaves_all_memory_as_the_definition_does(
    sampling: Sampling, kernels: StepKernels
) -> None:
    """Some rows beside padding, one of them broken, over several steps."""
    model = tiny_gpt(CONFIG)
    with torch.no_grad():
        model.wpe.weight[9] = torch.nan
    ours, theirs = (
        make_step(model, device="cpu", max_num_sequences=6, kernels=some)
        for some in (kernels, BY_DEFINITION)
    )
    for step in (ours, theirs):
        integers, shares, tables, chosen = step.static_buffers
        for slot, (kind, position) in enumerate(
            [(GREEDY, 5), (PLAIN, 30), (GREEDY, 8), (FILTERED, CONFIG.n_ctx - 2), (PLAIN, 7)]
        ):
            top_k = kind.top_k or VOCAB_SIZE
            integers[:, slot] = torch.tensor([40 + slot, position, kind.seed, slot, top_k])
            shares[:, slot] = torch.tensor([kind.temperature, kind.top_p, kind.min_p])
            tables[slot] = torch.arange(16 * slot + 16, 16 * slot, -1)
        chosen[:5] = torch.tensor([4, 0, 2, 3, 1])

    for number in range(4):
        found, expected = ours.run(6, sampling), theirs.run(6, sampling)

        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
        if sampling == Sampling.BY_HOST:
            for step in (ours, theirs):
                step.feed(torch.tensor([11, 22, 33, 44, 55]))
        elif number == 1:
            assert (found == NOT_FINITE).tolist() == [False, False, True, False, False, False]
        for mine, yours in zip(ours.static_buffers, theirs.static_buffers, strict=True):
            assert torch.equal(mine, yours)
        for mine, yours in ((ours.cache.k, theirs.cache.k), (ours.cache.v, theirs.cache.v)):
            assert torch.equal(mine.nan_to_num(7.0), yours.nan_to_num(7.0))


@torch.inference_mode()
def test_padding_writes_to_the_null_block_alone(kernels: StepKernels) -> None:
    step = make_step(tiny_gpt(CONFIG), device="cpu", kernels=kernels)
    before = step.cache.k.clone()

    step.run(4, Sampling.PLAIN)

    assert torch.equal(step.cache.k[:, 1:], before[:, 1:])
    assert not torch.equal(step.cache.k[:, 0], before[:, 0])


@torch.inference_mode()
def test_a_row_at_the_end_of_the_context_stays_there(kernels: StepKernels) -> None:
    step = make_step(tiny_gpt(CONFIG), device="cpu", kernels=kernels)
    integers, _, _, slots = step.static_buffers
    integers[1, 0] = CONFIG.n_ctx - 1
    slots[0] = 0

    step.run(1, Sampling.GREEDY)
    token = step.run(1, Sampling.GREEDY)

    assert integers[1, 0] == CONFIG.n_ctx - 1
    assert token != NOT_FINITE


class Tables(BatchBuilder):
    """Block tables that a test writes."""

    def __init__(self, blocks: list[int]) -> None:
        self.blocks = blocks

    def table(self, row: int) -> np.ndarray:
        return np.array(self.blocks, np.int32)

    def num_blocks(self, row: int) -> int:
        return len(self.blocks)


@torch.inference_mode()
def test_a_sequence_that_comes_back_brings_its_new_blocks() -> None:
    step = make_step(tiny_gpt(CONFIG), device="cpu")
    builder = Tables([1, 2])
    loop = DecodeLoop(step, builder, max_num_sequences=4)
    sequence = Sequence(
        seq_id=7, request_id="a", prompt_ids=[1] * 6, params=GREEDY, n_ctx=CONFIG.n_ctx
    )
    sequence.num_computed_tokens = 5
    loop.run([sequence], [0])
    builder.blocks = [8, 9]

    loop.forget([7])
    loop.run([sequence], [0])

    assert step.static_buffers[2][0, :2].tolist() == [8, 9]


def test_a_step_does_no_more_than_its_sequences_need() -> None:
    assert sampling_of(GREEDY, VOCAB_SIZE) == Sampling.GREEDY
    assert sampling_of(PLAIN, VOCAB_SIZE) == Sampling.PLAIN
    assert sampling_of(params(top_k=VOCAB_SIZE), VOCAB_SIZE) == Sampling.PLAIN
    filters: list[dict[str, Any]] = [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}]
    for one in filters:
        assert sampling_of(params(**one), VOCAB_SIZE) == Sampling.FILTERED
    counted: list[dict[str, Any]] = [
        {"typical_p": 0.5},
        {"logprobs": 0},
        {"min_tokens": 2},
        {"presence_penalty": 1.0},
        {"frequency_penalty": 1.0},
        {"repetition_penalty": 1.1},
        {"logit_bias": {1: 1.0}},
        {"allowed_token_ids": (1, 2)},
    ]
    for one in counted:
        assert sampling_of(params(**one), VOCAB_SIZE) == Sampling.BY_HOST


@pytest.mark.cuda
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
def test_graphs_draw_what_plain_calls_draw() -> None:
    model = copy.deepcopy(tiny_gpt(CONFIG)).cuda()
    workload = requests(BY_HOST, FILTERED, PLAIN, GREEDY)
    usual = make_engine(model)
    ours = make_engine(model, decode_step=DecodeStep, share_completion_blocks=False)
    ours.warm_up()

    assert drawn(ours, workload) == drawn(usual, workload)


def test_the_triton_engine_draws_what_the_plain_one_draws() -> None:
    pytest.importorskip("triton", reason="comes with torch on CUDA and with the test extra")
    device = "cuda" if HAS_CUDA else "cpu"
    model = tiny_gpt(CONFIG).to(device)
    workload = [
        Request(random_prompt(20, seed=1), params(max_tokens=6, temperature=0)),
        Request(random_prompt(6, seed=2), params(max_tokens=9, seed=9), arrives=1),
        Request(random_prompt(2, seed=3), params(max_tokens=9, logprobs=0), arrives=2),
        Request(random_prompt(3, seed=4), params(max_tokens=5, top_k=30, top_p=0.9), arrives=9),
    ]
    usual = make_engine(model, attention=PagedAttention, use_triton=False)
    ours = make_engine(
        model, use_triton=True, decode_step=DecodeStep, share_completion_blocks=False
    )

    found = [[choice.token_ids for choice in result] for result in run(ours, workload)]

    assert found == [[choice.token_ids for choice in result] for result in run(usual, workload)]
