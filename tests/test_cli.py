import hashlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvik.command_line import app
from model.generate import generate
from model.gpt import GPT
from model.score import log_likelihood
from model.tokenizer import BytePairTokenizer, CharacterTokenizer
from tests.byte_pairs import byte_pair_tokenizer
from tests.json_documents import write_json
from tests.tiny_models import gpt_with_outliers, tiny_checkpoint, tiny_config, tiny_gpt
from weights.checkpoint import save

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run without the KVIK_* variables of whoever runs the tests, in 80 columns."""
    for name in [name for name in os.environ if name.startswith("KVIK_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")


def kvik(*arguments: str | Path, **variables: str) -> Any:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments], env=variables)


def run(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[Any]:
    """Run a command as its user would, in a process of its own."""
    command = [sys.executable, "-m", "kvik", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, **options)


def refusal(*arguments: str | Path, **variables: str) -> str:
    """The sentence with which a command refuses."""
    result = kvik(*arguments, **variables)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert isinstance(result.exception, SystemExit)
    prefix, _, message = result.stderr.removesuffix("\n").partition(": ")
    assert prefix == "error"
    assert "\n" not in message
    return str(message)


# The environment


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("KVIK_MAX_NUM_SEQUENCE", "did you mean KVIK_MAX_NUM_SEQUENCES?"),
        ("KVIK_QUIET", "docs/configuration.md has them all."),
    ],
)
def test_a_variable_of_no_option_is_named(checkpoint: Path, name: str, remedy: str) -> None:
    result = kvik("inspect", checkpoint, **{name: "3"})

    assert result.exit_code == 0
    assert result.stderr == f"warning: {name} is no option's variable, and is ignored: {remedy}\n"


@pytest.mark.parametrize(
    "name",
    [
        "KVIK_BENCH_TOP_P",
        "KVIK_TRAIN_SEED",
        "KVIK_API_SERVICE_HOST",
        "KVIK_SERVICE_PORT_HTTP",
        "KVIK_API_PORT",
        "KVIK_PORT_8000_TCP_ADDR",
    ],
)
def test_variables_of_others_are_nothing_to_warn_of(checkpoint: Path, name: str) -> None:
    assert kvik("inspect", checkpoint, **{name: "3"}).stderr == ""


# inspect


def test_inspect_shows_what_a_checkpoint_holds(checkpoint: Path) -> None:
    result = kvik("inspect", checkpoint)

    assert result.exit_code == 0
    for line in (
        "parameters            11,328",
        "layers, heads, width  2, 2, 16",
        "MLP width             64 (gelu_new)",
        "context               16 tokens",
        "vocabulary            280 rows",
        "biases                yes",
        "tokenizer             byte-level BPE, 268 ids",
        "bos, eos              267, [267]",
        "dtype on disk         F32",
    ):
        assert line in result.stdout.splitlines()


def test_inspect_shows_the_whole_sha256_of_every_file(tmp_path: Path) -> None:
    save(tiny_gpt(), tmp_path / "a", tokenizer=None, max_shard_bytes=20_000)

    lines = kvik("inspect", tmp_path / "a").stdout.splitlines()

    files = sorted((tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        assert f"  sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}" in lines


def test_inspect_fits_into_80_columns(checkpoint: Path) -> None:
    assert max(map(len, kvik("inspect", checkpoint).stdout.splitlines())) <= 80


def test_inspect_shows_the_memory_ledger(checkpoint: Path) -> None:
    lines = [" ".join(line.split()) for line in kvik("inspect", checkpoint).stdout.splitlines()]

    # 11,328 values of 4 bytes, and 280 by 16 of them again for the head; keys and values of two
    # layers, 16 wide; 16 tokens of them.
    assert lines[-4].startswith("float32 63.23 kB 256 bytes 4.10 kB")
    assert lines[-3].startswith("bfloat16 31.62 kB 128 bytes 2.05 kB")
    assert lines[-2].startswith("int8 20.99 kB 128 bytes 2.05 kB")
    # A byte a value, and a scale of 4 bytes a head.
    assert lines[-1].startswith("int8 cache 31.62 kB 96 bytes 1.54 kB")


def test_inspect_says_what_is_wrong_with_a_tokenizer_and_goes_on(tmp_path: Path) -> None:
    save(tiny_gpt(), tmp_path / "a", tokenizer=None)

    result = kvik("inspect", tmp_path / "a")

    assert result.exit_code == 0
    assert f"tokenizer             unusable: {tmp_path / 'a'} holds no tokenizer" in result.stdout


def test_inspect_loads_no_torch(checkpoint: Path) -> None:
    program = (
        "import sys; from typer.testing import CliRunner; from kvik.command_line import app\n"
        f"result = CliRunner().invoke(app, ['inspect', {str(checkpoint)!r}])\n"
        "print(result.exit_code, 'torch' in sys.modules)"
    )

    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert result.stdout == "0 False\n"


def test_inspect_refuses_in_a_sentence(tmp_path: Path) -> None:
    assert refusal("inspect", tmp_path / "nowhere") == (
        f"{tmp_path / 'nowhere'} is not a directory; a checkpoint is a directory with config.json "
        "and model.safetensors."
    )


def test_what_a_file_says_gives_no_orders_to_the_terminal(tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint(tmp_path / "good"), tmp_path / "a")
    write_json(tmp_path / "a" / "config.json", {"model_type": "\x1b[31mred\ud800[bold]"})

    message = refusal("inspect", tmp_path / "a")

    assert r"has model_type '\x1b[31mred\ud800[bold]'; only 'gpt2' is supported." in message


# score

TEXT = "The then and the thing; on and on.\n\nCafé! " * 3


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8", newline="")
    return tmp_path / "text.txt"


def test_score_shows_loss_perplexity_and_bits_per_byte(
    text: Path, checkpoint: Path, model: GPT, tokenizer: BytePairTokenizer
) -> None:
    result = kvik("score", text, "--model", checkpoint)

    ids = tokenizer.encode(TEXT)
    total, _ = log_likelihood(model, ids, bos_token_id=267, vocab_size=268)
    assert result.stdout.splitlines() == [
        f"tokens scored    {len(ids)} of {len(ids)}",
        f"loss             {-total / len(ids):.4f} nats a token",
        f"perplexity       {math.exp(-total / len(ids)):.3f}",
        f"bits per byte    {-total / math.log(2) / len(TEXT.encode()):.4f}",
    ]


def test_score_without_a_bos_leaves_the_first_token_out(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("éabba", encoding="utf-8")
    model = tiny_gpt(tiny_config(vocab_size=3))
    save(model, tmp_path / "a", tokenizer=CharacterTokenizer("abé"))

    lines = kvik("score", tmp_path / "text.txt", "-m", tmp_path / "a").stdout.splitlines()

    total, _ = log_likelihood(model, [2, 0, 1, 1, 0], bos_token_id=None, vocab_size=3)
    assert lines[0] == "tokens scored    4 of 5"
    assert lines[3] == f"bits per byte    {-total / math.log(2) / 4:.4f}"


def test_score_computes_in_the_precision_asked_for(text: Path, checkpoint: Path) -> None:
    outputs = {
        dtype: kvik("score", text, "--model", checkpoint, "--dtype", dtype).stdout
        for dtype in ("auto", "float32", "bfloat16")
    }

    assert outputs["auto"] == outputs["float32"] != outputs["bfloat16"]


def test_options_may_come_from_the_environment(text: Path, checkpoint: Path) -> None:
    asked = kvik("score", text, "--model", checkpoint, "--dtype", "bfloat16").stdout

    set_outside = kvik("score", text, KVIK_MODEL=str(checkpoint), KVIK_DTYPE="bfloat16").stdout

    assert set_outside == asked


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ab\xff", "is not UTF-8 text: byte 2 does not fit."),
        (b"", ": The text is too short: there is no token to score."),
    ],
)
def test_score_refuses_a_file_without_text(
    content: bytes, message: str, tmp_path: Path, checkpoint: Path
) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content)

    separator = "" if message.startswith(":") else " "
    assert refusal("score", file, "--model", checkpoint) == f"{file}{separator}{message}"


@pytest.mark.parametrize(
    ("name", "reason"), [("nowhere", "No such file or directory"), (".", "Is a directory")]
)
def test_score_refuses_what_it_cannot_read(
    name: str, reason: str, tmp_path: Path, checkpoint: Path
) -> None:
    file = tmp_path / name

    assert refusal("score", file, "--model", checkpoint) == f"{file} cannot be read: {reason}."


def test_score_shows_a_character_that_the_model_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("ab\u202ec", encoding="utf-8")
    save(tiny_gpt(tiny_config(vocab_size=3)), tmp_path / "a", tokenizer=CharacterTokenizer("abc"))

    message = refusal("score", tmp_path / "text.txt", "--model", tmp_path / "a")

    assert message == (
        r"The character '\u202e' (U+202E) at position 2 is not in this model's vocabulary of "
        "3 characters."
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--dtype", "int3", "--dtype must be one of auto, float32, bfloat16, got 'int3'."),
        ("--device", "tpu", "--device must be auto, cpu, cuda or cuda:N, got 'tpu'."),
        ("--device", "meta", "--device must be auto, cpu, cuda or cuda:N, got 'meta'."),
        ("--device", "cuda:99",
         "--device cuda:99: there is no such CUDA device here; use --device cpu."),
    ],
)  # fmt: skip
def test_score_refuses_what_it_cannot_compute_with(
    option: str, value: str, message: str, text: Path, checkpoint: Path
) -> None:
    assert refusal("score", text, "--model", checkpoint, option, value) == message


# generate


def greedy_text(model: GPT, prompt: str, num_tokens: int) -> str:
    tokenizer = byte_pair_tokenizer()
    ids = tokenizer.encode(prompt) or [267]
    continuation = generate(model, ids, num_tokens, vocab_size=268, stop_token_ids=[267])
    return prompt + tokenizer.decode(i for i in continuation if i != 267) + "\n"


@pytest.mark.parametrize("prompt", ["The", "Café", ""])
def test_generate_streams_the_prompt_and_its_greedy_continuation(
    prompt: str, checkpoint: Path, model: GPT
) -> None:
    result = kvik("generate", prompt, "-m", checkpoint, "--temperature", "0", "--max-tokens", "9",
                  "--dtype", "float32")  # fmt: skip

    assert result.exit_code == 0, result.stderr
    assert result.stdout == greedy_text(model, prompt, 9)


def test_generate_survives_outliers_in_float32(tmp_path: Path) -> None:
    model = gpt_with_outliers()
    tiny_checkpoint(tmp_path / "a", model=model)

    result = kvik("generate", "on", "-m", tmp_path / "a", "--temperature", "0", "--dtype",
                  "float32")  # fmt: skip

    assert result.stdout == greedy_text(model, "on", 100)


def test_generate_says_the_seed_that_repeats_the_text(checkpoint: Path) -> None:
    first = kvik("generate", "The", "-m", checkpoint, "--temperature", "2")
    seed = re.search(r"(\d+) tokens, \d+ tokens/s, seed (\d+)", first.stderr)

    assert seed is not None
    again = kvik("generate", "The", "-m", checkpoint, "--temperature", "2", "--seed", seed[2])
    assert again.stdout == first.stdout


def test_generate_says_that_the_context_ended_the_text(checkpoint: Path) -> None:
    whole = kvik("generate", "The", "-m", checkpoint, "--max-tokens", "1000")
    part = kvik("generate", "The", "-m", checkpoint, "--max-tokens", "3")

    assert re.search(r"and the context of \d+ is full\n", whole.stderr)
    assert "context" not in part.stderr


def test_generate_without_a_prompt_needs_a_token_to_start_from(tmp_path: Path) -> None:
    save(tiny_gpt(tiny_config(vocab_size=3)), tmp_path / "a", tokenizer=CharacterTokenizer("abc"))

    message = refusal("generate", "--model", tmp_path / "a")

    assert message == "The prompt is empty, and this model has no token to start from."


@pytest.mark.parametrize("length", [16, 17, 300])
def test_generate_refuses_a_prompt_that_leaves_no_room(length: int, checkpoint: Path) -> None:
    message = refusal("generate", "x" * length, "--model", checkpoint)

    assert message == (
        f"The prompt has {length} tokens; this model's context is 16, and the completion needs "
        "room in it too."
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--repetition-penalty", "0"),
        ("--seed", "9" * 30),
        ("--device", "tpu"),
        ("--dtype", "int3"),
    ],
)
def test_generate_refuses_an_impossible_option_by_its_name(
    option: str, value: str, checkpoint: Path
) -> None:
    message = refusal("generate", "The", "--model", checkpoint, option, value)

    assert message.startswith(f"{option} must ")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--temperature", "nan"), ("--temperature", "2.5"), ("--top-p", "-1"), ("--max-tokens", "0")],
)
def test_generate_refuses_an_option_out_of_its_range(
    option: str, value: str, checkpoint: Path
) -> None:
    result = kvik("generate", "The", "--model", checkpoint, option, value)

    assert result.exit_code == 2
    assert option in result.stderr


def test_generate_refuses_a_model_that_is_not_there(tmp_path: Path) -> None:
    message = refusal("generate", "The", "--model", tmp_path / "nowhere")

    assert str(tmp_path / "nowhere") in message


# What every command says


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("prepare", "a.txt", "--out", "out", "--tokenizer", "bpe"),
            "--tokenizer must be gpt2, char or bpe:N such as bpe:2048, got 'bpe'",
        ),
        (
            ("prepare", "a.txt", "--out", "out", "--tokenizer", "char", "--val-fraction", "1"),
            "--val-fraction must lie between 0 and 1, got 1.0",
        ),
        (
            ("bench", "serve", "http://x", "--num-requests", "0"),
            "--num-requests must be at least 1, got 0",
        ),
    ],
)
def test_an_option_is_refused_by_the_name_that_was_typed(
    arguments: tuple[str, ...], message: str
) -> None:
    assert refusal(*arguments) == message


def test_a_file_that_is_called_like_an_option_keeps_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "val_fraction.txt").write_text("")

    assert refusal("prepare", "x", "--out", "out", "--tokenizer", "char").startswith("out exists")
    assert refusal("prepare", "val_fraction.txt", "--out", "new", "--tokenizer", "char") == (
        "val_fraction.txt has no text in it."
    )


# As a user runs it


def test_a_refusal_on_the_terminal_is_a_sentence_and_no_traceback(tmp_path: Path) -> None:
    result = run("score", tmp_path / "nowhere", text=True)

    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == (
        f"error: {tmp_path / 'nowhere'} cannot be read: No such file or directory.\n"
    )


def test_a_prompt_that_is_no_utf8_is_refused(checkpoint: Path) -> None:
    prompt = os.fsdecode(b"a\xffb")  # as Python shows such an argument; subprocess turns it back

    result = run("generate", prompt, "-m", checkpoint)

    assert result.returncode == 1
    assert result.stderr.decode() == (
        "error: The text has half of a surrogate pair (U+DCFF) at character 1: it is not valid "
        "Unicode.\n"
    )


def test_a_directory_whose_name_is_no_utf8_is_refused_by_that_name(tmp_path: Path) -> None:
    result = run("inspect", tmp_path / os.fsdecode(b"a\xff"))

    assert result.returncode == 1
    assert result.stderr.decode().startswith(rf"error: {tmp_path}/a\udcff is not a directory")


# train


def test_a_variable_of_training_that_sets_no_key_is_refused_by_its_name(tmp_path: Path) -> None:
    message = refusal("train", "--out", tmp_path / "run", "--data", tmp_path,
                      KVIK_TRAIN_SEED="1", KVIK_TRAIN_LEARNINGRATE="0.1")  # fmt: skip

    assert message.startswith("KVIK_TRAIN_LEARNINGRATE is no key of a training run; did you mean ")


# bench decode


def test_a_batch_of_any_size_is_measured_at_once(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "tiny", model=tiny_gpt(tiny_config(n_ctx=64)))

    result = kvik(
        "bench", "decode", "--model", tmp_path / "tiny", "--num-sequences", "300",
        "--prompt-tokens", "1", "--new-tokens", "12",
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    assert re.search(r"300 │ +[\d,]+ │ +[\d.]+ ms", result.stdout)


def test_a_measurement_of_no_whole_step_is_refused(checkpoint: Path) -> None:
    result = kvik(
        "bench", "decode", "--model", checkpoint, "--num-sequences", "300",
        "--prompt-tokens", "4", "--new-tokens", "2",
    )  # fmt: skip

    assert result.exit_code == 1
    assert "raise --new-tokens, got 2" in result.stderr


def test_what_does_not_fit_into_the_context_is_not_measured(checkpoint: Path) -> None:
    message = refusal(
        "bench", "decode", "--model", checkpoint, "--prompt-tokens", "10", "--new-tokens", "7"
    )

    assert message == (
        "--prompt-tokens and --new-tokens must fit into the context of 16 tokens, got 10 and 7"
    )


@pytest.mark.parametrize("command", ["inspect", "generate", "score"])
def test_every_command_explains_itself(command: str) -> None:
    result = kvik(command, "--help")

    assert result.exit_code == 0
    assert f"Usage: kvik {command}" in result.stdout.replace("root", "kvik")


@pytest.mark.skipif(sys.platform != "linux", reason="a first process of its own is Linux's")
def test_the_first_process_of_a_container_ends_when_told_to(checkpoint: Path) -> None:
    # Its number outside, where the signal comes from: inside it is 1.
    program = (
        "import os, sys; print(os.readlink('/proc/self'), flush=True)\n"
        f"sys.argv = ['kvik', 'generate', 'a', '--model', {str(checkpoint)!r}]\n"
        "from kvik.__main__ import main; main()"
    )
    container = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*container, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")

    with subprocess.Popen(
        [*container, sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        inside = int(process.stdout.readline())
        while process.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(inside, signal.SIGTERM)
            time.sleep(0.02)

    assert process.returncode == 128 + signal.SIGTERM


def test_the_version_is_that_of_the_package() -> None:
    assert re.fullmatch(r"kvik \d+\.\d+\.\d+\n", kvik("--version").stdout)
