from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from engine.config import EngineConfig, LaunchConfig
from server.app import create_app
from server.config import ServerConfig
from server.served_model import ServedModel
from server.service import Service
from tests.server.fakes import FakeEngine, Script, counting
from tests.server.live import LiveServer, live_server
from tests.tiny_models import tiny_checkpoint, tiny_config, tiny_gpt

Serve = Callable[..., Any]


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """A model of 64 tokens' context, by name `tiny`; its first 256 ids are the bytes."""
    directory = tmp_path_factory.mktemp("served") / "tiny"
    tiny_checkpoint(directory, model=tiny_gpt(tiny_config(n_ctx=64)))
    return ServedModel.read(directory)


def make_service(
    served: ServedModel, script: Script = counting, *, max_num_sequences: int = 256, **config: Any
) -> Service:
    """A service around a scripted engine; to be called within an event loop."""
    launch = LaunchConfig(model=".", engine=EngineConfig(max_num_sequences=max_num_sequences))
    (eos,) = served.special_token_ids
    return Service(ServerConfig(**config), launch, served, FakeEngine(script, eos=eos))


@contextmanager
def make_client(
    served: ServedModel, script: Script = counting, **config: Any
) -> Iterator[tuple[TestClient, Service]]:
    """An in-process client of the application, over a scripted engine."""
    service = make_service(served, script, **config)
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        yield client, service


@pytest.fixture
def serve(served: ServedModel) -> Serve:
    """`make_client` for the test's model."""

    def run(*args: Any, **config: Any) -> Any:
        return make_client(served, *args, **config)

    return run


@pytest.fixture(scope="session")
def live_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 1024 tokens' context that takes some milliseconds a step."""
    config = tiny_config(n_layer=4, n_embd=64, n_ctx=1024)
    return tiny_checkpoint(tmp_path_factory.mktemp("live") / "tiny", model=tiny_gpt(config))


@pytest.fixture(scope="module")
def server(live_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A process of its own, for tests that leave it as it was, but for its counts."""
    log = tmp_path_factory.mktemp("log") / "stderr"
    with live_server(live_checkpoint, log, "--log-level", "debug") as server:
        yield server
