"""Every error has one shape and the right status, whoever raised it."""

import json
import time
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from starlette.testclient import TestClient

from engine.client import EngineState
from engine.errors import EngineDied
from server.protocol.fields import MAX_IDS
from server.served_model import ServedModel
from server.service import Service
from tests.server.conftest import Serve, make_client

URL = "/v1/completions"
GOOD: dict[str, Any] = {"model": "tiny", "prompt": "ab", "max_tokens": 2}


def check_shape(reply: Any) -> dict[str, Any]:
    """The body of an error: OpenAI's four fields, all there, of the right types."""
    assert reply.headers["content-type"] == "application/json"
    assert set(reply.json()) == {"error"}
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    return error


@pytest.fixture(scope="module")
def shared(served: ServedModel) -> Iterator[tuple[TestClient, Service]]:
    """One client for the many requests that are refused and change nothing."""
    with make_client(served) as pair:
        yield pair


HUGE = [1e3, 2**31, 2**63, 10**30, 1e300]
BAD_FIELDS: list[tuple[str, list[Any]]] = [
    ("model", [None, 3, True, []]),
    ("prompt", [3, True, {}, [], [[]], [1, "a"], [None], [1.5], [True], [[1], "a"], [-1], [268],
                [2**31], [2**63], [2**70], [[1], [2**63]], ["a"] * 2049]),
    ("max_tokens", [-1, 1.5, True, "16", 2**31, 2**63, 10**30, [], {}]),
    ("temperature", [-0.1, 2.1, True, "1", 10**400, []]),
    ("top_p", [-0.1, 1.1, "1", True]),
    ("n", [0, -1, 129, 1.5, True, "1", *HUGE]),
    ("best_of", [0, -1, 21, 1.5, True, *HUGE]),
    ("logprobs", [-1, 6, True, 1.5, "5"]),
    ("echo", [1, "true", 0]),
    ("stream", [1, "true"]),
    ("stop", ["", [""], 5, ["a", 5], ["a"] * 5, "x" * 1001, {}]),
    ("presence_penalty", [-2.1, 2.1, True, "0"]),
    ("frequency_penalty", [-2.1, 2.1, True, "0"]),
    ("logit_bias", [[], {"a": 1}, {"-1": 1}, {"1": 101}, {"1": -100.5}, {"1": True}, {"1": "2"},
                    {"268": 1}, {"99999999999": 1}, {"1.5": 1}, {"²": 1},
                    {str(i): 1 for i in range(MAX_IDS + 1)}]),
    ("seed", [1.5, True, "1", 2**63, -(2**63) - 1]),
    ("user", [5, {}]),
    ("top_k", [-2, 1.5, True]),
    ("min_p", [-0.1, 1.1]),
    ("typical_p", [-0.1, 1.1]),
    ("repetition_penalty", [0, -1, 101, True, 1e-300]),
    ("min_tokens", [-1, 3, True, 2**63]),
    ("ignore_eos", [1]),
    ("stop_token_ids", [[-1], [268], [2**31], [2**63], [1.5], [True], ["1"], 5, [1] * 1025]),
    ("allowed_token_ids", [[], [-1], [268], [2**31], [2**63], [1.5], [True], ["1"], [1] * 1025]),
    ("include_stop_str_in_output", [1]),
    ("skip_special_tokens", [1]),
    ("truncate_prompt_tokens", [0, -2, 1.5, True]),
    ("return_token_ids", [1]),
    ("priority", [1.5, True, 2**31]),
    ("timeout_s", [0, -1, 86401, True, "1"]),
    ("request_id", ["", "a b", "a\n", "x" * 129, 5, "é"]),
    ("stream_options", [{}, 5, {"include_usage": True}]),
    ("suffix", ["x"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in BAD_FIELDS for value in values],
    ids=lambda value: repr(value)[:60],
)
def test_a_bad_value_is_a_400_that_names_the_field(
    shared: tuple[TestClient, Service], field: str, value: Any
) -> None:
    client, _ = shared
    start = time.monotonic()
    reply = client.post(URL, json={**GOOD, field: value})
    seconds = time.monotonic() - start

    assert reply.status_code == 400, reply.text
    error = check_shape(reply)
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(field) or field in ("prompt", "max_tokens")
    assert seconds < 1  # milliseconds, but for a machine that is busy with something else


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", 3, "temperature must be at most 2, got 3."),
        ("repetition_penalty", 0, "repetition_penalty must be at least 0.01, got 0."),
        ("timeout_s", 0, "timeout_s must be above 0, got 0."),
        ("seed", 2**63, "seed must be below 9223372036854775808, got 9223372036854775808."),
    ],
)
def test_limits_are_spelled_as_in_the_documentation(
    shared: tuple[TestClient, Service], field: str, value: float, message: str
) -> None:
    reply = shared[0].post(URL, json={**GOOD, field: value})

    assert check_shape(reply)["message"] == message


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", "b" * 61, "c"], "Prompt 1 of 3, counted from 0: The prompt has 61 tokens"),
        ([[97], [97], [268]], "Prompt 2 of 3, counted from 0: prompt contains the token id 268;"),
        (["b" * 61], "The prompt has 61 tokens"),
    ],
)
def test_a_bad_prompt_of_a_batch_is_named_by_its_place(
    shared: tuple[TestClient, Service], prompts: Any, message: str
) -> None:
    reply = shared[0].post(URL, json={**GOOD, "prompt": prompts, "max_tokens": 4})

    assert reply.status_code == 400
    assert check_shape(reply)["message"].startswith(message)


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("temprature", "Did you mean temperature?"),
        ("max_token", "Did you mean max_tokens?"),
        ("zzz", ""),
        ("messages", "put the text into prompt"),
        ("suffix", "cannot fill a gap"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_we_know(
    shared: tuple[TestClient, Service], field: str, hint: str
) -> None:
    reply = shared[0].post(URL, json={**GOOD, field: "x"})

    error = check_shape(reply)
    assert reply.status_code == 400
    assert error["param"] == field
    assert hint in error["message"]


def test_a_typo_in_stream_options_is_named_with_its_path(
    shared: tuple[TestClient, Service],
) -> None:
    body = {**GOOD, "stream": True, "stream_options": {"include_usag": True}}

    error = check_shape(shared[0].post(URL, json=body))

    assert error["param"] == "stream_options.include_usag"
    assert "stream_options.include_usage" in error["message"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"min_tokens": 3}, "min_tokens"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(
    shared: tuple[TestClient, Service], changes: dict[str, Any], param: str
) -> None:
    reply = shared[0].post(URL, json={**GOOD, **changes})

    assert reply.status_code == 400
    assert check_shape(reply)["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        b"", b"x", b"[]", b"3", b'"a"', b"null", b"\xff\xfe", b"{", b'{"a":NaN}',
        b'{"model":"tiny","temperature":Infinity}', b'{"model":"tiny","temperature":-Infinity}',
        b'{"model":"tiny","model":"tiny"}', b"[" * 5000, b'{"a":' * 5000,
        b'{"model":"tiny","seed":1' + b"0" * 100_000 + b"}",
        b'{"model":"tiny","prompt":"\\ud800"}',
        b'{"model":"tiny","prompt":"a","\\ud800":1}', b'{"model":"tiny","stop":"\\ud800"}',
    ],
    ids=lambda body: repr(body[:40]),
)  # fmt: skip
def test_a_body_that_is_no_request_is_a_400(
    shared: tuple[TestClient, Service], body: bytes
) -> None:
    reply = shared[0].post(URL, content=body, headers={"Content-Type": "application/json"})

    assert reply.status_code == 400, reply.text
    check_shape(reply)


@pytest.mark.parametrize("spelled", ["2.0", "2e0", "200e-2"])
def test_a_number_without_a_fraction_is_an_integer_however_it_is_spelled(
    shared: tuple[TestClient, Service], spelled: str
) -> None:
    body = json.dumps(GOOD).replace('"max_tokens": 2', f'"max_tokens": {spelled}')

    reply = shared[0].post(URL, content=body, headers={"Content-Type": "application/json"})

    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({"Content-Type": "APPLICATION/JSON"}, 200),
    ],
)
def test_only_plain_json_is_read(
    shared: tuple[TestClient, Service], headers: dict[str, str], status: int
) -> None:
    reply = shared[0].post(URL, content=json.dumps(GOOD).encode(), headers=headers)

    assert reply.status_code == status
    if status != 200:
        check_shape(reply)


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/", "GET /dashboard"),
        ("/v1/chat/completions", "POST /v1/completions"),
        ("/v1/embeddings", "There is nothing here"),
    ],
)
def test_who_looks_in_the_wrong_place_is_told_of_the_right_one(
    shared: tuple[TestClient, Service], path: str, hint: str
) -> None:
    reply = shared[0].post(path, json={})

    assert reply.status_code == 404
    assert hint in check_shape(reply)["message"]
    assert "GET /docs" in check_shape(reply)["message"]


