import os
import stat
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2LMHeadModel

from model.attention import CausalAttention
from model.config import GPTConfig
from model.gpt import GPT, Block
from tests.byte_pairs import byte_pair_tokenizer
from tests.tiny_models import random_tokens, tiny_checkpoint, tiny_config, tiny_gpt
from weights.checkpoint import load, load_layout, save
from weights.errors import CheckpointError
from weights.layout import read_layout

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def parameters(model: GPT) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_equal(ours: GPT, expected: GPT, dtype: torch.dtype) -> None:
    """Check that two models hold the same values, the second's rounded to `dtype`."""
    found = parameters(ours)
    assert list(found) == list(parameters(expected))
    for name, parameter in parameters(expected).items():
        assert torch.equal(found[name], parameter.to(dtype)), name


def refusal(directory: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(directory, **options)
    return str(caught.value)


# There and back


@pytest.mark.parametrize("on_disk", DTYPES)
@pytest.mark.parametrize("loaded", [None, *DTYPES, torch.float64])
def test_weights_come_back_in_any_precision(
    on_disk: torch.dtype, loaded: torch.dtype | None, tmp_path: Path
) -> None:
    model = tiny_gpt()
    save(model, tmp_path / "a", tokenizer=None, dtype=on_disk)

    again = load(tmp_path / "a", dtype=loaded)

    assert_equal(again, model.to(on_disk), loaded or on_disk)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_is_saved_in_its_own_precision_unless_told(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    save(tiny_gpt().to(dtype), tmp_path / "a", tokenizer=None)

    assert load(tmp_path / "a").wte.weight.dtype == dtype


def test_a_directory_of_two_precisions_is_loaded_in_the_wider(model: GPT, tmp_path: Path) -> None:
    save(model, tmp_path / "a", tokenizer=None)
    change(tmp_path / "a", {"transformer.wpe.weight": model.wpe.weight.detach().bfloat16()})

    again = load(tmp_path / "a")

    assert read_layout(tmp_path / "a").dtypes == ["BF16", "F32"]
    assert {p.dtype for p in again.parameters()} == {torch.float32}


def test_a_model_larger_than_the_pieces_it_is_read_in_comes_back(tmp_path: Path) -> None:
    # Pieces are 1 MiB: the embedding takes five, c_fc eight, the last of them short.
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=450, n_inner=4501, n_ctx=1, vocab_size=2500))
    save(model, tmp_path / "a", tokenizer=None)

    assert_equal(load(tmp_path / "a"), model, torch.float32)


def test_rows_longer_than_a_piece_come_back(tmp_path: Path) -> None:
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=2, n_inner=2**18 + 1, n_ctx=1, vocab_size=1))
    save(model, tmp_path / "a", tokenizer=None)

    assert_equal(load(tmp_path / "a"), model, torch.float32)


def test_a_loaded_model_is_ready_to_run_and_to_train(checkpoint: Path) -> None:
    model = load(checkpoint)

    assert not model.training
    assert all(p.requires_grad and p.is_contiguous() and p.is_leaf for p in model.parameters())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_on_a_gpu_has_the_weights_of_one_on_the_processor(
    dtype: torch.dtype, model: GPT, checkpoint: Path
) -> None:
    again = load(checkpoint, device="cuda", dtype=dtype)

    assert {p.device.type for p in again.parameters()} == {"cuda"}
    assert_equal(again.cpu(), model, dtype)


