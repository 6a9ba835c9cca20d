"""The model that peers run, and the lines they print."""

import shlex
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.contestants import Program
from benchmarks.programs import random_gpt2
from model.tokenizer import load_tokenizer
from weights.checkpoint import load_layout
from weights.layout import read_layout


def test_the_model_is_a_checkpoint_whose_logits_lie_apart(checkpoint: Path, tmp_path: Path) -> None:
    random_gpt2(tmp_path / "gpt2", checkpoint, layers=2, heads=2, width=64)

    layout = read_layout(tmp_path / "gpt2")
    model = load_layout(layout, device=torch.device("cpu"), dtype=torch.float32)
    assert layout.config.vocab_size == load_tokenizer(checkpoint).vocab_size
    assert float(model.state_dict()["h.0.attn.c_attn.weight"].std()) == pytest.approx(0.05, rel=0.1)


def test_a_program_s_lines_are_read_by_whoever_runs_it(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("word " * 100)
    code = (
        "import pathlib, time; from benchmarks.programs import time_prompts; "
        f"time_prompts(pathlib.Path({str(tmp_path / 'text')!r}), "
        "lambda prompts: time.sleep(0.01) or 64 * len(prompts))"
    )

    speeds = Program(name="any", command=shlex.join([sys.executable, "-c", code])).run()

    assert list(speeds) == [1, 8, 32]
    assert 0 < speeds[1] < 6400