@pytest.mark.parametrize(("padding", "status"), [(0, 200), (1, 413)])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_may_have_so_many_bytes_and_no_more(
    serve: Serve, padding: int, status: int, chunked: bool
) -> None:
    body = json.dumps(GOOD).encode().ljust(1000 + padding)

    with serve(max_body_bytes=1000) as (client, _):
        reply = client.post(
            URL,
            content=iter([body[:600], body[600:]]) if chunked else body,
            headers={"Content-Type": "application/json"},
        )

    assert reply.status_code == status
    if status != 200:
        assert check_shape(reply)["code"] == "body_too_large"


def test_routes_and_methods_that_there_are_not(shared: tuple[TestClient, Service]) -> None:
    client, _ = shared

    for reply in (client.get("/nothing"), client.get("/v1"), client.post("/v1/models/x/y/z")):
        assert reply.status_code in (404, 405)
        check_shape(reply)
    wrong = client.get(URL)
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert check_shape(wrong)["code"] == "method_not_allowed"
    unknown = client.post(URL, json={**GOOD, "model": "gpt-5"})
    assert unknown.status_code == 404
    assert check_shape(unknown)["code"] == "model_not_found"
    assert unknown.json()["error"]["param"] == "model"
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/v1/requests/never-was").status_code == 404


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param"),
    [
        ("a" * 48, 16, None),
        ("a" * 49, 16, "max_tokens"),
        ("a" * 49, None, "max_tokens"),  # the default of 16 counts as well
        ("a" * 63, 1, None),
        ("a" * 64, 0, None),
        ("a" * 64, 1, "prompt"),
        ("a" * 65, 0, "prompt"),
        ([97] * 65, 0, "prompt"),
        ("a", 64, "max_tokens"),
        ("", 63, None),
        ("", 64, "max_tokens"),
        (None, 64, "max_tokens"),
    ],
)
def test_prompt_and_max_tokens_must_fit_into_the_context(
    shared: tuple[TestClient, Service], prompt: Any, max_tokens: int | None, param: str | None
) -> None:
    reply = shared[0].post(URL, json={"model": "tiny", "prompt": prompt, "max_tokens": max_tokens})

    assert reply.status_code == (200 if param is None else 400), reply.text
    if param is not None:
        error = check_shape(reply)
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)