def test_loading_does_not_touch_the_random_stream(checkpoint: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()

    load(checkpoint)

    assert torch.equal(torch.get_rng_state(), before)


# Names and files


def change(directory: Path, tensors: dict[str, Tensor], *, drop: str = "") -> None:
    """Put other tensors into a checkpoint's file."""
    path = directory / "model.safetensors"
    stored = load_file(path)
    stored.pop(drop, None)
    save_file({key: t.contiguous() for key, t in (stored | tensors).items()}, path)


def test_keys_with_and_without_the_prefix_are_the_same(model: GPT, tmp_path: Path) -> None:
    save(model, tmp_path / "a", tokenizer=None)
    path = tmp_path / "a" / "model.safetensors"
    save_file({k.removeprefix("transformer."): t for k, t in load_file(path).items()}, path)

    assert_equal(load(tmp_path / "a"), model, torch.float32)


def test_mask_buffers_are_skipped(model: GPT, tmp_path: Path) -> None:
    save(model, tmp_path / "a", tokenizer=None)
    change(
        tmp_path / "a",
        {
            "transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.bool).tril(),
            "h.1.attn.masked_bias": torch.tensor(-1e9),
        },
    )

    assert_equal(load(tmp_path / "a"), model, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_stored_copy_of_the_tied_head_is_accepted(
    dtype: torch.dtype, model: GPT, tmp_path: Path
) -> None:
    save(model, tmp_path / "a", tokenizer=None)
    change(tmp_path / "a", {"lm_head.weight": model.wte.weight.detach().clone()})

    assert_equal(load(tmp_path / "a", dtype=dtype), model, dtype)


def test_shards_come_back_and_are_as_small_as_asked(model: GPT, tmp_path: Path) -> None:
    save(model, tmp_path / "a", tokenizer=None, max_shard_bytes=10_000)

    again = load(tmp_path / "a")

    files = sorted((tmp_path / "a").glob("*.safetensors"))
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in files]
    single = max(p.nbytes for p in model.parameters())  # a tensor is never split
    assert max(sizes) <= max(10_000, single)
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert_equal(again, model, torch.float32)


def test_transformers_reads_our_shards(model: GPT, tmp_path: Path) -> None:
    save(model, tmp_path / "a", tokenizer=None, max_shard_bytes=10_000)
    tokens = random_tokens(model.config, 2, 16)

    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "a").eval()

    with torch.inference_mode():
        hidden = model(tokens, torch.arange(16), CausalAttention(model.config))
        torch.testing.assert_close(theirs(tokens).logits, model.logits(hidden), rtol=0, atol=1e-4)


def test_shards_that_transformers_wrote_come_back(model: GPT, tmp_path: Path) -> None:
    save(model, tmp_path / "a", tokenizer=None)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "a")

    theirs.save_pretrained(tmp_path / "b", max_shard_size="10KB")

    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    assert_equal(load(tmp_path / "b"), model, torch.float32)


def test_the_tokenizer_s_bos_and_eos_go_into_the_config(checkpoint: Path) -> None:
    layout = read_layout(checkpoint)

    assert layout.bos_token_id == byte_pair_tokenizer().bos_token_id == 267
    assert layout.eos_token_ids == (267,)


def test_a_model_saved_without_a_tokenizer_names_no_bos_and_no_eos(
    model: GPT, tmp_path: Path
) -> None:
    save(model, tmp_path / "a", tokenizer=None)

    layout = read_layout(tmp_path / "a")
    assert (layout.bos_token_id, layout.eos_token_ids) == (None, ())


def test_saved_weights_can_be_read_by_those_who_can_read_the_rest(
    model: GPT, tmp_path: Path
) -> None:
    save(model, tmp_path / "a", tokenizer=byte_pair_tokenizer(), max_shard_bytes=30_000)

    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "a").iterdir()}

    assert modes == {stat.S_IMODE((tmp_path / "a").stat().st_mode) & 0o666}


# Models without biases


def test_a_model_without_biases_comes_back_without_them(tmp_path: Path) -> None:
    model = tiny_gpt(tiny_config(bias=False))
    save(model, tmp_path / "a", tokenizer=None)

    again = load(tmp_path / "a")

    assert not again.config.bias
    assert_equal(again, model, torch.float32)


