import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from model.attention import CausalAttention
from model.tokenizer import BytePairTokenizer, load_tokenizer
from model.vocabulary import byte_alphabet
from weights.checkpoint import load
from weights.convert.conversion import convert
from weights.errors import CheckpointError
from weights.layout import read_layout

VOCAB_SIZE = 260
TOKENS = torch.tensor([257, 4, 259, 0, 258, 7])


def reference_model(**changes: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        **{
            "n_layer": 2,
            "n_head": 2,
            "n_embd": 8,
            "n_positions": 16,
            "vocab_size": VOCAB_SIZE,
            "bos_token_id": 259,
            "eos_token_id": 259,
            **changes,
        }
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    return model


@pytest.fixture(scope="module")
def reference() -> GPT2LMHeadModel:
    return reference_model()


def write_tokenizer(directory: Path) -> None:
    letters = sorted(byte_alphabet(), key=byte_alphabet().__getitem__)
    merges = [("a", "b"), ("ab", "c"), ("Ġ", "a")]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    vocabulary |= {left + right: 256 + i for i, (left, right) in enumerate(merges)}
    BytePairTokenizer.from_merges(vocabulary, merges, {"<|endoftext|>": 259}).write(directory)


def directory_of(
    model: GPT2LMHeadModel, directory: Path, *, state: dict[str, Tensor] | None = None
) -> Path:
    """A directory as it was published before safetensors."""
    directory.mkdir()
    (directory / "config.json").write_text(model.config.to_json_string())
    torch.save(model.state_dict() if state is None else state, directory / "pytorch_model.bin")
    write_tokenizer(directory)
    return directory


def assert_same_logits(directory: Path, reference: GPT2LMHeadModel) -> None:
    model = load(directory, dtype=torch.float32)
    with torch.no_grad():
        ours = model.logits(model(TOKENS, torch.arange(len(TOKENS)), CausalAttention(model.config)))
        theirs = reference(TOKENS[None]).logits[0, :, : model.config.vocab_size]
    # Both in float32, added up in another order.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def with_masks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As transformers stored models until 2023."""
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    masks |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    return state | masks


def test_pickled_weights_compute_what_they_did(tmp_path: Path, reference: GPT2LMHeadModel) -> None:
    source = directory_of(reference, tmp_path / "theirs")

    report = convert(source, tmp_path / "ours")

    assert_same_logits(tmp_path / "ours", reference)
    assert "dropped lm_head.weight, which equals wte.weight" in report.changed
    assert any("without running anything" in line for line in report.changed)


def test_file_of_weights_stands_for_its_directory(
    tmp_path: Path, reference: GPT2LMHeadModel
) -> None:
    source = directory_of(reference, tmp_path / "theirs")
    (source / "pytorch_model.bin").rename(source / "weights.pt")

    convert(source / "weights.pt", tmp_path / "ours")

    assert_same_logits(tmp_path / "ours", reference)


def test_names_without_prefix_and_stored_masks_are_understood(
    tmp_path: Path, reference: GPT2LMHeadModel
) -> None:
    state = with_masks(reference.state_dict())
    del state["lm_head.weight"]
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    source = directory_of(reference, tmp_path / "theirs", state=bare)

    report = convert(source, tmp_path / "ours")

    assert_same_logits(tmp_path / "ours", reference)
    assert "dropped 4 stored causal masks" in report.changed


def test_weights_of_an_old_torch_are_read_too(tmp_path: Path, reference: GPT2LMHeadModel) -> None:
    source = directory_of(reference, tmp_path / "theirs")
    torch.save(
        reference.state_dict(),
        source / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )

    convert(source, tmp_path / "ours")

    assert_same_logits(tmp_path / "ours", reference)


def shard(source: Path) -> None:
    """Spread a directory's weights over two files with an index."""
    state = torch.load(source / "pytorch_model.bin")
    places = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(state)}
    for file in sorted(set(places.values())):
        torch.save({k: v.clone() for k, v in state.items() if places[k] == file}, source / file)
    index = {"metadata": {}, "weight_map": places}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (source / "pytorch_model.bin").unlink()


def test_weights_in_several_files_are_read(tmp_path: Path, reference: GPT2LMHeadModel) -> None:
    source = directory_of(reference, tmp_path / "theirs")
    shard(source)

    convert(source, tmp_path / "ours")

    assert_same_logits(tmp_path / "ours", reference)


