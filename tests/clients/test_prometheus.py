"""Prometheus, and its lint, on a live server's /metrics."""

import json
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.conftest import API_KEY
from tests.server.live import ROOT, LiveServer, request, until

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not here: apt-get install prometheus"
)
prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no Prometheus here: apt-get install prometheus"
)


@pytest.fixture
def busy_server(server: LiveServer) -> LiveServer:
    """A server that has completed something, so that every metric has seen something."""
    with server.client(headers={"Authorization": f"Bearer {API_KEY}"}) as client:
        assert client.post("/v1/completions", json=request()).status_code == 200
    return server


@promtool
def test_the_metrics_pass_prometheus_lint(busy_server: LiveServer) -> None:
    with busy_server.client(headers={"Authorization": f"Bearer {API_KEY}"}) as client:
        text = client.get("/metrics").text

    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60
    )

    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@promtool
def test_the_configuration_we_ship_is_one() -> None:
    checked = subprocess.run(
        ["promtool", "check", "config", str(ROOT / "deploy" / "prometheus.yml")],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.fixture
def scraper(busy_server: LiveServer, tmp_path: Path) -> Iterator[str]:
    """The address of a Prometheus that scrapes the server."""
    config = tmp_path / "prometheus.yml"
    config.write_text(
        json.dumps(  # which is YAML too
            {
                "global": {"scrape_interval": "1s"},
                "scrape_configs": [
                    {
                        "job_name": "kvik",
                        "authorization": {"credentials": API_KEY},
                        "static_configs": [{"targets": [busy_server.url.removeprefix("http://")]}],
                    }
                ],
            }
        )
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [
            "prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address={address}",
        ],
        stdout=log, stderr=log,
    )  # fmt: skip
    yield f"http://{address}"
    process.terminate()
    process.wait(60)
    log.close()


def _query(address: str, expression: str) -> list[float]:
    """The values of a query now; none while Prometheus starts."""
    url = f"{address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            document = json.load(reply)
    except OSError:
        return []
    return [float(sample["value"][1]) for sample in document["data"]["result"]]


@prometheus
def test_prometheus_scrapes_and_answers(scraper: str) -> None:
    until(lambda: _query(scraper, 'up{job="kvik"}') == [1.0], 60)

    in_flight = "sum(kvik_requests_in_flight)"
    account = f"sum(kvik_requests_received_total) - sum(kvik_requests_finished_total) - {in_flight}"
    assert _query(scraper, account) == [0.0]
    (median,) = _query(
        scraper, "histogram_quantile(0.5, kvik_time_to_first_token_seconds_bucket > 0)"
    )
    assert median > 0