def test_a_bias_that_is_not_zero_in_a_model_without_is_refused(tmp_path: Path) -> None:
    save(tiny_gpt(tiny_config(bias=False)), tmp_path / "a", tokenizer=None)
    bias = torch.zeros(48)
    bias[-1] = 1e-30
    change(tmp_path / "a", {"transformer.h.1.attn.c_attn.bias": bias})

    assert refusal(tmp_path / "a") == (
        f"{tmp_path / 'a' / 'model.safetensors'}: tensor transformer.h.1.attn.c_attn.bias is not "
        "zero, and config.json says that the model has no biases."
    )


# Values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["wte.weight", "h.1.mlp.c_fc.weight", "ln_f.bias"])
def test_a_value_that_is_not_finite_is_refused(
    value: float, dtype: torch.dtype, name: str, tmp_path: Path
) -> None:
    save(tiny_gpt(), tmp_path / "a", tokenizer=None, dtype=dtype)
    tensor = load_file(tmp_path / "a" / "model.safetensors")[f"transformer.{name}"]
    tensor.view(-1)[-1] = value
    change(tmp_path / "a", {f"transformer.{name}": tensor})

    expected = (
        f"{tmp_path / 'a' / 'model.safetensors'}: tensor transformer.{name} holds values not "
        "finite."
    )
    assert refusal(tmp_path / "a", dtype=torch.float32) == expected


def test_a_nan_behind_the_first_piece_is_refused(tmp_path: Path) -> None:
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=450, n_ctx=1, vocab_size=2500))
    save(model, tmp_path / "a", tokenizer=None)
    last = read_layout(tmp_path / "a").tensors["wte.weight"]
    with last.file.open("r+b") as stream:
        stream.seek(last.offset + last.num_bytes - 4)
        stream.write(struct.pack("<f", float("nan")))

    assert "transformer.wte.weight holds values not finite" in refusal(tmp_path / "a")


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float16, 7e4), (torch.float16, -7e4), (torch.bfloat16, 3.4e38)]
)
def test_a_value_beyond_the_range_asked_for_is_refused_with_the_remedy(
    dtype: torch.dtype, value: float, tmp_path: Path
) -> None:
    model = tiny_gpt()
    model.ln_f.bias.data[3] = value
    save(model, tmp_path / "a", tokenizer=None)

    name = str(dtype).removeprefix("torch.")
    assert refusal(tmp_path / "a", dtype=dtype) == (
        f"{tmp_path / 'a' / 'model.safetensors'}: tensor transformer.ln_f.bias has values beyond "
        f"the range of {name}; load it as float32."
    )


def test_an_output_head_that_is_not_the_embedding_is_refused(model: GPT, tmp_path: Path) -> None:
    save(model, tmp_path / "a", tokenizer=None)
    head = model.wte.weight.detach().clone()
    head[-1, -1] += 1e-6
    change(tmp_path / "a", {"lm_head.weight": head})

    assert refusal(tmp_path / "a") == (
        f"{tmp_path / 'a' / 'model.safetensors'}: lm_head.weight differs from "
        "transformer.wte.weight; only tied output heads are supported."
    )


def test_a_file_cut_off_between_two_looks_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    save(tiny_gpt(), tmp_path / "a", tokenizer=None)
    layout = read_layout(tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)

    with pytest.raises(CheckpointError, match=r"was cut off while .* was read"):
        load_layout(layout, device="cpu", dtype=torch.float32)


# What is not saved


def test_an_existing_path_is_left_as_it_is(model: GPT, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").touch()

    with pytest.raises(CheckpointError, match="exists already; name another place"):
        save(model, tmp_path / "a", tokenizer=None)

    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


def test_a_tokenizer_that_does_not_fit_is_not_saved(tmp_path: Path) -> None:
    model = tiny_gpt(tiny_config(vocab_size=267))

    with pytest.raises(CheckpointError) as caught:
        save(model, tmp_path / "a", tokenizer=byte_pair_tokenizer())

    expected = "The tokenizer has 268 ids and the model only 267; they do not belong together."
    assert str(caught.value) == expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "dtype", "shown"),
    [(float("nan"), None, "float32"), (7e4, torch.float16, "float16")],
)
def test_a_model_that_is_not_finite_is_not_saved(
    value: float, dtype: torch.dtype | None, shown: str, tmp_path: Path
) -> None:
    model = tiny_gpt()
    model.ln_f.bias.data[3] = value

    with pytest.raises(CheckpointError) as caught:
        save(model, tmp_path / "a", tokenizer=None, dtype=dtype)

    assert str(caught.value) == f"The tensor ln_f.bias is not finite in {shown}; not saved."
    assert list(tmp_path.iterdir()) == []