def test_a_prompt_of_more_bytes_than_the_context_holds_is_not_tokenised(
    shared: tuple[TestClient, Service],
) -> None:
    client, service = shared
    longest = service.model.n_ctx * service.model.max_token_bytes

    error = check_shape(client.post(URL, json={**GOOD, "prompt": "a" * (longest + 1)}))

    assert error["code"] == "context_length_exceeded"
    assert f"{longest + 1} bytes" in error["message"]


def test_an_engine_that_dies_midway_is_a_500_or_an_error_event(serve: Serve) -> None:
    with serve() as (client, service):
        service.engine.failure = EngineDied(reason="the test said so")
        whole = client.post(URL, json=GOOD)
        stream = client.post(URL, json={**GOOD, "stream": True})

    assert whole.status_code == 500
    assert check_shape(whole)["code"] == "engine_failed"
    assert stream.status_code == 200
    first, last, rest = stream.text.split("\n\n")
    assert json.loads(first[6:])["choices"][0]["text"] == "a"
    assert json.loads(last[6:])["error"]["code"] == "engine_failed"
    assert rest == ""  # no [DONE]


@pytest.mark.parametrize("code", ["non_finite_logits", "out_of_memory"])
def test_a_choice_that_fails_fails_its_request_alone_and_says_how(serve: Serve, code: str) -> None:
    with serve() as (client, service):
        service.engine.bad_choice = 1
        service.engine.bad_code = code
        bad = client.post(URL, json={**GOOD, "n": 2})
        stream = client.post(URL, json={**GOOD, "n": 2, "stream": True})
        good = client.post(URL, json=GOOD)
        (request, *_) = service.engine.submitted

    assert bad.status_code == 500
    assert check_shape(bad)["code"] == code
    assert check_shape(bad)["message"] == "So it is."
    assert request.is_closed
    last = json.loads(stream.text.rstrip().rpartition("data: ")[2])
    assert last["error"]["code"] == code  # and no [DONE] behind it
    assert good.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
