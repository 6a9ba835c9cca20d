"""A decode step's ends on a GPU against their definition: on a GPU, or in Triton's interpreter."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine import step_ends as definition
from engine.cuda_graph import DecodeStep, Sampling
from engine.kv_cache import KVCache
from engine.network import ModularNetwork, make_network
from engine.sampling_params import SamplingParams
from engine.step_ends import NOT_FINITE, Slots, StepInput
from model.config import GPTConfig
from model.gpt import GPT
from tests.engine.engines import Request, make_engine, run
from tests.tiny_models import tiny_gpt

pytest.importorskip("triton", reason="triton comes with torch on CUDA and with the test extra")

from triton.runtime.interpreter import GridExecutor

from engine import step_triton
from engine.triton_operands import IS_INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=48, n_ctx=64, vocab_size=97)
BLOCK_SIZE = 4
NUM_SLOTS = 12
PADDING = NUM_SLOTS - 1
CHOSEN = [[3], [PADDING], [7, 0, 10, PADDING, PADDING], list(range(NUM_SLOTS))]


def make_slots(*, seed: int, vocab_size: int = CONFIG.vocab_size) -> Slots:
    """Slots of which every second is greedy, some at the end of their context, and padding."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    positions = integers(0, CONFIG.n_ctx, NUM_SLOTS)
    positions[:3] = torch.tensor([CONFIG.n_ctx - 1, CONFIG.n_ctx - 2, 0])
    seeds, choices = integers(-(2**63), 2**63 - 1, NUM_SLOTS), integers(0, 2**32, NUM_SLOTS)
    tokens, top_k = (integers(1, vocab_size + 1, NUM_SLOTS) for _ in range(2))
    shares = torch.rand(3, NUM_SLOTS, dtype=torch.float64, generator=generator)
    shares[0, ::2] = 0  # greedy
    shares[0, 1] = 1e-31  # not greedy, and colder than anybody may draw
    all_integers = torch.stack((tokens - 1, positions, seeds, choices, top_k))
    tables = integers(1, 1000, NUM_SLOTS, CONFIG.n_ctx // BLOCK_SIZE).int()
    all_integers[:, PADDING] = 0
    shares[:, PADDING] = 0
    tables[PADDING] = 0
    return Slots(all_integers.to(DEVICE), shares.to(DEVICE), tables.to(DEVICE))


def copy_of(slots: Slots) -> Slots:
    return Slots(slots.integers.clone(), slots.shares.clone(), slots.tables.clone())


def tensors_of(step: StepInput) -> dict[str, Tensor]:
    parts = (step, step.batch, step.filters, step.keys)
    named = {name: getattr(part, name) for part in parts for name in part.__slots__}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("chosen", CHOSEN, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_step_begins_as_defined(seed: int, chosen: list[int]) -> None:
    model, slots = tiny_gpt(CONFIG).to(DEVICE), make_slots(seed=seed)
    places = torch.tensor(chosen, device=DEVICE)

    with torch.inference_mode():
        ours = tensors_of(step_triton.begin(model, slots, places, BLOCK_SIZE))

        theirs = tensors_of(definition.begin(model, slots, places, BLOCK_SIZE))
    assert len(theirs) == 15
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        assert torch.equal(ours[name], expected), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_embedding_of_16_bits_is_rounded_as_torch_rounds_it(dtype: torch.dtype) -> None:
    model, slots = tiny_gpt(CONFIG), make_slots(seed=1)
    with torch.no_grad():
        if IS_INTERPRETED:  # which cuts off where a GPU rounds: sums that need neither
            for weight in (model.wte.weight, model.wpe.weight):
                weight.copy_(torch.randint(-60, 60, weight.shape) / 32)
        model.to(DEVICE, dtype)
        places = torch.tensor(CHOSEN[-1], device=DEVICE)

        ours = step_triton.begin(model, slots, places, BLOCK_SIZE).x

        theirs = definition.begin(model, slots, places, BLOCK_SIZE).x
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs)


def plain(logits: Tensor) -> Tensor:
    return logits


def tied(logits: Tensor) -> Tensor:
    """Few different values: the highest is there many times over."""
    return logits.round()


def broken(logits: Tensor) -> Tensor:
    """Rows with what is not finite, first, last and in the middle, beside others."""
    rows, last = len(logits), logits.shape[1] - 1
    for row, (token, value) in enumerate(
        [(last // 2, torch.nan), (0, torch.inf), (last, torch.nan), (last, -torch.inf)]
    ):
        logits[row % rows, token] = value
    logits[-1] = -torch.inf
    return logits


def mostly_banned(logits: Tensor) -> Tensor:
    """All but one token of a row, at its end."""
    logits[:, :-1] = -torch.inf
    return logits


@pytest.mark.parametrize("shape", [plain, tied, broken, mostly_banned])
@pytest.mark.parametrize("vocab_size", [1, 50, 1024, 3001])
@pytest.mark.parametrize("has_drawn", [False, True])
@pytest.mark.parametrize("chosen", CHOSEN, ids=str)
def test_a_step_ends_as_defined(
    chosen: list[int], has_drawn: bool, vocab_size: int, shape: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(vocab_size)
    theirs = make_slots(seed=len(chosen), vocab_size=vocab_size)
    ours = copy_of(theirs)
    places = torch.tensor(chosen, device=DEVICE)
    logits = shape(torch.randn(len(chosen), vocab_size) - 100).to(DEVICE)
    drawn = torch.randint(vocab_size, (len(chosen),)).to(DEVICE) if has_drawn else None

    found = step_triton.finish(logits, ours, places, CONFIG.n_ctx, drawn)

    expected = definition.finish(logits, theirs, places, CONFIG.n_ctx, drawn)
    assert torch.equal(found, expected)
    assert torch.equal(ours.integers, theirs.integers)
    assert torch.equal(ours.shares, theirs.shares)
    assert not ours.integers[:, PADDING].any(), "padding stays where it is"
    if shape is broken:
        assert found[-1] == NOT_FINITE


def test_logits_of_a_wider_table_end_alone() -> None:
    table = torch.randn(3, 90, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    table[:, 85] = 100
    slots, places = make_slots(seed=0), torch.tensor([1, 2, 3], device=DEVICE)

    found = step_triton.finish(table[:, :80], slots, places, CONFIG.n_ctx, None)

    assert torch.equal(found, table[:, :80].argmax(-1))


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what a GPU would launch: kernels by name, and operations of torch's that compute."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self._is_inside = False  # of a kernel, whose interpreter computes by other means

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        is_free = func.is_view or func.overloadpacket.__name__ in ("empty", "empty_like")
        if not (self._is_inside or is_free):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def inside(self, kernel: str) -> Iterator[None]:
        self.names.append(kernel)
        self._is_inside = True
        yield
        self._is_inside = False


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    seen = Launches()
    call = GridExecutor.__call__

    def note_and_call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        with seen.inside(self.fn.__name__):
            return call(self, *arguments, **keywords)

    monkeypatch.setattr(GridExecutor, "__call__", note_and_call)
    return seen


LAYER = [
    *("_layer_norm_kernel", "_linear_kernel", "_decode_kernel", "_linear_kernel"),
    *("_layer_norm_kernel", "_linear_kernel", "_linear_kernel"),
]


def make_step(model: GPT) -> DecodeStep:
    cache = KVCache(CONFIG, num_blocks=70, block_size=4, dtype=torch.float32, device="cpu")
    network = make_network(
        model,
        cache,
        vocab_size=95,
        attention=None,
        use_triton=True,
        quantizes=False,
        same_bytes=True,
        fuses=False,
    )
    assert isinstance(network, ModularNetwork)
    return DecodeStep(
        model,
        network.head,
        cache,
        network.attention,
        max_num_sequences=4,
        vocab_size=95,
        kernels=step_triton.KERNELS,
    )


@pytest.mark.skipif(not IS_INTERPRETED, reason="benchmarks/gpu.sh counts them on a GPU")
@torch.inference_mode()
def test_a_greedy_step_is_seven_kernels_a_layer_and_five_around_them(launches: Launches) -> None:
    step = make_step(tiny_gpt(CONFIG))

    with launches:
        step.run(3, Sampling.GREEDY)

    assert launches.names == [
        "_begin_kernel",
        *LAYER * CONFIG.n_layer,
        *("_layer_norm_kernel", "_linear_kernel", "_peaks_kernel", "_finish_kernel"),
    ]


@pytest.mark.skipif(not IS_INTERPRETED, reason="benchmarks/gpu.sh counts them on a GPU")
@torch.inference_mode()
def test_a_step_with_temperature_adds_only_what_its_draw_takes(launches: Launches) -> None:
    step = make_step(tiny_gpt(CONFIG))
    with launches:
        step.run(3, Sampling.GREEDY)
    greedy, launches.names = launches.names, []

    with launches:
        step.run(3, Sampling.PLAIN)

    ends = len(greedy) - 2
    assert launches.names[:ends] == greedy[:ends]
    assert "_draw_kernel" in launches.names
    assert launches.names[-2:] == greedy[-2:]


@pytest.mark.skipif(not IS_INTERPRETED, reason="benchmarks/gpu.sh counts them on a GPU")
def test_an_engine_with_kernels_has_them_at_both_ends(launches: Launches) -> None:
    engine = make_engine(use_triton=True, decode_step=DecodeStep, share_completion_blocks=False)
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)

    with launches:
        run(engine, [Request([1, 2, 3], params)])

    ends = ("_begin_kernel", "_peaks_kernel", "_finish_kernel")
    assert [name for name in launches.names if name in ends] == [*ends] * 2


@pytest.mark.skipif(not IS_INTERPRETED, reason="benchmarks/gpu.sh counts them on a GPU")
@torch.inference_mode()
def test_launches_are_noted_whoever_makes_them(launches: Launches) -> None:
    """By definition a step has its kernels, too, or the tests above would see nothing."""
    model, slots = tiny_gpt(CONFIG), make_slots(seed=0)
    chosen = torch.tensor([1, 2])
    logits = torch.randn(2, 95)

    with launches:
        definition.begin(model, slots, chosen, BLOCK_SIZE)
        definition.finish(logits, slots, chosen, CONFIG.n_ctx, None)

    assert len(launches.names) > 25
