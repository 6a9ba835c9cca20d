"""EleutherAI's lm-evaluation-harness scores a text over HTTP, and finds what `kvik score` finds."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from model.gpt import GPT
from tests.clients.conftest import API_KEY
from tests.server.live import ROOT, LiveServer, environment
from tests.tiny_models import tiny_checkpoint
from weights.checkpoint import load

TEXT = "".join(
    f"{number}. Once upon a time there was a king in the north; “{'no' * (number % 5)}”, he said.\n"
    for number in range(40)
)
TASK = {
    "task": "local_text",
    "dataset_path": "text",
    "output_type": "loglikelihood_rolling",
    "test_split": "test",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    ],
}


def with_shorter_context(checkpoint: Path, directory: Path, n_ctx: int) -> Path:
    """The same weights for fewer positions."""
    model = load(checkpoint)
    shorter = GPT(dataclasses.replace(model.config, n_ctx=n_ctx))
    weights = model.state_dict()
    weights["wpe.weight"] = weights["wpe.weight"][:n_ctx]
    shorter.load_state_dict(weights)
    return tiny_checkpoint(directory, model=shorter)


def bits_per_byte_by_lm_eval(server: LiveServer, checkpoint: Path, directory: Path) -> float:
    task = {
        **TASK,
        "dataset_kwargs": {
            "data_files": {"test": str(directory / "text.txt")}, "sample_by": "document",
        },
    }  # fmt: skip
    (directory / "local_text.yaml").write_text(json.dumps(task))  # JSON is YAML too
    arguments = [
        "model=tiny", f"base_url={server.url}/v1/completions", "tokenizer_backend=huggingface",
        f"tokenizer={checkpoint}", "max_length=256",
    ]  # fmt: skip
    subprocess.run(
        [
            sys.executable, "-m", "lm_eval", "run", "--model", "local-completions",
            "--model_args", ",".join(arguments), "--tasks", "local_text",
            "--include_path", str(directory), "--output_path", str(directory / "results"),
        ],
        capture_output=True, timeout=250, check=True, cwd=directory,
        env={
            **environment(), "OPENAI_API_KEY": API_KEY, "HF_HOME": str(directory / "cache"),
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
        },
    )  # fmt: skip
    (results,) = (directory / "results").rglob("results*.json")
    value = json.loads(results.read_text())["results"]["local_text"]["bits_per_byte,none"]
    return float(value)


def test_lm_eval_agrees_with_kvik_score(
    server: LiveServer, small_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    # Of 256 positions lm-eval leaves one to a token it does not need, and one to the context of
    # the first; `kvik score` uses them all, and so it gets two fewer.
    shorter = with_shorter_context(small_checkpoint, tmp_path / "shorter", 254)

    scored = subprocess.run(
        [
            sys.executable, "-m", "kvik", "score", str(tmp_path / "text.txt"),
            "--model", str(shorter), "--device", "cpu", "--dtype", "float32",
        ],
        capture_output=True, text=True, check=True, cwd=ROOT, env=environment(), timeout=120,
    ).stdout  # fmt: skip

    found = re.search(r"bits per byte +([\d.]+)\n", scored)
    assert found is not None
    num_tokens = re.search(r"tokens scored +([\d,]+) ", scored)
    assert num_tokens is not None
    assert int(num_tokens[1].replace(",", "")) > 3 * 254  # several windows, and one that is short
    by_lm_eval = bits_per_byte_by_lm_eval(server, small_checkpoint, tmp_path)
    assert by_lm_eval == pytest.approx(float(found[1]), abs=1e-4)  # as many digits as are shown