def test_missing_shard_is_named(tmp_path: Path, reference: GPT2LMHeadModel) -> None:
    source = directory_of(reference, tmp_path / "theirs")
    shard(source)
    (source / "pytorch_model-00002-of-00002.bin").unlink()

    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin is missing"):
        convert(source, tmp_path / "ours")


def test_index_cannot_lead_out_of_its_directory(tmp_path: Path, reference: GPT2LMHeadModel) -> None:
    source = directory_of(reference, tmp_path / "theirs")
    shutil.move(source / "pytorch_model.bin", tmp_path / "elsewhere.bin")
    index = {"weight_map": {"wte.weight": "../elsewhere.bin"}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    with pytest.raises(CheckpointError, match=r"no file beside it"):
        convert(source, tmp_path / "ours")


def test_other_settings_of_the_computation_are_carried(tmp_path: Path) -> None:
    reference = reference_model(
        activation_function="relu",
        n_inner=24,
        layer_norm_epsilon=1e-3,
        scale_attn_by_inverse_layer_idx=True,
    )
    source = directory_of(reference, tmp_path / "theirs")

    convert(source, tmp_path / "ours")

    assert_same_logits(tmp_path / "ours", reference)


def test_activation_that_the_config_names_cannot_be_overruled(
    tmp_path: Path, reference: GPT2LMHeadModel
) -> None:
    directory = directory_of(reference, tmp_path / "theirs")

    with pytest.raises(CheckpointError, match=r"computes gelu_new, .* and not gelu: --activation"):
        convert(directory, tmp_path / "ours", activation="gelu")
    convert(directory, tmp_path / "ours", activation="gelu_new")

    assert read_layout(tmp_path / "ours").config.activation == "gelu_new"


@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"])
def test_safetensors_directory_is_saved_again_in_another_precision(
    tmp_path: Path, reference: GPT2LMHeadModel, max_shard_size: str
) -> None:
    reference.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    write_tokenizer(tmp_path / "theirs")

    convert(tmp_path / "theirs", tmp_path / "half", dtype=torch.bfloat16)
    convert(tmp_path / "theirs", tmp_path / "same")

    assert read_layout(tmp_path / "half").dtypes == ["BF16"]
    rounded = {n: p.bfloat16().float() for n, p in load(tmp_path / "same").named_parameters()}
    for name, parameter in load(tmp_path / "half", dtype=torch.float32).named_parameters():
        assert torch.equal(parameter, rounded[name]), name
    assert_same_logits(tmp_path / "same", reference)


def test_own_checkpoint_survives_a_round_trip_byte_for_byte(
    tmp_path: Path, reference: GPT2LMHeadModel
) -> None:
    convert(directory_of(reference, tmp_path / "theirs"), tmp_path / "first")

    convert(tmp_path / "first", tmp_path / "second")

    assert sorted(os.listdir(tmp_path / "first")) == sorted(os.listdir(tmp_path / "second"))
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes(), file.name


def test_tokenizer_files_travel_unchanged(tmp_path: Path, reference: GPT2LMHeadModel) -> None:
    source = directory_of(reference, tmp_path / "theirs")
    (source / "special_tokens_map.json").write_text('{"note": "kept as it is"}')
    (source / "README.md").write_text("not kept")

    convert(source, tmp_path / "ours")

    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "ours" / "README.md").exists()


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        ({"bos_token_id": 3, "eos_token_id": 4}, None),
        ({"bos_token_id": None, "eos_token_id": None}, None),
        ({"bos_token_id": 3, "eos_token_id": 4}, {"eos_token_id": [5, 6]}),
        ({}, None),
    ],
)
def test_bos_and_eos_ids_stay_what_the_directory_says(
    tmp_path: Path,
    reference: GPT2LMHeadModel,
    config: dict[str, Any],
    generation: dict[str, Any] | None,
) -> None:
    reference.save_pretrained(tmp_path / "theirs")
    write_tokenizer(tmp_path / "theirs")
    document = json.loads((tmp_path / "theirs" / "config.json").read_text())
    del document["bos_token_id"], document["eos_token_id"]
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(document | config))
    (tmp_path / "theirs" / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (tmp_path / "theirs" / "generation_config.json").write_text(json.dumps(generation))
    before = read_layout(tmp_path / "theirs")

    convert(tmp_path / "theirs", tmp_path / "ours")

    after = read_layout(tmp_path / "ours")
    assert (after.bos_token_id, after.eos_token_ids) == (before.bos_token_id, before.eos_token_ids)


def test_silence_about_bos_and_eos_still_means_gpt2s(tmp_path: Path) -> None:
    reference = reference_model(vocab_size=50304, n_embd=2, n_layer=1)
    source = directory_of(reference, tmp_path / "theirs")
    document = json.loads((source / "config.json").read_text())
    del document["bos_token_id"], document["eos_token_id"]
    (source / "config.json").write_text(json.dumps(document))

    convert(source, tmp_path / "ours")

    layout = read_layout(tmp_path / "ours")
    assert (layout.bos_token_id, layout.eos_token_ids) == (50256, (50256,))


def test_padding_of_a_directory_is_cut(tmp_path: Path) -> None:
    reference = reference_model(vocab_size=320)
    source = directory_of(reference, tmp_path / "theirs")

    convert(source, tmp_path / "ours")

    assert_same_logits(tmp_path / "ours", reference)
    assert read_layout(tmp_path / "ours").config.vocab_size == VOCAB_SIZE


def test_end_of_text_among_the_padding_is_refused(tmp_path: Path) -> None:
    source = directory_of(reference_model(vocab_size=320, eos_token_id=300), tmp_path / "theirs")

    with pytest.raises(CheckpointError, match=r"theirs would make no usable .* eos_token_id 300"):
        convert(source, tmp_path / "ours")

    assert os.listdir(tmp_path) == ["theirs"]


def test_rows_that_are_no_padding_are_kept(tmp_path: Path) -> None:
    reference = reference_model(vocab_size=265)
    source = directory_of(reference, tmp_path / "theirs")

    report = convert(source, tmp_path / "ours")

    assert_same_logits(tmp_path / "ours", reference)
    assert "kept 265 rows of vocabulary, 5 more than there are ids" in report.changed


def test_another_tokenizer_replaces_that_of_the_directory(
    tmp_path: Path, reference: GPT2LMHeadModel
) -> None:
    source = directory_of(reference, tmp_path / "theirs")
    (source / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": {}}}')
    (tmp_path / "bpe").mkdir()
    write_tokenizer(tmp_path / "bpe")

    with pytest.raises(CheckpointError, match=r"Unigram.*--tokenizer-dir"):
        convert(source, tmp_path / "refused")
    convert(source, tmp_path / "ours", tokenizer_directory=tmp_path / "bpe")

    assert load_tokenizer(tmp_path / "ours").vocab_size == VOCAB_SIZE
    assert read_layout(tmp_path / "ours").eos_token_ids == (259,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("transformer.wpe.weight"), r"lacks the tensor wpe\.weight"),
        (lambda s: s.update({"transformer.extra": torch.ones(1)}), "holds the tensor extra"),
        (lambda s: s.update({"lm_head.weight": torch.ones(VOCAB_SIZE, 8)}), "tied"),
        (lambda s: s.update({"transformer.h.0.mlp.c_fc.weight": torch.ones(32, 8)}),
         r"h\.0\.mlp\.c_fc\.weight should have shape \[32, 8\].*found \[8, 32\]"),
        (lambda s: s.update({"transformer.ln_f.bias": torch.full((8,), torch.inf)}),
         r"ln_f\.bias is not finite"),
    ],
)  # fmt: skip
def test_state_that_does_not_fit_the_config_is_refused(
    tmp_path: Path, reference: GPT2LMHeadModel, change: Any, message: str
) -> None:
    state = dict(reference.state_dict())
    change(state)
    source = directory_of(reference, tmp_path / "theirs", state=state)

    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "ours")

    assert os.listdir(tmp_path) == ["theirs"]


class Saboteur:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.canary}'",)


def test_weights_that_would_run_code_are_refused_unrun(
    tmp_path: Path, reference: GPT2LMHeadModel
) -> None:
    source = directory_of(reference, tmp_path / "theirs")
    torch.save({"wte.weight": Saboteur(tmp_path / "canary")}, source / "pytorch_model.bin")

    with pytest.raises(CheckpointError, match=r"asks for \w+\.system\. It was not executed"):
        convert(source, tmp_path / "ours")

    assert os.listdir(tmp_path) == ["theirs"]


def test_plainly_pickled_weights_are_refused_unrun(
    tmp_path: Path, reference: GPT2LMHeadModel
) -> None:
    source = directory_of(reference, tmp_path / "theirs")
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Saboteur(tmp_path / "canary"), 2))

    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        convert(source, tmp_path / "ours")

    assert os.listdir(tmp_path) == ["theirs"]