def test_timeout_s_is_a_504_or_an_error_event(serve: Serve, stream: bool, prompt: Any) -> None:
    with serve() as (client, service):
        service.engine.running.clear()
        reply = client.post(
            URL, json={**GOOD, "prompt": prompt, "timeout_s": 0.05, "stream": stream}
        )
        requests = service.engine.submitted

    assert all(request.is_closed for request in requests)
    if stream:
        assert reply.status_code == 200
        event, rest = reply.text.split("\n\n")
        assert json.loads(event[6:])["error"]["code"] == "timeout"
        assert rest == ""
    else:
        assert reply.status_code == 504
        assert check_shape(reply)["param"] == "timeout_s"


def test_readiness_tells_the_states_apart_each_with_its_reason(serve: Serve) -> None:
    with serve() as (client, service):
        engine: Any = service.engine
        seen = []

        def look() -> None:
            ready, health = client.get("/health/ready"), client.get("/health")
            assert (ready.status_code, ready.json()) == (health.status_code, health.json())
            assert client.get("/health/live").status_code == 200
            seen.append((ready.status_code, ready.json()["status"], ready.json()["reason"]))

        look()
        engine.state = EngineState.LOADING
        look()
        engine.state, engine.reason = EngineState.RESTARTING, "the engine process ended"
        look()
        engine.state, engine.reason = EngineState.DOWN, "the engine died 4 times in a row"
        look()
        engine.state, engine.seconds_without_sign = EngineState.READY, 6.0
        look()
        service.is_draining = True
        look()

    assert [(status, name) for status, name, _ in seen] == [
        (200, "ready"), (503, "loading"), (503, "engine_down"), (503, "engine_down"),
        (503, "engine_hung"), (503, "draining"),
    ]  # fmt: skip
    assert seen[0][2] is None
    assert len({reason for _, _, reason in seen}) == 6


def test_an_engine_that_cannot_start_again_is_told_of_in_a_sentence(
    serve: Serve,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise EngineDied(reason=reason)

    reason = "models/mine is not a directory."
    with serve() as (client, service):
        service.engine.state, service.engine.reason = EngineState.DOWN, reason
        ready = client.get("/health/ready")
        service.engine.submit = refuse
        reply = client.post(URL, json=GOOD)

    assert ready.json()["reason"] == reason
    assert reply.status_code == 503
    assert check_shape(reply)["message"] == f"The engine is down: {reason}"
    assert str(EngineDied(reason=reason)) == f"The engine failed while generating: {reason}"


def test_a_draining_server_refuses_new_requests(serve: Serve) -> None:
    with serve() as (client, service):
        service.is_draining = True
        reply = client.post(URL, json=GOOD)

    assert reply.status_code == 503
    assert reply.headers["connection"] == "close"
    assert check_shape(reply)["code"] == "shutting_down"


def test_a_mistake_of_ours_is_a_500_of_the_same_shape(serve: Serve) -> None:
    def script(*_: Any) -> list[int]:
        return [10**6]  # no such id

    with serve(script) as (client, _):
        whole = client.post(URL, json=GOOD)
        stream = client.post(URL, json={**GOOD, "stream": True})
        metrics = client.get("/metrics").text

    assert whole.status_code == 500
    assert 'kvik_requests_finished_total{outcome="error"} 2.0' in metrics
    assert check_shape(whole)["code"] == "internal_error"
    assert whole.headers["x-request-id"]
    assert '"internal_error"' in stream.text
    assert "[DONE]" not in stream.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = [field for field, _ in BAD_FIELDS] + ["zzz"]


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6))
def test_no_json_makes_the_server_fail(
    shared: tuple[TestClient, Service], changes: dict[str, Any]
) -> None:
    for path, body in (
        (URL, {**GOOD, **changes}),
        ("/tokenize", changes),
        ("/detokenize", changes),
    ):
        reply = shared[0].post(
            path,
            content=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        assert reply.status_code < 500, reply.text
        if reply.status_code != 200:
            check_shape(reply)
