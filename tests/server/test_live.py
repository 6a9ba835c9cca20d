"""Against a live server that nobody disturbs: what it says, what comes, and when."""

import json
import random
import subprocess
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from tests.server.live import LiveServer, connect, raw_request, request, until


def test_it_says_what_it_loaded_and_how_to_ask(server: LiveServer) -> None:
    words = [line.split()[0] for line in server.lines]
    assert words == ["model", "numbers", "threads", "memory", "address", "watch", "try"]
    curl = server.lines[-1].removeprefix("try it   ")
    quick = curl.replace('"max_tokens": 200', '"max_tokens": 5')

    output = subprocess.run(quick, shell=True, capture_output=True, text=True, timeout=60).stdout

    assert output.endswith("data: [DONE]\n\n"), (quick, output)


def test_the_server_process_has_no_torch(server: LiveServer) -> None:
    assert "torch" not in Path(f"/proc/{server.pid}/maps").read_text()
    assert "torch" in Path(f"/proc/{server.worker_pid}/maps").read_text()


def test_tokens_leave_as_they_are_made(server: LiveServer) -> None:
    stream = server.open_stream(max_tokens=1000, n=16, logprobs=5, seed=1)
    events = stream.events()
    next(events)
    num_running = server.metrics()["kvik_num_requests_running", ""]
    rest = list(events)
    stream.close()

    assert num_running > 0  # the first event came long before the last token was made
    assert len(rest) > 1000
    assert stream.is_done
    assert stream.reply.headers["cache-control"] == "no-cache"
    assert stream.reply.headers["x-accel-buffering"] == "no"


@pytest.mark.parametrize(
    "body",
    [
        {"seed": 5, "max_tokens": 100},
        {"seed": 6, "max_tokens": 60, "temperature": 1.9, "n": 3},
        {"temperature": 0, "echo": True, "prompt": "é and the sea"},
        {"seed": 7, "prompt": ["a", " the", ""], "n": 2, "logprobs": 2, "echo": True},
        {"seed": 8, "prompt": " the" * 300, "logprobs": 1, "echo": True, "n": 2},
    ],
    ids=["one", "three", "greedy", "batch", "long"],
)
def test_streamed_and_whole_are_the_same(server: LiveServer, body: dict[str, Any]) -> None:
    whole = server.complete(**body)
    stream = server.open_stream(**body)
    chunks = list(stream.events())
    stream.close()

    for choice in whole["choices"]:
        pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert pieces[-1]["finish_reason"] == choice["finish_reason"] == "length"
        if "logprobs" in body:
            for key, values in choice["logprobs"].items():
                assert [v for piece in pieces for v in piece["logprobs"][key]] == values
    assert chunks[-1]["system_fingerprint"] == whole["system_fingerprint"]


def test_a_reader_that_lags_behind_gets_all_of_it_in_order(server: LiveServer) -> None:
    body = request(max_tokens=400, n=48, logprobs=5, seed=3, prompt="x")
    with connect(server.url, receive_buffer=4096) as connection:
        connection.sendall(raw_request({**body, "stream": True}))
        # More comes than the buffers of both sides hold, and nothing comes any more to wake it.
        until(lambda: server.metric("kvik_num_requests_running") > 0)
        until(lambda: server.metric("kvik_num_requests_running") == 0)
        is_held_up = server.metric("kvik_requests_in_flight") == 1
        with HTTPResponse(connection) as reply:
            reply.begin()
            lines = reply.read().decode().split("\n\n")
    texts = dict.fromkeys(range(48), "")
    for line in lines[:-2]:
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            texts[choice["index"]] += choice["text"]

    assert lines[-2:] == ["data: [DONE]", ""]
    assert is_held_up
    whole = server.complete(**body)["choices"]
    assert [texts[choice["index"]] for choice in whole] == [choice["text"] for choice in whole]


def test_a_batch_equals_its_prompts_alone(server: LiveServer) -> None:
    prompts = ["a", " the end", "é"]

    batch = server.complete(prompt=prompts, seed=3, n=2)
    alone = [server.complete(prompt=prompt, seed=3, n=2) for prompt in prompts]

    texts = [choice["text"] for choice in batch["choices"]]
    assert texts == [choice["text"] for reply in alone for choice in reply["choices"]]


def test_scoring_gives_every_prompt_token_its_logprob(server: LiveServer) -> None:
    reply = server.complete(prompt=" the" * 200 + "x", max_tokens=0, echo=True, logprobs=0)

    logprobs = reply["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == reply["usage"]["prompt_tokens"] == 201
    assert logprobs["token_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])


def test_the_second_of_two_equal_prompts_is_cached(server: LiveServer) -> None:
    prompt = "".join(random.Random(1).choices("abcdefgh ", k=200))

    first, second = (server.complete(prompt=prompt, max_tokens=2, seed=1) for _ in range(2))

    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
    assert first["choices"][0]["text"] == second["choices"][0]["text"]


def test_a_stop_string_ends_the_text_and_the_work(server: LiveServer) -> None:
    plain = server.complete(seed=11, max_tokens=300)["choices"][0]["text"]
    stop = plain[40:45]
    cut = plain[: plain.index(stop)]

    reply = server.complete(seed=11, max_tokens=300, stop=stop)
    stream = server.open_stream(seed=11, max_tokens=300, stop=stop)

    assert reply["choices"][0]["text"] == cut == stream.text()
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] < 300
    stream.close()
