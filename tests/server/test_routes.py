"""The routes beside completions."""

import re
from typing import Any

import msgspec
import pytest

from engine.messages import Ready
from server.routes import PAGES
from server.served_model import ServedModel
from server.service import VERSION
from server.timelines import Timeline, Timelines
from tests.server.conftest import Serve, make_client
from tests.server.fakes import FACTS, FakeEngine
from tests.server.test_errors import check_shape


def test_models_lists_the_one_that_is_served(serve: Serve, served: ServedModel) -> None:
    with serve() as (client, _):
        listed = client.get("/v1/models").json()
        one = client.get("/v1/models/tiny").json()

    assert listed == {"object": "list", "data": [one]}
    assert one == {
        "id": "tiny", "object": "model", "created": served.created, "owned_by": "kvik",
        "max_model_len": 64,
    }  # fmt: skip


def test_version_tells_what_computes_once_that_is_known(serve: Serve) -> None:
    with serve() as (client, service):
        loaded = client.get("/version").json()
        service.engine.facts = None  # it still loads
        loading = client.get("/version").json()

    assert loaded == {
        "version": VERSION, "device": "cpu", "dtype": "float32", "products": "AVX-512",
        "numerics": FACTS.numerics,
    }  # fmt: skip
    nothing = dict.fromkeys(("device", "dtype", "products", "numerics"))
    assert loading == {"version": VERSION, **nothing}


@pytest.mark.parametrize("text", ["", " the end", "é<|endoftext|>", "z" * 10_000])
def test_tokenize_and_detokenize_are_inverse(serve: Serve, served: ServedModel, text: str) -> None:
    with serve() as (client, _):
        there = client.post("/tokenize", json={"model": "tiny", "prompt": text}).json()
        back = client.post("/detokenize", json={"tokens": there["tokens"]}).json()

    assert there == {
        "tokens": served.tokenizer.encode(text), "count": len(there["tokens"]),
        "max_model_len": 64,
    }  # fmt: skip
    assert back == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "text": "b"}, "text"),
        ("/detokenize", {"tokens": [268]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"model": "other", "tokens": []}, "model"),
    ],
)
def test_they_refuse_as_completions_do(
    serve: Serve, path: str, body: dict[str, Any], param: str
) -> None:
    with serve() as (client, _):
        reply = client.post(path, json=body)

    assert reply.status_code == (404 if param == "model" else 400)
    assert check_shape(reply)["param"] == param


def test_openapi_describes_ranges_defaults_and_null(serve: Serve) -> None:
    with serve() as (client, _):
        document = client.get("/openapi.json").json()

    schema = document["components"]["schemas"]["CompletionRequest"]
    assert schema["required"] == ["model"]
    assert schema["additionalProperties"] is False
    temperature = schema["properties"]["temperature"]
    assert temperature["default"] == 1.0
    assert {"type": "null"} in temperature["anyOf"]
    (number,) = (kind for kind in temperature["anyOf"] if kind["type"] != "null")
    assert (number["minimum"], number["maximum"]) == (0, 2)
    text = client.get("/openapi.json").text
    for name in re.findall(r'"#/components/schemas/(\w+)"', text):
        assert name in document["components"]["schemas"]


def test_openapi_names_the_model_and_its_ids(serve: Serve) -> None:
    with serve(max_num_sequences=20, max_waiting_requests=10) as (client, _):
        document = client.get("/openapi.json").json()

    schemas = document["components"]["schemas"]
    fields = schemas["CompletionRequest"]["properties"]
    assert fields["model"]["enum"] == ["tiny"]
    assert fields["max_tokens"]["anyOf"][0]["maximum"] == 63
    assert schemas["DetokenizeRequest"]["properties"]["tokens"]["items"]["maximum"] == 267
    texts, ids = fields["prompt"]["anyOf"][1:3]
    assert texts["maxItems"] == 30
    assert ids["items"]["maximum"] == 267
    assert "maxItems" not in ids


def test_openapi_declares_what_is_answered_and_nothing_else(serve: Serve) -> None:
    with serve() as (client, _):
        document = client.get("/openapi.json").json()

    replies = {
        path: operation["responses"]
        for path, operations in document["paths"].items()
        for operation in operations.values()
    }
    assert not any("422" in statuses for statuses in replies.values())
    assert set(replies["/v1/completions"]["200"]["content"]) == {
        "application/json", "text/event-stream",
    }  # fmt: skip
    assert set(replies["/metrics"]["200"]["content"]) == {"text/plain"}
    assert "Retry-After" in replies["/v1/completions"]["429"]["headers"]
    assert "404" not in replies["/version"]


