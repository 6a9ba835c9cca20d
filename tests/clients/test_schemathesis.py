"""schemathesis makes requests from our OpenAPI document and holds the replies against it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.conftest import API_KEY
from tests.server.live import ROOT, LiveServer, environment
from tests.tiny_models import tiny_checkpoint, tiny_config, tiny_gpt

N_CTX = 32  # completions are short, so that there can be many
MAX_CHOICES = 160


@pytest.fixture
def short_server(tmp_path: Path) -> Iterator[LiveServer]:
    """A server of its own: requests are counted in the end."""
    model = tiny_gpt(tiny_config(n_ctx=N_CTX))
    checkpoint = tiny_checkpoint(tmp_path / "tiny", model=model)
    live = LiveServer(
        checkpoint, tmp_path / "stderr", "--api-key", API_KEY,
        "--max-num-sequences", "64", "--max-waiting-requests", str(MAX_CHOICES - 64),
    )  # fmt: skip
    try:
        yield live.wait_until_ready()
    finally:
        live.kill()


def http_replies(metrics: str, labels: str) -> float:
    """The count of HTTP replies with these labels."""
    (line,) = (line for line in metrics.splitlines() if labels in line)
    return float(line.split()[-1])


def test_two_thousand_requests_are_answered_as_the_document_says(
    short_server: LiveServer, tmp_path: Path
) -> None:
    key = {"Authorization": f"Bearer {API_KEY}"}
    with short_server.client(headers=key) as client:
        document = client.get("/openapi.json").json()
        ids = document["components"]["schemas"]["DetokenizeRequest"]["properties"]["tokens"]
        found = tmp_path / "found.json"

        run = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli", "run",
                f"{short_server.url}/openapi.json", "--checks", "all", "--max-examples", "150",
                "--generation-deterministic", "--continue-on-failure", "--no-shrink",
                "--header", f"Authorization: Bearer {API_KEY}", "--request-timeout", "60",
                "--output-sanitize", "false", "--no-color",
                "--report", "json", "--report-json-path", str(found),
            ],
            capture_output=True, text=True, timeout=280, cwd=tmp_path,
            env={
                **environment(), "PYTHONPATH": str(ROOT),
                "SCHEMATHESIS_HOOKS": "tests.clients.schemathesis_hooks",
                "TEST_N_CTX": str(N_CTX), "TEST_MAX_CHOICES": str(MAX_CHOICES),
                "TEST_VOCAB_SIZE": str(ids["items"]["maximum"] + 1),
            },
        )  # fmt: skip
        metrics = client.get("/metrics").text

    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr
    report = json.loads(found.read_text())
    assert report["operations"]["tested"] == len(
        [operation for path in document["paths"].values() for operation in path]
    )
    assert report["test_cases"]["generated"] >= 2000
    # And they came far: most that should be answered with text are.
    completed = http_replies(metrics, 'POST",route="/v1/completions",status="200"')
    assert completed > 200
    assert 'status="5' not in metrics
