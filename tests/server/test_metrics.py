"""The numbers: that they are there, and that they add up."""

import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from engine.errors import EngineDied
from engine.messages import StepOutput, StepStats
from server.metrics import OUTCOMES, InterTokenLatency, Metrics
from server.protocol.requests import CompletionRequest
from tests.server.conftest import Serve

DOCS = Path(__file__).parents[2] / "docs"


def read(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of the exposition, by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return read(metrics)[name, tuple(sorted(labels.items()))]


def outcomes(metrics: Metrics) -> dict[str, float]:
    return {o: value(metrics, "kvik_requests_finished_total", outcome=o) for o in OUTCOMES}


def post(client: TestClient, **body: Any) -> Any:
    return client.post(
        "/v1/completions", json={"model": "tiny", "prompt": "abc", "max_tokens": 2, **body}
    )


def test_received_is_finished_by_outcome_and_in_flight(serve: Serve) -> None:
    with serve() as (client, service):
        engine: Any = service.engine
        for stream in (False, True):
            post(client, stream=stream)
            post(client, stream=stream, stop="a")
            post(client, stream=stream, n=0)
            post(client, stream=stream, prompt="a" * 65)
            post(client, stream=stream, prompt=["a", "b"], n=2)
            engine.running.clear()
            post(client, stream=stream, timeout_s=0.01)
            engine.running.set()
            engine.failure = EngineDied(reason="x")
            post(client, stream=stream)
            engine.failure = None
        client.post("/v1/completions", content=b"x")
        client.get("/v1/completions")  # not a completion request
        metrics = service.metrics

    found = outcomes(metrics)
    assert found == {
        "stop": 2, "length": 4, "abort": 0, "error": 2, "rejected": 5, "timeout": 2,
    }  # fmt: skip
    received = value(metrics, "kvik_requests_received_total")
    assert received == sum(found.values()) == 15
    assert value(metrics, "kvik_requests_in_flight") == 0


def test_tokens_count_as_usage_does_and_what_ran_past_a_stop_apart(serve: Serve) -> None:
    with serve() as (client, service):
        usage = post(client, n=2, max_tokens=8, stop="cd").json()["usage"]
        metrics = service.metrics

    # Choice 0 says abcd..., choice 1 bcde...: its stop comes a token earlier.
    assert usage["completion_tokens"] == 4 + 3
    assert value(metrics, "kvik_generation_tokens_total") == 7
    assert value(metrics, "kvik_request_generation_tokens_sum") == 7
    assert value(metrics, "kvik_prompt_tokens_total", source="cached") == 2
    assert value(metrics, "kvik_prompt_tokens_total", source="computed") == 1


def test_tokens_that_ran_past_a_stop_are_counted_apart(serve: Serve) -> None:
    with serve() as (client, service):
        engine: Any = service.engine
        engine.tokens_together = 4
        engine.num_dropped_tokens = 5  # that the engine's client kept to itself
        usage = post(client, max_tokens=8, stop="b").json()["usage"]
        metrics = service.metrics

    assert usage["completion_tokens"] == 2
    assert value(metrics, "kvik_generation_tokens_total") == 2
    assert value(metrics, "kvik_overrun_tokens_total") == 2 + 5


def test_latencies_are_observed_once_a_prompt_and_once_a_token(serve: Serve) -> None:
    with serve() as (client, service):
        post(client, prompt=["a", "b"], n=2, max_tokens=5)
        metrics = service.metrics

    assert value(metrics, "kvik_time_to_first_token_seconds_count") == 2
    assert value(metrics, "kvik_request_queue_time_seconds_count") == 2
    assert value(metrics, "kvik_inter_token_latency_seconds_count") == 2 * 2 * 4
    assert value(metrics, "kvik_e2e_request_latency_seconds_count") == 1


def test_http_replies_are_counted_by_route_and_never_by_address(serve: Serve) -> None:
    with serve() as (client, service):
        for i in range(20):
            client.get(f"/v1/models/no-{i}")
            client.get(f"/no-{i}")
            client.request(f"ODD{i}", "/version")
        client.get("/v1/models/tiny")
        samples = read(service.metrics)

    http = {dict(labels)["route"]: v for (name, labels), v in samples.items()
            if name == "kvik_http_requests_total"}  # fmt: skip
    assert set(http) <= {"/v1/models/{model_id:path}", "/version", "unknown"}
    found = samples[
        "kvik_http_requests_total",
        (("method", "GET"), ("route", "/v1/models/{model_id:path}"), ("status", "200")),
    ]
    assert found == 1
    assert len([key for key in samples if key[0] == "kvik_http_requests_total"]) <= 5


def step(**changes: int) -> StepOutput:
    stats: dict[str, int] = {
        "num_waiting": 1, "num_running": 2, "num_free_blocks": 5, "num_cached_blocks": 3,
        "num_used_blocks": 8, "num_scheduled_tokens": 10, "num_preemptions": 4,
        "num_prefix_query_tokens": 100, "num_prefix_hit_tokens": 50, **changes,
    }  # fmt: skip
    return StepOutput(outputs=[], stats=StepStats(**stats))


def test_the_engines_totals_go_on_when_a_new_worker_counts_from_zero() -> None:
    metrics = Metrics(n_ctx=64)

    metrics.record_step(step())
    metrics.record_step(step(num_preemptions=6, num_prefix_query_tokens=120))
    metrics.record_step(step(num_preemptions=1, num_prefix_query_tokens=30,
                             num_prefix_hit_tokens=20))  # fmt: skip

    assert value(metrics, "kvik_num_preemptions_total") == 7
    assert value(metrics, "kvik_prefix_cache_queries_total") == 150
    assert value(metrics, "kvik_prefix_cache_hits_total") == 70
    assert value(metrics, "kvik_iteration_tokens_count") == 3
    assert value(metrics, "kvik_num_requests_running") == 2
    assert value(metrics, "kvik_kv_cache_usage_perc") == 0.5
    states = [value(metrics, "kvik_kv_cache_blocks", state=s) for s in ("free", "used", "cached")]
    assert states == [5, 8, 3]


def test_inter_token_latency_counts_into_the_right_buckets() -> None:
    histogram = InterTokenLatency("x", "A test.", [0.001, 0.01])
    for seconds in (0.0005, 0.001, 0.002, 5.0):
        histogram.observe(seconds)

    (family,) = histogram.collect()
    samples = {(s.name, s.labels.get("le")): s.value for s in family.samples}
    assert samples["x_bucket", "0.001"] == 2
    assert samples["x_bucket", "0.01"] == 3
    assert samples["x_bucket", "+Inf"] == samples["x_count", None] == 4
    assert samples["x_sum", None] == pytest.approx(5.0035)


def test_buckets_reach_down_and_keep_vllms_boundaries() -> None:
    samples = read(Metrics(n_ctx=1024))

    def boundaries(name: str) -> set[float]:
        return {float(dict(labels)["le"]) for n, labels in samples if n == f"{name}_bucket"}

    assert min(boundaries("kvik_inter_token_latency_seconds")) == 0.00025
    for name in ("time_to_first_token", "request_queue_time", "e2e_request_latency"):
        assert min(boundaries(f"kvik_{name}_seconds")) == 0.001
        assert 2.0 in boundaries(f"kvik_{name}_seconds")
    vllm = {0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10}
    assert vllm < boundaries("kvik_inter_token_latency_seconds")
    assert max(b for b in boundaries("kvik_request_prompt_tokens") if b < float("inf")) == 1024


def test_every_metric_is_documented_with_its_type_and_labels(serve: Serve) -> None:
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    rows = {
        match[1]: (match[2], set(re.findall(r"`(\w+)`", match[3])))
        for match in re.finditer(r"^\| `(\w+)` \| (\w+) \| ([^|]*)\|", text, re.MULTILINE)
    }
    with serve() as (client, service):
        post(client)
        families = list(text_string_to_metric_families(service.metrics.exposition().decode()))

    found = {}
    for family in families:
        name = family.name + "_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels}
        found[name] = (family.type, labels - {"le"})
        assert family.documentation
    assert rows == found


def test_every_request_field_and_route_is_documented(serve: Serve) -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))

    with serve() as (client, _):
        paths = client.get("/openapi.json").json()["paths"]

    assert set(CompletionRequest.model_fields) <= documented
    for path in paths:
        assert f"`{path}`" in text or f" {path}`" in text, path
