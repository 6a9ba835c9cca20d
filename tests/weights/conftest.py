from pathlib import Path

import pytest

from tests.tiny_models import tiny_gpt
from tests.weights.damage import CONFIG
from weights.checkpoint import save


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint of one layer, four wide, seven ids and no tokenizer, to do harm to."""
    save(tiny_gpt(CONFIG), tmp_path / "tiny", tokenizer=None)
    return tmp_path / "tiny"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The same in several files with an index."""
    save(tiny_gpt(CONFIG), tmp_path / "shards", tokenizer=None, max_shard_bytes=100)
    return tmp_path / "shards"
