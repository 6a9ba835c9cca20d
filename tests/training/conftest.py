from pathlib import Path

import pytest

from tests.training.tiny import make_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 1,200 characters, prepared; do not write in it."""
    return make_data(tmp_path_factory.mktemp("data") / "tiny")
