import os

from engine.config import THREADS_ENVIRONMENT

os.environ.update({**THREADS_ENVIRONMENT, **os.environ})  # before torch is imported

from pathlib import Path

import pytest
import torch

# Before triton is imported: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from model.gpt import GPT
from model.tokenizer import BytePairTokenizer
from tests.byte_pairs import byte_pair_tokenizer
from tests.tiny_models import tiny_checkpoint, tiny_gpt

# Threads wait for each other longer than a model this small computes.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model() -> GPT:
    """Two layers with random weights; do not change it."""
    return tiny_gpt()


@pytest.fixture(scope="session")
def tokenizer() -> BytePairTokenizer:
    """The tokenizer of `checkpoint`."""
    return byte_pair_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory of `model` and `tokenizer`; do not write in it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")
