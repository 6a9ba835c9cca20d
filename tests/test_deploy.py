"""What lies in deploy/, against the server's metrics and against what docker-compose.yml mounts.

Without Prometheus; `tests/clients/test_prometheus.py` shows the same files to a real one.
"""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
PROMETHEUS = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
GRAFANA = DEPLOY / "grafana"
DATA_SOURCES = yaml.safe_load((GRAFANA / "datasources" / "prometheus.yml").read_text())
PROVIDERS = yaml.safe_load((GRAFANA / "dashboards" / "provider.yml").read_text())
DASHBOARD = json.loads((GRAFANA / "dashboards" / "kvik.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]

# What Prometheus itself says of a scrape and of its rules.
OF_PROMETHEUS = {"up", "ALERTS"}


def series_names() -> set[str]:
    """Every name that a sample of ours may have."""
    suffixes = {
        "counter": ["_total"],
        "gauge": [""],
        "histogram": ["_bucket", "_count", "_sum"],
    }
    return {
        family.name + suffix
        for family in Metrics(n_ctx=1024).registry.collect()
        for suffix in suffixes[family.type]
    }


def mounts(service: str) -> dict[str, str]:
    """Where a container finds what of this repository."""
    pairs = [volume.split(":") for volume in SERVICES[service]["volumes"]]
    return {source: target for source, target, *_ in pairs if source.startswith("./")}


EXPRESSIONS = [
    *(pytest.param(rule["expr"], id=rule["alert"]) for rule in RULES),
    *(
        pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
        for panel in PANELS
        for target in panel["targets"]
    ),
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_asks_for_metrics_that_there_are(expression: str) -> None:
    asked = set(re.findall(r"\bkvik_\w+", expression))

    assert asked or any(name in expression for name in OF_PROMETHEUS)
    assert asked <= series_names()


def test_panels_have_numbers_and_titles_of_their_own() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)


def test_panels_lie_beside_each_other_on_the_grid() -> None:
    cells = [
        (column, row)
        for panel in PANELS
        for place in [panel["gridPos"]]
        for column, row in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        )
    ]

    assert len(set(cells)) == len(cells)
    assert max(column for column, _ in cells) < 24  # as wide as Grafana's grid is
    # Without holes: Grafana would move up what lies below one.
    assert len(cells) == 24 * (1 + max(row for _, row in cells))


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_of_one_value_shows_that_of_now(panel: dict[str, Any]) -> None:
    # The last one in a range would be an alert that is over, or a server that was up.
    for target in panel["targets"]:
        assert target["instant"] is (panel["type"] == "stat")
        assert target["range"] is not target["instant"]


def test_the_dashboard_asks_the_data_source_that_is_provisioned() -> None:
    (source,) = DATA_SOURCES["datasources"]
    expected = {"type": source["type"], "uid": source["uid"]}

    for panel in PANELS:
        assert panel["datasource"] == expected
        assert [target["datasource"] for target in panel["targets"]] == [expected] * len(
            panel["targets"]
        )
    # Grafana makes the range of a rate out of it.
    assert source["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]


def test_services_find_each_other_by_name_and_port() -> None:
    (source,) = DATA_SOURCES["datasources"]
    addresses = [source["url"].removeprefix("http://")]
    for job in PROMETHEUS["scrape_configs"]:
        addresses += [target for config in job["static_configs"] for target in config["targets"]]

    assert addresses == ["prometheus:9090", "kvik:8000"]
    for name, port in (address.split(":") for address in addresses):
        assert SERVICES[name]["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_what_compose_mounts_is_there_and_all_of_deploy_is_mounted() -> None:
    mounted = [ROOT / source for service in SERVICES for source in mounts(service)]

    assert all(path.exists() for path in mounted)
    for path in DEPLOY.rglob("*"):
        assert path.is_dir() or {path, path.parent} & set(mounted), f"{path} is mounted nowhere"


def test_files_lie_in_the_containers_where_their_readers_look() -> None:
    at = mounts("prometheus")["./deploy/prometheus.yml"]
    rules = {str(Path(at).parent / name) for name in PROMETHEUS["rule_files"]}
    assert rules == {mounts("prometheus")["./deploy/alerts.yml"]}

    folder = mounts("grafana")["./deploy/grafana/dashboards"]
    (provider,) = PROVIDERS["providers"]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert provider["options"]["path"] == folder
    assert home == f"{folder}/kvik.json"


@pytest.mark.parametrize("service", SERVICES)
def test_no_container_may_more_than_it_needs(service: str) -> None:
    about = SERVICES[service]

    assert about["read_only"] is True
    assert about["cap_drop"] == ["ALL"]
    assert about["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "user"} & set(about)
    assert all(port.startswith("127.0.0.1:") for port in about["ports"])
    assert "build" in about or re.search(r":v?\d+\.\d+\.\d+$", about["image"])


def test_whoever_reaches_grafana_may_look_and_there_is_no_account() -> None:
    environment = SERVICES["grafana"]["environment"]

    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert environment["GF_AUTH_BASIC_ENABLED"] == "false"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_it_is_and_where_it_is_explained(rule: dict[str, Any]) -> None:
    page, _, section = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^#+ `?(\w+)`?$", (ROOT / page).read_text(encoding="utf-8"), re.M)

    assert section == rule["alert"].lower()
    assert rule["alert"] in headings
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert "instance" in rule["annotations"]["summary"]
    assert rule["annotations"]["description"]


def test_every_alert_has_series_on_which_it_fires() -> None:
    tests = yaml.safe_load((ROOT / "tests" / "clients" / "alerts.yml").read_text(encoding="utf-8"))
    fires = " ".join(
        sample["labels"]
        for case in tests["tests"]
        for expression in case["promql_expr_test"]
        for sample in expression["exp_samples"]
    )

    for rule in RULES:
        assert f'alertname="{rule["alert"]}"' in fires
