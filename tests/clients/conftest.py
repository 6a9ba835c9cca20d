from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.live import LiveServer
from tests.tiny_models import tiny_checkpoint, tiny_config, tiny_gpt

API_KEY = "sesame"


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Called tiny, with a context of 256 tokens."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    return tiny_checkpoint(directory, model=tiny_gpt(tiny_config(n_ctx=256)))


@pytest.fixture(scope="session")
def server(
    small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """`kvik serve`, which wants API_KEY; it ends with the session, and ends well."""
    log = tmp_path_factory.mktemp("log") / "stderr"
    live = LiveServer(small_checkpoint, log, "--api-key", API_KEY)
    try:
        yield live.wait_until_ready()
        assert live.stop() == 0
    finally:
        live.kill()
