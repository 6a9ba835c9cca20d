"""Against a live server with short times and little room: stalled readers, floods and nonsense."""

import concurrent.futures
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path

import pytest

from tests.server.live import (
    LiveServer,
    books_are_closed,
    connect,
    live_server,
    raw_request,
    request,
    until,
)


@pytest.fixture(scope="module")
def impatient(
    live_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server with short times and little room."""
    with live_server(
        live_checkpoint, tmp_path_factory.mktemp("log") / "stderr",
        "--keepalive-seconds", "0.3", "--stalled-reader-seconds", "0.6",
        "--hung-after-seconds", "0.5", "--receive-seconds", "1", "--max-num-sequences", "64",
        "--max-waiting-requests", "16",
    ) as server:  # fmt: skip
        yield server


def test_a_silent_stream_is_kept_alive_and_a_hung_engine_is_told_of(impatient: LiveServer) -> None:
    stream = impatient.open_stream(max_tokens=400, seed=2)
    events = stream.events()
    next(events)
    worker = impatient.worker_pid
    os.kill(worker, signal.SIGSTOP)
    try:
        with impatient.client() as client:
            until(lambda: client.get("/health/ready").json()["status"] == "engine_hung")
            assert client.get("/health/live").status_code == 200
            time.sleep(0.7)
    finally:
        os.kill(worker, signal.SIGCONT)
    for _ in events:
        pass
    stream.close()

    assert stream.is_done
    assert stream.comments >= 2
    with impatient.client() as client:
        assert client.get("/health/ready").status_code == 200


def test_a_reader_that_stalls_is_dropped(impatient: LiveServer) -> None:
    before = impatient.metric("kvik_stalled_readers_total")
    connection = connect(impatient.url, receive_buffer=4096)
    connection.sendall(
        raw_request(request(max_tokens=400, n=48, logprobs=5, stream=True, prompt="x"))
    )

    until(lambda: impatient.metric("kvik_stalled_readers_total") == before + 1)
    until(lambda: books_are_closed(impatient))

    connection.close()
    assert impatient.complete(max_tokens=2)["usage"]["completion_tokens"] == 2


def test_overload_is_refused_at_once_and_what_was_accepted_is_finished(
    impatient: LiveServer,
) -> None:
    def ask(number: int) -> tuple[int, float]:
        start = time.monotonic()
        with impatient.client() as client:
            reply = client.post("/v1/completions", json=request(max_tokens=40, n=16, seed=number))
        if reply.status_code == 429:
            assert int(reply.headers["retry-after"]) >= 1
        return reply.status_code, time.monotonic() - start

    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        replies = list(pool.map(ask, range(60)))

    statuses = [status for status, _ in replies]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 5  # so many fit at the least
    until(lambda: books_are_closed(impatient))


def talk(url: str, data: bytes, *, pause: float = 0) -> bytes:
    """Send bytes and read until the server hangs up."""
    connection = connect(url)
    with connection:
        try:
            connection.sendall(data)
            time.sleep(pause)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        except ConnectionError:
            pass
    return answer


def read_answer(connection: socket.socket) -> int:
    """Read one answer whole, in however many packets it comes; its status."""
    with HTTPResponse(connection) as answer:
        answer.begin()
        answer.read()
        return answer.status


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 40_000, 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 4000 + b"\r\n", 431),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\n", 408),
        (b"", 408),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: 10\r\n\r\n{",
            408,
        ),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n{",
            413,
        ),
    ],
    ids=["header", "endless", "many", "line", "nonsense", "tls", "slow", "mute", "body", "length"],
)
def test_abuse_of_http_gets_an_answer_of_our_shape(
    impatient: LiveServer, data: bytes, status: int
) -> None:
    answer = talk(impatient.url, data)

    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("pause", [0, 0.2])
def test_an_offer_of_http2_is_passed_over(impatient: LiveServer, pause: float) -> None:
    data = raw_request(request(max_tokens=2))
    head, _, body = data.partition(b"\r\n\r\n")
    offer = (
        b"\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n\r\n"
    )

    with connect(impatient.url) as connection:
        for beginning in (head + offer, head + b"\r\n\r\n"):
            connection.sendall(beginning)
            time.sleep(pause)
            connection.sendall(body)
            assert read_answer(connection) == 200


@pytest.mark.parametrize("begin", [b"0\r\n", b"1;"], ids=["trailers", "extension"])
@pytest.mark.parametrize("line", [b"X: " + b"a" * 10_000 + b"\r\n", b"a" * 10_000])
def test_what_is_neither_head_nor_body_has_an_end(
    impatient: LiveServer, begin: bytes, line: bytes
) -> None:
    with connect(impatient.url) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n" + begin
        )

        with pytest.raises(ConnectionError):
            connection.sendall(3000 * line)  # more than the buffers of both sides hold


def test_an_unused_connection_stays_open_for_the_next_request(impatient: LiveServer) -> None:
    with connect(impatient.url) as connection:
        for pause in (5.5, 0):  # longer than uvicorn's own patience, and than a head may take
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: test\r\n\r\n")
            assert read_answer(connection) == 200
            time.sleep(pause)
