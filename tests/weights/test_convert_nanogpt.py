import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import CausalAttention
from model.tokenizer import BytePairTokenizer, load_tokenizer
from model.vocabulary import byte_alphabet
from tests.weights.nanogpt_model import NanoGPT, nanogpt_checkpoint, write_meta
from weights.checkpoint import load
from weights.convert.conversion import convert
from weights.errors import CheckpointError
from weights.layout import read_layout, read_tokenizer

CHARACTERS = "\n !'-abcdefghijklmnopqrstuvwxyzäöß→😀"


def byte_pair_tokenizer() -> BytePairTokenizer:
    """256 bytes, three merges, an end of text: 260 ids."""
    letters = sorted(byte_alphabet(), key=byte_alphabet().__getitem__)
    merges = [("a", "b"), ("ab", "c"), ("Ġ", "a")]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    vocabulary |= {left + right: 256 + i for i, (left, right) in enumerate(merges)}
    return BytePairTokenizer.from_merges(vocabulary, merges, {"<|endoftext|>": 259})


def assert_same_logits(directory: Path, tokens: Tensor, expected: Tensor) -> None:
    model = load(directory)
    with torch.no_grad():
        hidden = model(tokens, torch.arange(len(tokens)), CausalAttention(model.config))
        logits = model.logits(hidden)
    # Both sides compute in float32, in different orders.
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def save(content: dict[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_converted_character_model_computes_what_nanogpt_computed(
    tmp_path: Path, bias: bool, prefix: str
) -> None:
    source = NanoGPT(vocab_size=len(CHARACTERS), bias=bias)
    path = save(nanogpt_checkpoint(source, prefix=prefix), tmp_path / "out" / "ckpt.pt")
    write_meta(tmp_path / "out" / "meta.pkl", CHARACTERS)
    tokens = torch.tensor([5, 9, 0, 30, 2, 34, 17])

    convert(path, tmp_path / "ours")

    assert_same_logits(tmp_path / "ours", tokens, source(tokens))
    assert read_layout(tmp_path / "ours").config.bias is bias


@pytest.mark.parametrize("bias", [True, False])
def test_padded_bpe_model_is_cut_to_its_tokenizer(tmp_path: Path, bias: bool) -> None:
    source = NanoGPT(vocab_size=320, bias=bias, n_head=4)
    path = save(nanogpt_checkpoint(source, dataset="openwebtext"), tmp_path / "ckpt.pt")
    (tmp_path / "bpe").mkdir()
    byte_pair_tokenizer().write(tmp_path / "bpe")
    tokens = torch.tensor([257, 4, 259, 0, 258, 7])

    report = convert(path, tmp_path / "ours", tokenizer_directory=tmp_path / "bpe")

    expected = source(tokens)[:, :260]
    assert_same_logits(tmp_path / "ours", tokens, expected)
    layout = read_layout(tmp_path / "ours")
    assert layout.config.vocab_size == 260
    assert read_tokenizer(layout).fingerprint == byte_pair_tokenizer().fingerprint
    assert layout.eos_token_ids == (259,)
    assert "cut the vocabulary's padding: 320 rows to the tokenizer's 260" in report.changed


def test_characters_are_found_where_nanogpt_keeps_them(tmp_path: Path) -> None:
    source = NanoGPT(vocab_size=len(CHARACTERS))
    content = nanogpt_checkpoint(source, dataset="fairy_tales")
    path = save(content, tmp_path / "nanoGPT" / "out-fairy" / "ckpt.pt")
    meta = tmp_path / "nanoGPT" / "data" / "fairy_tales" / "meta.pkl"
    write_meta(meta, CHARACTERS)

    report = convert(path, tmp_path / "ours")

    tokenizer = load_tokenizer(tmp_path / "ours")
    assert tokenizer.decode(tokenizer.encode("süß → 😀".replace("ü", "ä"))) == "säß → 😀"
    assert tokenizer.encode("\n") == [0]
    assert any(str(meta) in line for line in report.found)


@pytest.mark.parametrize("dataset", ["../private", "/private"])
def test_checkpoint_cannot_point_outside_of_the_data(tmp_path: Path, dataset: str) -> None:
    dataset = dataset if dataset.startswith(".") else str(tmp_path / "private")
    content = nanogpt_checkpoint(NanoGPT(vocab_size=len(CHARACTERS)), dataset=dataset)
    path = save(content, tmp_path / "out" / "ckpt.pt")
    (tmp_path / "data").mkdir()
    write_meta(tmp_path / "private" / "meta.pkl", CHARACTERS)

    with pytest.raises(CheckpointError, match="No tokenizer was found"):
        convert(path, tmp_path / "ours")


def test_characters_of_another_model_are_passed_over(tmp_path: Path) -> None:
    path = save(nanogpt_checkpoint(NanoGPT(vocab_size=320)), tmp_path / "ckpt.pt")
    write_meta(tmp_path / "meta.pkl", CHARACTERS)
    byte_pair_tokenizer().write(tmp_path)

    report = convert(path, tmp_path / "ours")

    assert load_tokenizer(tmp_path / "ours").vocab_size == 260
    assert any("passed over" in line and "meta.pkl" in line for line in report.changed)


def test_report_tells_everything_that_was_found_and_changed(tmp_path: Path) -> None:
    model = NanoGPT(vocab_size=len(CHARACTERS), bias=False, mask=True)
    path = save(nanogpt_checkpoint(model, prefix="_orig_mod."), tmp_path / "ckpt.pt")
    write_meta(tmp_path / "meta.pkl", CHARACTERS)

    report = convert(path, tmp_path / "ours", dtype=torch.bfloat16)

    found, changed = "\n".join(report.found), "\n".join(report.changed)
    assert "step 2000, best validation loss 1.4697" in found
    assert "2 layers, 2 heads, 8 wide, context 16, vocabulary 36, no biases, gelu" in found
    assert "36 ids" in found
    assert "prefix" in changed
    assert "dropped 2 stored causal masks" in changed
    assert "dropped lm_head.weight, which equals wte.weight" in changed
    assert "optimizer" in changed
    assert "block_size is called n_ctx" in changed
    assert "converted float32 to bfloat16" in changed
    assert read_layout(tmp_path / "ours").dtypes == ["BF16"]
    assert {line.split(" ")[0] for line in report.written} == set(os.listdir(tmp_path / "ours"))


def test_checkpoint_older_than_the_bias_option_computes_the_old_gelu(tmp_path: Path) -> None:
    source = NanoGPT(vocab_size=len(CHARACTERS), tanh=True)
    content = nanogpt_checkpoint(source)
    del content["model_args"]["bias"]
    path = save(content, tmp_path / "ckpt.pt")
    write_meta(tmp_path / "meta.pkl", CHARACTERS)
    tokens = torch.arange(10)

    convert(path, tmp_path / "ours")

    assert_same_logits(tmp_path / "ours", tokens, source(tokens))


def test_activation_can_be_named_by_who_knows_better(tmp_path: Path) -> None:
    source = NanoGPT(vocab_size=len(CHARACTERS), tanh=True)
    path = save(nanogpt_checkpoint(source), tmp_path / "ckpt.pt")
    write_meta(tmp_path / "meta.pkl", CHARACTERS)
    tokens = torch.arange(10)

    convert(path, tmp_path / "ours", activation="gelu_new")

    assert_same_logits(tmp_path / "ours", tokens, source(tokens))


def test_directory_with_one_checkpoint_is_as_good_as_the_file(tmp_path: Path) -> None:
    source = NanoGPT(vocab_size=len(CHARACTERS))
    save(nanogpt_checkpoint(source), tmp_path / "out" / "ckpt.pt")
    write_meta(tmp_path / "out" / "meta.pkl", CHARACTERS)
    tokens = torch.arange(10)

    convert(tmp_path / "out", tmp_path / "ours")

    assert_same_logits(tmp_path / "ours", tokens, source(tokens))


def test_checkpoint_of_an_old_torch_is_read_too(tmp_path: Path) -> None:
    source = NanoGPT(vocab_size=len(CHARACTERS))
    path = tmp_path / "ckpt.pt"
    torch.save(nanogpt_checkpoint(source), path, _use_new_zipfile_serialization=False)
    write_meta(tmp_path / "meta.pkl", CHARACTERS)
    tokens = torch.arange(10)

    convert(path, tmp_path / "ours")

    assert_same_logits(tmp_path / "ours", tokens, source(tokens))


def test_without_a_tokenizer_only_on_request(tmp_path: Path) -> None:
    source = NanoGPT(vocab_size=320)
    path = save(nanogpt_checkpoint(source), tmp_path / "ckpt.pt")
    tokens = torch.arange(10)

    with pytest.raises(CheckpointError, match=r"No tokenizer was found.*--no-tokenizer"):
        convert(path, tmp_path / "refused")
    report = convert(path, tmp_path / "ours", without_tokenizer=True)

    assert_same_logits(tmp_path / "ours", tokens, source(tokens))
    assert "no tokenizer: put its files beside the weights before you serve them" in report.changed
    assert sorted(os.listdir(tmp_path / "ours")) == ["config.json", "model.safetensors"]
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("vocab_size", "advice"),
    [(50304, "--tokenizer-dir"), (50257, "--tokenizer-dir"), (65, "--meta")],
)
def test_missing_tokenizer_is_explained_by_what_the_model_needs(
    tmp_path: Path, vocab_size: int, advice: str
) -> None:
    model = NanoGPT(vocab_size=vocab_size, n_layer=1, n_embd=2, n_head=1)
    path = save(nanogpt_checkpoint(model, dataset="poems"), tmp_path / "out" / "ckpt.pt")

    with pytest.raises(CheckpointError) as refusal:
        convert(path, tmp_path / "ours")

    assert advice in str(refusal.value)
    assert str(tmp_path / "data" / "poems" / "meta.pkl") in str(refusal.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c["model_args"].update(n_layer=3), r"lacks the tensor h\.2\.ln_1\.weight"),
        (lambda c: c["model_args"].update(n_layer=1), r"holds the tensor h\.1\."),
        (lambda c: c["model_args"].update(n_layer=10**9), r"describes a model of \d+ parameters"),
        (lambda c: c["model_args"].update(n_embd=16), r"wte\.weight should have shape \[36, 16\]"),
        (lambda c: c["model_args"].update(n_head=3), "multiple of n_head"),
        (lambda c: c["model_args"].update(n_head=True), "n_head as a whole number"),
        (lambda c: c["model_args"].update(bias=False), "without biases does not have"),
        (lambda c: c["model_args"].update(n_kv_heads=2), "n_kv_heads.*fork"),
        (lambda c: c["model_args"].pop("block_size"), "block_size as a whole number"),
        (lambda c: c.update(model=[1, 2]), "must be dicts"),
        (lambda c: c["model"].update({"transformer.wpe.weight": 5}), "holds a int under"),
        (lambda c: c["model"].update({"_orig_mod.transformer.wpe.weight": torch.zeros(16, 8)}),
         "twice"),
        (lambda c: c["model"].update({"lm_head.weight": torch.zeros(36, 8)}), "tied"),
        (lambda c: c["model"].update({"transformer.ln_f.weight": torch.ones(8).int()}),
         r"ln_f\.weight is a torch\.int32"),
        (lambda c: c["model"].update({"transformer.ln_f.weight": torch.eye(8).to_sparse()}),
         r"sparse"),
        (lambda c: c["model"].update({"transformer.ln_f.weight": torch.full((8,), torch.nan)}),
         r"ln_f\.weight is not finite"),
        (lambda c: c["model"].update({"x": torch.zeros(1).expand(10**6, 10**6)}), "tensors claim"),
    ],
)  # fmt: skip
def test_checkpoint_that_contradicts_itself_is_refused_by_name(
    tmp_path: Path, damage: Any, message: str
) -> None:
    content = nanogpt_checkpoint(NanoGPT(vocab_size=len(CHARACTERS)))
    damage(content)
    path = save(content, tmp_path / "ckpt.pt")
    write_meta(tmp_path / "meta.pkl", CHARACTERS)

    with pytest.raises(CheckpointError, match=message):
        convert(path, tmp_path / "ours")

    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "meta.pkl"]


