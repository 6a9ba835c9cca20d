"""Prometheus, and its lint, on a live server's /metrics."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.clients.conftest import API_KEY
from tests.server.live import ROOT, LiveServer, request, until

DEPLOY = ROOT / "deploy"
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "kvik.json").read_text())

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
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", "deploy/prometheus.yml"],
        ["check", "rules", "deploy/alerts.yml"],
        ["test", "rules", "tests/clients/alerts.yml"],
    ],
    ids=" ".join,
)
def test_the_configuration_we_ship_is_one(arguments: list[str]) -> None:
    checked = subprocess.run(
        ["promtool", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.fixture(scope="module")
def scraper(server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus with the configuration and the rules we ship, but faster."""
    directory = tmp_path_factory.mktemp("prometheus")
    document = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    document["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    document["rule_files"] = [str(DEPLOY / name) for name in document["rule_files"]]
    (job,) = document["scrape_configs"]
    job["static_configs"] = [{"targets": [server.url.removeprefix("http://")]}]
    job["authorization"] = {"credentials": API_KEY}
    config = directory / "prometheus.yml"
    config.write_text(json.dumps(document))  # which is YAML too
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    log = (directory / "log").open("w")
    process = subprocess.Popen(
        [
            "prometheus", f"--config.file={config}", f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address={address}",
        ],
        stdout=log, stderr=log,
    )  # fmt: skip
    yield f"http://{address}"
    process.terminate()
    process.wait(60)
    log.close()


def _ask(address: str, question: str) -> Any:
    """What Prometheus' API answers; nothing while it starts."""
    try:
        with urllib.request.urlopen(f"{address}/api/v1/{question}", timeout=10) as reply:
            return json.load(reply)["data"]
    except urllib.error.HTTPError as error:
        if error.code != 503:  # which says that it starts
            pytest.fail(f"{question}: {error.read().decode()}")
        return None
    except OSError:
        return None


def _query(address: str, expression: str) -> list[float]:
    """The values of a query now; none while Prometheus starts."""
    data = _ask(address, f"query?{urllib.parse.urlencode({'query': expression})}")
    return [float(sample["value"][1]) for sample in data["result"]] if data else []


@prometheus
@pytest.mark.usefixtures("busy_server")
def test_prometheus_scrapes_and_answers(scraper: str) -> None:
    until(lambda: _query(scraper, 'up{job="kvik"}') == [1.0], 60)

    in_flight = "sum(kvik_requests_in_flight)"
    account = f"sum(kvik_requests_received_total) - sum(kvik_requests_finished_total) - {in_flight}"
    until(lambda: _query(scraper, account) == [0.0], 60)
    quantile = "histogram_quantile(0.5, kvik_time_to_first_token_seconds_bucket > 0)"
    until(lambda: any(median > 0 for median in _query(scraper, quantile)), 60)


@prometheus
@pytest.mark.usefixtures("busy_server")
def test_prometheus_takes_every_rule_and_finds_what_they_ask_for(scraper: str) -> None:
    until(lambda: _query(scraper, 'up{job="kvik"}') == [1.0], 60)

    def rules() -> list[dict[str, Any]]:
        data = _ask(scraper, "rules")
        return [rule for group in data["groups"] for rule in group["rules"]] if data else []

    until(lambda: bool(rules()) and all(rule["health"] != "unknown" for rule in rules()), 60)
    assert [(rule["name"], rule["health"]) for rule in rules()] == [
        (rule["alert"], "ok") for rule in RULES
    ]
    for rule in RULES:
        for selector in re.findall(r"(?:\bkvik_\w+|\bup\b)(?:\{[^}]*\})?", rule["expr"]):
            assert _query(scraper, selector), f"{rule['alert']} asks for {selector}"


@prometheus
def test_every_expression_of_the_dashboard_shows_something(
    server: LiveServer, scraper: str
) -> None:
    until(lambda: _query(scraper, 'up{job="kvik"}') == [1.0], 60)
    expressions = {
        f"{panel['title']} {target['refId']}": target["expr"].replace("$__rate_interval", "1m")
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
    }
    missing = dict(expressions)

    def all_show_something() -> bool:
        with server.client(headers={"Authorization": f"Bearer {API_KEY}"}) as client:
            assert client.post("/v1/completions", json=request()).status_code == 200
            assert client.post("/v1/completions", json=request(model="?")).status_code == 404
        for name, expression in list(missing.items()):
            values = _query(scraper, expression)
            if values and all(map(math.isfinite, values)):
                del missing[name]
        return not missing

    try:
        until(all_show_something, 60)
    except AssertionError:
        pytest.fail(f"nothing is shown for {missing}")
    assert _query(scraper, expressions["Server A"]) == [1.0]
    assert _query(scraper, expressions["Engine A"]) == [1.0]
    # A share of what there is, as an account that closes.
    blocks = sum(_query(scraper, expressions[f"KV cache blocks {ref}"])[0] for ref in "ABC")
    assert [blocks] == _query(scraper, "sum(kvik_kv_cache_blocks)")


@prometheus
def test_an_engine_that_dies_is_on_the_dashboard_by_the_name_of_its_alert(
    server: LiveServer, scraper: str
) -> None:
    (panel,) = (panel for panel in DASHBOARD["panels"] if panel["title"] == "Alerts")
    (target,) = panel["targets"]

    def shown() -> list[str]:
        data = _ask(scraper, f"query?{urllib.parse.urlencode({'query': target['expr']})}")
        return [sample["metric"]["alertname"] for sample in data["result"]] if data else []

    until(lambda: shown() == ["none"], 60)
    os.kill(server.worker_pid, signal.SIGKILL)

    until(lambda: shown() == ["KvikEngineRestarts"], 60)
    with server.client() as client:  # others are to find it well
        until(lambda: client.get("/health/ready").status_code == 200, 60)
