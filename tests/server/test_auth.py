"""Keys: every route wants one, once there are any, unless it is public by name."""

import base64
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.config import ServerConfig
from server.gate import PUBLIC_PATHS
from server.served_model import ServedModel
from tests.server.conftest import Serve, make_client
from tests.server.test_errors import check_shape

KEYS = ("first-key", "second-key")


def all_routes(app: Any) -> list[tuple[str, str]]:
    """Every path and method the application answers."""
    routes: list[tuple[str, str]] = []

    def walk(entries: Any) -> None:
        for route in entries:
            inner = getattr(route, "routes", None) or getattr(
                getattr(route, "original_router", None), "routes", None
            )
            if inner is not None:
                walk(inner)
            else:
                routes.extend((route.path, method) for method in route.methods)

    walk(app.routes)
    return routes


def test_the_public_paths_are_those_of_health() -> None:
    assert {"/health", "/health/live", "/health/ready"} == PUBLIC_PATHS


def test_every_route_wants_a_key_unless_it_is_public(served: ServedModel) -> None:
    with make_client(served, api_keys=KEYS) as (client, service):
        routes = all_routes(create_app(service))
        assert {path for path, _ in routes} >= {
            *PUBLIC_PATHS, "/v1/completions", "/v1/models", "/v1/models/{model_id:path}",
            "/tokenize", "/detokenize", "/metrics", "/version", "/v1/requests/{request_id}",
            "/docs", "/dashboard", "/openapi.json",
        }  # fmt: skip
        for path, method in [*routes, ("/nothing", "GET"), ("/", "GET"), ("/health/x", "GET")]:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "first-key"}):
                reply = client.request(method, path, headers=headers)
                if path in PUBLIC_PATHS:
                    assert reply.status_code == 200, path
                else:
                    assert reply.status_code == 401, path
                    if method != "HEAD":
                        assert check_shape(reply)["code"] == "invalid_api_key"
                    # A line each: Chromium finds no second challenge in one.
                    challenges = reply.headers.get_list("www-authenticate")
                    assert challenges == ["Bearer", 'Basic realm="kvik"']
            good = client.request(method, path, headers={"Authorization": "Bearer second-key"})
            assert good.status_code != 401, path


@pytest.mark.parametrize(
    ("authorization", "is_let_in"),
    [
        ("Bearer first-key", True),
        ("bearer second-key", True),
        ("Basic " + base64.b64encode(b"anyone:first-key").decode(), True),
        ("Basic " + base64.b64encode(b"first-key:").decode(), False),
        ("Basic !!!", False),
        ("Bearer first-ke", False),
        ("Bearer first-key2", False),
        ("Bearer ", False),
        ("Bearer", False),
        ("", False),
        ("Digest first-key", False),
    ],
)
def test_keys_come_as_bearer_tokens_or_as_a_browsers_password(
    serve: Serve, authorization: str, is_let_in: bool
) -> None:
    with serve(api_keys=KEYS) as (client, _):
        reply = client.get("/version", headers={"Authorization": authorization})

    assert reply.status_code == (200 if is_let_in else 401)


def ask(client: TestClient, key: str | None) -> Any:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return client.post(
        "/v1/completions",
        json={"model": "tiny", "prompt": "a", "max_tokens": 1},
        headers={**headers, "X-Request-Id": "the-same"},
    )


def test_prefixes_are_salted_by_the_key_and_by_nothing_else(serve: Serve) -> None:
    with serve(api_keys=KEYS) as (client, service):
        for key in (*KEYS, KEYS[0]):
            assert ask(client, key).status_code == 200
        salts = [r.salt for r in service.engine.submitted]
    with serve() as (client, service):
        ask(client, None)
        ask(client, "whatever")
        open_salts = [r.salt for r in service.engine.submitted]

    assert salts[0] == salts[2] != salts[1]
    assert not any(key.encode() in salt for key in KEYS for salt in salts)
    assert open_salts == [b"", b""]


def test_a_request_is_shown_to_the_key_that_sent_it_alone(serve: Serve) -> None:
    with serve(api_keys=KEYS) as (client, _):
        ask(client, KEYS[0])
        mine, other = (
            client.get("/v1/requests/the-same", headers={"Authorization": f"Bearer {key}"})
            for key in KEYS
        )

    assert mine.status_code == 200
    assert other.status_code == 404


def test_requests_without_a_key_are_not_counted_as_received(serve: Serve) -> None:
    with serve(api_keys=KEYS) as (client, service):
        ask(client, None)
        text = service.metrics.exposition().decode()

    assert "kvik_requests_received_total 0.0" in text
    assert 'status="401"' in text


@pytest.mark.parametrize("key", ["", "schlüssel", "a\nb"])
def test_impossible_keys_are_refused_at_start(key: str) -> None:
    with pytest.raises(ValueError, match="API key"):
        ServerConfig(api_keys=(key,))


@pytest.mark.parametrize("origin", ["", "example.org", "https//example.org"])
def test_an_origin_that_no_browser_sends_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(ValueError, match=r"must be like https://example\.org, or \* for any"):
        ServerConfig(cors_origins=("https://a.example", origin))


def test_cross_origin_headers_are_sent_only_when_asked_for(serve: Serve) -> None:
    headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with serve(api_keys=KEYS) as (client, _):
        closed = client.get("/health", headers=headers)
        preflight_closed = client.options("/v1/completions", headers=headers)
    with serve(api_keys=KEYS, cors_origins=("https://a.example",)) as (client, _):
        open_ = client.get("/version", headers=headers)
        preflight = client.options("/v1/completions", headers=headers)
        stranger = client.get("/version", headers={"Origin": "https://b.example"})

    assert "access-control-allow-origin" not in closed.headers
    assert preflight_closed.status_code == 401
    assert open_.status_code == 401
    assert open_.headers["access-control-allow-origin"] == "https://a.example"
    assert preflight.status_code == 200
    assert "access-control-allow-origin" not in stranger.headers