def test_meta_file_of_another_size_is_refused_when_named(tmp_path: Path) -> None:
    path = save(nanogpt_checkpoint(NanoGPT(vocab_size=65)), tmp_path / "ckpt.pt")
    write_meta(tmp_path / "other.pkl", CHARACTERS)

    with pytest.raises(CheckpointError, match=r"other\.pkl has 36 ids .* 65 rows .* not belong"):
        convert(path, tmp_path / "ours", meta=tmp_path / "other.pkl")

    assert not (tmp_path / "ours").exists()


def test_values_beyond_float16_are_refused_with_the_tensor(tmp_path: Path) -> None:
    model = NanoGPT(vocab_size=len(CHARACTERS))
    with torch.no_grad():
        model.get_parameter("transformer.wpe.weight")[3, 2] = 1e5
    path = save(nanogpt_checkpoint(model), tmp_path / "ckpt.pt")
    write_meta(tmp_path / "meta.pkl", CHARACTERS)

    with pytest.raises(CheckpointError, match=r"wpe\.weight is not finite in float16"):
        convert(path, tmp_path / "ours", dtype=torch.float16)

    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "meta.pkl"]


class Saboteur:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.canary}'",)


@pytest.mark.parametrize("is_archive", [True, False])
def test_checkpoint_that_would_run_code_is_refused_unrun(tmp_path: Path, is_archive: bool) -> None:
    content = nanogpt_checkpoint(NanoGPT(vocab_size=len(CHARACTERS)))
    content["config"]["note"] = Saboteur(tmp_path / "canary")
    path = tmp_path / "ckpt.pt"
    torch.save(content, path, _use_new_zipfile_serialization=is_archive)

    with pytest.raises(CheckpointError, match=r"asks for \w+\.system\. It was not executed"):
        convert(path, tmp_path / "ours", without_tokenizer=True)

    assert os.listdir(tmp_path) == ["ckpt.pt"]