def test_openapi_asks_for_a_key_where_the_server_does(serve: Serve) -> None:
    with serve() as (client, _):
        open_ = client.get("/openapi.json").json()
    with serve(api_keys=("sesame",)) as (client, _):
        closed = client.get("/openapi.json", headers={"Authorization": "Bearer sesame"}).json()

    assert "securitySchemes" not in open_["components"]
    assert closed["paths"]["/version"]["get"]["security"] == [{"bearer": []}, {"basic": []}]
    assert closed["paths"]["/health"]["get"]["security"] == []


@pytest.mark.parametrize(
    "path",
    ["/health/live", "/health/ready", "/metrics", "/version", "/v1/models", "/docs", "/dashboard"],
)
def test_head_is_get_without_the_body(serve: Serve, path: str) -> None:
    with serve() as (client, service):
        whole = client.get(path)
        head = client.head(path)
        counts = service.metrics.exposition().decode()

    assert head.status_code == whole.status_code
    assert head.content == b""
    assert set(head.headers) == set(whole.headers)
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert f'kvik_http_requests_total{{method="HEAD",route="{path}",status="200"}} 1.0' in counts


def test_head_is_refused_where_get_is(serve: Serve) -> None:
    with serve() as (client, _):
        head = client.head("/v1/completions")
        put = client.put("/version")

    assert (head.status_code, head.headers["allow"], head.content) == (405, "POST", b"")
    assert (put.status_code, put.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/docs", "/dashboard"])
def test_pages_load_nothing_from_elsewhere(serve: Serve, path: str) -> None:
    with serve() as (client, _):
        page = client.get(path)

    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//|@import|url\(", page.text)
    assert {file.name for file in PAGES.iterdir()} == {"docs.html", "dashboard.html"}


def test_the_dashboard_shows_metrics_that_there_are(serve: Serve) -> None:
    with serve() as (client, _):
        page = client.get("/dashboard").text
        complete = {"model": "tiny", "prompt": "a", "max_tokens": 2}
        client.post("/v1/completions", json=complete)
        metrics = client.get("/metrics").text

    names = set(re.findall(r"kvik_\w+", page))
    assert len(names) > 10
    for name in names:
        assert re.search(rf"^{name}(?:_count)?[{{ ]", metrics, re.M), name


def test_the_ring_forgets_the_oldest_request(serve: Serve) -> None:
    with serve(num_timelines=3) as (client, _):
        for number in range(5):
            client.post(
                "/v1/completions",
                json={"model": "tiny", "max_tokens": 1, "request_id": f"r{number}"},
            )
        found = [client.get(f"/v1/requests/r{number}").status_code for number in range(5)]

    assert found == [404, 404, 200, 200, 200]


def test_an_older_request_that_ends_later_does_not_hide_a_newer_one() -> None:
    timelines = Timelines(3)
    older, newer = (
        Timeline(request_id="a", owner=b"", received_at=10 - at, arrived_at=at)  # a clock set back
        for at in (1.0, 2.0)
    )

    for timeline in (older, newer, older):  # the last when it has ended
        timelines.add(timeline)

    assert timelines.find("a", b"") is newer


def test_a_refused_request_has_a_timeline_too(serve: Serve) -> None:
    with serve() as (client, _):
        client.post(
            "/v1/completions",
            json={"model": "tiny", "n": 0},
            headers={"X-Request-Id": "refused-1"},
        )
        timeline = client.get("/v1/requests/refused-1").json()

    assert (timeline["outcome"], timeline["status"]) == ("rejected", 400)


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("weights_id", "cd" * 32), ("device", "cuda"), ("dtype", "bfloat16"),
        ("kv_cache_dtype", "float8"), ("products", "AVX2"), ("compiled_for", "another"),
        ("is_batch_invariant", False), ("same_bytes", False),
    ],
)  # fmt: skip
def test_the_fingerprint_tells_what_decides_on_the_bytes(
    served: ServedModel, field: str, other: Any
) -> None:
    def fingerprint(facts: Ready) -> str:
        with make_client(served) as (_, service):
            assert isinstance(service.engine, FakeEngine)
            service.engine.facts = facts
            return service.fingerprint()

    assert fingerprint(msgspec.structs.replace(FACTS, **{field: other})) != fingerprint(FACTS)


def test_the_fingerprint_is_the_same_after_a_restart(served: ServedModel) -> None:
    again = msgspec.structs.replace(FACTS, pid=2, available_bytes=1, threads="3, one a core")
    found = set()
    for facts in (FACTS, again):
        with make_client(served) as (_, service):
            assert isinstance(service.engine, FakeEngine)
            service.engine.facts = facts
            found.add(service.fingerprint())

    assert len(found) == 1
