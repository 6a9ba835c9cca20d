import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from model.attention import CausalAttention
from model.tokenizer import BytePairTokenizer, load_tokenizer
from model.vocabulary import byte_alphabet
from weights.checkpoint import load
from weights.convert.conversion import convert
from weights.convert.llm_c import read_llm_c_tokenizer
from weights.errors import CheckpointError
from weights.layout import read_layout

N_LAYER, N_HEAD, WIDTH, CONTEXT, VOCAB_SIZE, ROWS = 2, 2, 8, 16, 260, 384
TOKENS = torch.tensor([257, 4, 259, 0, 258, 7])


@pytest.fixture(scope="module")
def reference() -> GPT2LMHeadModel:
    """Hugging Face's GPT-2 with weights far from their initial values."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=N_LAYER,
        n_head=N_HEAD,
        n_embd=WIDTH,
        n_positions=CONTEXT,
        vocab_size=VOCAB_SIZE,
        bos_token_id=259,
        eos_token_id=259,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
            parameter.copy_(parameter.bfloat16())  # so that both formats hold the same values
    return model


def model_file(reference: GPT2LMHeadModel, version: int) -> bytes:
    """Lay a model out as llm.c does: a header, then each kind of tensor for all layers."""
    header = np.zeros(256, dtype="<i4")
    header[:8] = 20240326, version, CONTEXT, VOCAB_SIZE, N_LAYER, N_HEAD, WIDTH, ROWS
    state = {k: v.double().numpy() for k, v in reference.transformer.state_dict().items()}
    padding = np.full((ROWS - VOCAB_SIZE, WIDTH), 7.0)
    arrays = [state["wte.weight"], padding, state["wpe.weight"]]
    for kind in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for part in ("weight", "bias"):
            for layer in range(N_LAYER):
                array = state[f"h.{layer}.{kind}.{part}"]
                arrays.append(array.T if array.ndim == 2 else array)
    arrays += [state["ln_f.weight"], state["ln_f.bias"]]
    flat = np.concatenate([array.ravel() for array in arrays]).astype("<f4")
    if version == 5:  # bfloat16 is the upper half of a float32
        return header.tobytes() + (flat.view("<u4") >> 16).astype("<u2").tobytes()
    return header.tobytes() + flat.tobytes()


def byte_pair_tokenizer() -> BytePairTokenizer:
    letters = sorted(byte_alphabet(), key=byte_alphabet().__getitem__)
    merges = [("a", "b"), ("ab", "c"), ("Ġ", "a")]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    vocabulary |= {left + right: 256 + i for i, (left, right) in enumerate(merges)}
    return BytePairTokenizer.from_merges(vocabulary, merges, {"<|endoftext|>": 259})


def tokenizer_file(tokenizer: BytePairTokenizer, *, version: int = 2) -> bytes:
    header = struct.pack("<256i", 20240328, version, tokenizer.vocab_size, 259, *[0] * 252)
    tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    return header + b"".join(bytes([len(token)]) + token for token in tokens)


@pytest.mark.parametrize(("version", "dtype"), [(3, "F32"), (5, "BF16")])
def test_converted_model_computes_what_hugging_face_computes(
    tmp_path: Path, reference: GPT2LMHeadModel, version: int, dtype: str
) -> None:
    (tmp_path / "model.bin").write_bytes(model_file(reference, version))
    (tmp_path / "gpt2_tokenizer.bin").write_bytes(tokenizer_file(byte_pair_tokenizer()))

    report = convert(tmp_path / "model.bin", tmp_path / "ours")

    model = load(tmp_path / "ours", dtype=torch.float32)
    with torch.no_grad():
        ours = model.logits(model(TOKENS, torch.arange(len(TOKENS)), CausalAttention(model.config)))
        theirs = reference(TOKENS[None]).logits[0]
    # The same values in float32, added up in another order.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    layout = read_layout(tmp_path / "ours")
    assert layout.dtypes == [dtype]
    assert layout.config.vocab_size == VOCAB_SIZE
    assert layout.config.activation == "gelu_new"
    assert "cut the embedding's padding, 384 rows to 260" in report.changed


def test_tokenizer_survives_without_its_merges(tmp_path: Path) -> None:
    path = tmp_path / "gpt2_tokenizer.bin"
    path.write_bytes(tokenizer_file(byte_pair_tokenizer()))

    tokenizer = read_llm_c_tokenizer(path)

    assert tokenizer.fingerprint == byte_pair_tokenizer().fingerprint
    text = "abc ab a bcabc über\n"
    assert tokenizer.encode(text) == byte_pair_tokenizer().encode(text)
    assert tokenizer.eos_token_id == 259


def test_tokenizer_is_found_above_the_directory_of_a_run(
    tmp_path: Path, reference: GPT2LMHeadModel
) -> None:
    (tmp_path / "log124M").mkdir()
    (tmp_path / "log124M" / "model_00001000.bin").write_bytes(model_file(reference, 5))
    (tmp_path / "log124M" / "state_00001000.bin").write_bytes(struct.pack("<i", 20240527))
    (tmp_path / "gpt2_tokenizer.bin").write_bytes(tokenizer_file(byte_pair_tokenizer()))

    convert(tmp_path / "log124M", tmp_path / "ours")

    assert load_tokenizer(tmp_path / "ours").fingerprint == byte_pair_tokenizer().fingerprint


def test_tokenizer_directory_may_be_llm_cs(tmp_path: Path, reference: GPT2LMHeadModel) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.bin").write_bytes(model_file(reference, 3))
    (tmp_path / "llm.c").mkdir()
    (tmp_path / "llm.c" / "gpt2_tokenizer.bin").write_bytes(tokenizer_file(byte_pair_tokenizer()))

    convert(tmp_path / "run", tmp_path / "ours", tokenizer_directory=tmp_path / "llm.c")

    assert load_tokenizer(tmp_path / "ours").vocab_size == VOCAB_SIZE


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 20240327, "is llm.c's debug state, not a model"),
        (0, 20240328, "is llm.c's tokenizer, not a model"),
        (0, 12345678, "is of no known kind"),
        (1, 1, "format 1; supported are 3"),
        (1, 5, "by its header it should have"),
        (2, 17, "by its header it should have"),
        (2, 2**31 - 1, "by its header it should have"),
        (3, 385, "384 padded rows for 385 tokens"),
        (4, 2**31 - 1, "by its header it should have"),
        (4, -1, "n_layer must be at least 1"),
        (5, 3, "multiple of n_head"),
        (6, 0, "n_embd must be at least 1"),
        (7, 0, "without padding"),
        (7, -5, "-5 padded rows"),
    ],
)
def test_header_that_does_not_fit_the_file_is_refused(
    tmp_path: Path, reference: GPT2LMHeadModel, place: int, value: int, message: str
) -> None:
    content = bytearray(model_file(reference, 3))
    struct.pack_into("<i", content, 4 * place, value)
    (tmp_path / "model.bin").write_bytes(content)

    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "model.bin", tmp_path / "ours", without_tokenizer=True)

    assert os.listdir(tmp_path) == ["model.bin"]


@pytest.mark.parametrize("change", [-4, -1, 1, 4, 1000])
def test_file_of_the_wrong_length_is_refused(
    tmp_path: Path, reference: GPT2LMHeadModel, change: int
) -> None:
    content = model_file(reference, 3)
    content = content[:change] if change < 0 else content + bytes(change)
    (tmp_path / "model.bin").write_bytes(content)

    with pytest.raises(CheckpointError, match=rf"has {len(content)} bytes; by its header"):
        convert(tmp_path / "model.bin", tmp_path / "ours", without_tokenizer=True)


def test_file_that_ends_in_its_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(struct.pack("<ii", 20240326, 3))

    with pytest.raises(CheckpointError, match=r"has 8 bytes; llm\.c's header alone has 1024"):
        convert(tmp_path / "model.bin", tmp_path / "ours", without_tokenizer=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "cut off, or empty, at token 259"),
        (lambda content: content + b"x", "goes on for 1 bytes after its tokens"),
        (lambda content: content[:100], "not a tokenizer of llm.c's format 2"),
        (lambda content: content[:8] + struct.pack("<i", 2**30) + content[12:],
         "cut off, or empty, at token 260"),
        (lambda content: content[:12] + struct.pack("<i", 5) + content[16:],
         "no two tokens make token 259"),
        (lambda content: content[:12] + struct.pack("<i", 260) + content[16:], "end of text 260"),
        (lambda content: content.replace(b"\x02ab\x03abc", b"\x02xy\x03abc"), "no two tokens make"),
        (lambda content: content.replace(b"\x02ab", b"\x01ab"[:2] + b"\x00"), "cut off, or empty"),
    ],
)  # fmt: skip
def test_damaged_tokenizer_is_refused(tmp_path: Path, damage: object, message: str) -> None:
    assert callable(damage)
    path = tmp_path / "gpt2_tokenizer.bin"
    path.write_bytes(damage(tokenizer_file(byte_pair_tokenizer())))

    with pytest.raises(CheckpointError, match=message):
        read_llm_c_tokenizer(path)