def test_a_precision_that_checkpoints_do_not_hold_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="hold float32, float16 or bfloat16, not float64"):
        save(tiny_gpt().double(), tmp_path / "a", tokenizer=None)


# Memory

GROWTH = """
import sys
from pathlib import Path
import torch
from weights.checkpoint import load

def peak():  # of this process: getrusage would count its parent's as well
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

torch.set_num_threads(1)
load(Path(sys.argv[1]), dtype=getattr(torch, sys.argv[3]))  # brings in the code it takes
before = peak()
model = load(Path(sys.argv[2]), dtype=getattr(torch, sys.argv[3]))
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("on_disk", "loaded"),
    [(torch.float32, "float32"), (torch.bfloat16, "float32"), (torch.float32, "bfloat16")],
)
def test_loading_takes_at_most_a_fifth_more_than_the_model(
    on_disk: torch.dtype, loaded: str, tmp_path: Path
) -> None:
    save(tiny_gpt(tiny_config(n_embd=64)), tmp_path / "tiny", tokenizer=None, dtype=on_disk)
    # 60 MB in float32, most of them to be transposed; the head is stored twice.
    model = GPT(GPTConfig(n_layer=4, n_head=8, n_embd=512, n_ctx=64, vocab_size=4000))
    save(model, tmp_path / "a", tokenizer=None, dtype=on_disk)
    change(tmp_path / "a", {"lm_head.weight": model.wte.weight.detach().to(on_disk)})

    script = subprocess.run(
        [sys.executable, "-c", GROWTH, tmp_path / "tiny", tmp_path / "a", loaded],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )

    assert 0.9 < float(script.stdout) < 1.2, script.stdout


def test_blocks_read_late_are_those_of_the_checkpoint(checkpoint: Path) -> None:
    layout = read_layout(checkpoint)
    whole = load_layout(layout, device="cpu", dtype=torch.float32)

    late = load_layout(layout, device="cpu", dtype=torch.float32, reads_blocks_late=True)

    assert not late.wte.weight.is_meta
    assert all(parameter.is_meta for parameter in late.h[0].parameters())
    for layer, block in enumerate(late.h):
        assert block is late.h[layer]
        for ours, theirs in zip(block.parameters(), whole.h[layer].parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert layer + 1 == len(late.h) or next(late.h[layer + 1].parameters()).is_meta
        late.h[layer] = torch.nn.Identity()
    assert len(list(late.h)) == len(whole.h)  # and nothing is read for what is no block any more


def test_blocks_read_late_may_have_their_layers_replaced(checkpoint: Path) -> None:
    late = load_layout(
        read_layout(checkpoint), device="cpu", dtype=torch.float32, reads_blocks_late=True
    )
    for block in late.h:
        assert isinstance(block, Block)
        setattr(block.attn, "c_attn", torch.nn.Identity())  # noqa: B010  it is typed otherwise

    replaced = [block.get_submodule("attn.c_attn") for block in late.h]
    assert all(isinstance(module, torch.nn.Identity) for module in replaced)


def test_what_is_wrong_with_a_block_is_said_when_it_is_read(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model")
    late = load_layout(
        read_layout(tmp_path / "model"), device="cpu", dtype=torch.float32, reads_blocks_late=True
    )

    (tmp_path / "model" / "model.safetensors").unlink()

    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        list(late.h)
