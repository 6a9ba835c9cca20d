"""Against a live server: a worker that dies, clients that leave, and time that runs out."""

import concurrent.futures
import os
import random
import signal
import statistics
import time
from typing import Any

import pytest

from tests.server.live import (
    LiveServer,
    books_are_closed,
    connect,
    raw_request,
    request,
    until,
)


def test_a_worker_killed_midway_changes_nothing(server: LiveServer) -> None:
    body: dict[str, Any] = {"max_tokens": 600, "seed": 21, "n": 2}
    undisturbed = server.complete(**body)
    killed = server.worker_pid

    stream = server.open_stream(**body)
    texts = {0: "", 1: ""}
    for number, event in enumerate(stream.events()):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
        if number == 50:
            os.kill(killed, signal.SIGKILL)
    stream.close()

    assert stream.is_done
    assert [texts[0], texts[1]] == [choice["text"] for choice in undisturbed["choices"]]
    assert server.worker_pid != killed
    assert server.metric("kvik_engine_restarts_total") == 1


def test_readiness_tells_of_a_dead_engine_and_of_its_return(server: LiveServer) -> None:
    os.kill(server.worker_pid, signal.SIGKILL)
    with server.client() as client:

        def tells_why() -> bool:
            answer = client.get("/health/ready")
            # How it ended is known when its remains are seen to, a moment after it is missed.
            return answer.status_code == 503 and "signal SIGKILL" in answer.json()["reason"]

        until(tells_why, 5)
        down = client.get("/health/ready").json()
        assert client.get("/health/live").status_code == 200
        until(lambda: client.get("/health/ready").status_code == 200, 60)

    assert down["status"] == "engine_down"
    assert "signal SIGKILL" in down["reason"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_what_it_had_at_once(server: LiveServer, stream: bool) -> None:
    aborted = server.metric("kvik_requests_finished_total", "abort")
    other = server.open_stream(max_tokens=1000, seed=1)
    events = other.events()
    next(events)
    seconds = []
    for _ in range(5):
        connection = connect(server.url)
        connection.sendall(raw_request(request(max_tokens=1000, stream=stream, n=4)))
        until(lambda: server.metric("kvik_num_requests_running") >= 4)

        connection.close()
        seconds.append(until(lambda: server.metric("kvik_num_requests_running") <= 1))

    # A step takes milliseconds here. One of five may meet a machine that is busy with something
    # else, and a server that looks for its clients now and then would fail most of them.
    assert statistics.median(seconds) < 0.2, seconds
    until(lambda: server.metric("kvik_requests_finished_total", "abort") == aborted + 5)
    for _ in events:
        pass
    other.close()
    assert other.is_done


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_a_request_with_another_behind_it(
    server: LiveServer, stream: bool
) -> None:
    aborted = server.metric("kvik_requests_finished_total", "abort")
    with connect(server.url) as connection:
        connection.sendall(
            raw_request(request(max_tokens=1000, stream=stream, n=4)) + raw_request(request())
        )
        until(lambda: server.metric("kvik_num_requests_running") >= 4)

    until(lambda: server.metric("kvik_requests_finished_total", "abort") == aborted + 1)


def test_blocks_and_counts_are_as_before_when_all_have_left(server: LiveServer) -> None:
    connection = connect(server.url)
    connection.sendall(raw_request(request(max_tokens=900, n=4)))
    until(lambda: server.metric("kvik_num_requests_running") == 4)
    connection.close()

    until(lambda: server.metric("kvik_num_requests_running") == 0)
    assert server.metric("kvik_kv_cache_blocks", "used") == 0
    assert books_are_closed(server)


def test_timeout_s_ends_a_long_request(server: LiveServer) -> None:
    start = time.monotonic()
    # Far more work than a fifth of a second holds, on any machine.
    long = {"max_tokens": 1000, "n": 16, "logprobs": 5, "timeout_s": 0.2}
    with server.client() as client:
        reply = client.post("/v1/completions", json=request(**long))
    stream = server.open_stream(**long)
    stream.text()
    stream.close()

    assert reply.status_code == 504
    assert stream.error is not None
    assert stream.error["code"] == "timeout"
    assert not stream.is_done
    assert time.monotonic() - start < 5


def test_an_abort_storm_leaves_the_books_closed(server: LiveServer) -> None:
    chance = random.Random(7)
    whole = server.complete(temperature=0, max_tokens=64)["choices"][0]["text"]

    def ask(number: int) -> str | None:
        body = request(temperature=0, max_tokens=64, stream=number % 2 == 0)
        if number % 3:
            connection = connect(server.url)
            connection.sendall(raw_request(body))
            if number % 2 == 0:
                connection.recv(chance.randrange(1, 2000))
            else:
                time.sleep(chance.random() * 0.05)
            connection.close()
            return None
        if body["stream"]:
            stream = server.open_stream(temperature=0, max_tokens=64)
            text = stream.text()
            stream.close()
            return text if stream.is_done else "not done"
        text = server.complete(temperature=0, max_tokens=64)["choices"][0]["text"]
        return str(text)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        texts = [text for text in pool.map(ask, range(120)) if text is not None]

    assert texts == [whole] * 40
    until(lambda: books_are_closed(server))
    until(lambda: server.metric("kvik_kv_cache_blocks", "used") == 0)