def test_bare_pickle_that_would_run_code_is_refused_unrun(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    path.write_bytes(pickle.dumps({"model": Saboteur(tmp_path / "canary")}))

    with pytest.raises(CheckpointError, match=r"is a pickle, .* it was not executed"):
        convert(path, tmp_path / "ours", without_tokenizer=True)

    assert os.listdir(tmp_path) == ["ckpt.pt"]


def test_sabotaged_meta_file_stops_the_conversion_unrun(tmp_path: Path) -> None:
    path = save(nanogpt_checkpoint(NanoGPT(vocab_size=len(CHARACTERS))), tmp_path / "ckpt.pt")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": Saboteur(tmp_path / "canary")}))

    with pytest.raises(CheckpointError, match=r"meta\.pkl.*asks for \w+\.system\. It was not"):
        convert(path, tmp_path / "ours")

    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "meta.pkl"]


def test_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = save(nanogpt_checkpoint(NanoGPT(vocab_size=65)), tmp_path / "ckpt.pt")
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)

    with pytest.raises(
        CheckpointError, match=r"holds a compressed or encrypted entry, .*data\.pkl"
    ):
        convert(path, tmp_path / "ours", without_tokenizer=True)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("is_archive", [True, False])
def test_checkpoint_cut_off_anywhere_is_refused(
    tmp_path: Path, fraction: float, is_archive: bool
) -> None:
    path = tmp_path / "ckpt.pt"
    content = nanogpt_checkpoint(NanoGPT(vocab_size=len(CHARACTERS)))
    torch.save(content, path, _use_new_zipfile_serialization=is_archive)
    path.write_bytes(path.read_bytes()[: int(fraction * path.stat().st_size)])

    with pytest.raises(CheckpointError, match=r"ckpt\.pt"):
        convert(path, tmp_path / "ours", without_tokenizer=True)

    assert os.listdir(tmp_path) == ["ckpt.pt"]
