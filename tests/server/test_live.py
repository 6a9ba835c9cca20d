"""Against live servers: what comes when, and what happens to those who leave, stall or die."""

import concurrent.futures
import json
import os
import random
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.server.live import (
    ROOT,
    LiveServer,
    command,
    connect,
    environment,
    raw_request,
    request,
    until,
)
from tests.tiny_models import tiny_checkpoint, tiny_config, tiny_gpt

OUTCOMES = ("stop", "length", "abort", "error", "rejected", "timeout")
N_CTX = 1024


@pytest.fixture(scope="module")
def live_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 1024 tokens' context that takes some milliseconds a step."""
    config = tiny_config(n_layer=4, n_embd=64, n_ctx=N_CTX)
    return tiny_checkpoint(tmp_path_factory.mktemp("live") / "tiny", model=tiny_gpt(config))


Start = Callable[..., LiveServer]


@pytest.fixture(scope="module")
def start_shared(
    live_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Start]:
    """Starts servers that end with the module."""
    servers: list[LiveServer] = []

    def start(*options: str) -> LiveServer:
        log = tmp_path_factory.mktemp("log") / "stderr"
        servers.append(LiveServer(live_checkpoint, log, *options))
        return servers[-1].wait_until_ready()

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def start(live_checkpoint: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a server that ends with the test."""
    servers: list[LiveServer] = []

    def start_one(*options: str) -> LiveServer:
        servers.append(LiveServer(live_checkpoint, tmp_path / "stderr", *options))
        return servers[-1].wait_until_ready()

    yield start_one
    for server in servers:
        server.kill()


@pytest.fixture(scope="module")
def server(start_shared: Start) -> LiveServer:
    """A server for the tests that leave it as it was, but for its counts."""
    return start_shared("--log-level", "debug")


@pytest.fixture(scope="module")
def impatient(start_shared: Start) -> LiveServer:
    """A server with short times and little room."""
    return start_shared(
        "--keepalive-seconds", "0.3", "--stalled-reader-seconds", "0.6",
        "--hung-after-seconds", "0.5", "--receive-seconds", "1", "--max-num-sequences", "64",
        "--max-waiting-requests", "16",
    )  # fmt: skip


def books_are_closed(server: LiveServer) -> bool:
    metrics = server.metrics()
    finished = sum(metrics["kvik_requests_finished_total", outcome] for outcome in OUTCOMES)
    return (
        metrics["kvik_requests_in_flight", ""] == 0
        and finished == metrics["kvik_requests_received_total", ""]
    )


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


@pytest.mark.parametrize("model", ["runs/best", "owner/tiny"])
def test_a_model_is_served_under_the_name_its_user_gave(
    live_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "best").symlink_to(live_checkpoint)  # as a run's best leads to a step
    downloaded = tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(live_checkpoint, downloaded / "snapshots" / ("0" * 40))
    (downloaded / "refs").mkdir()
    (downloaded / "refs" / "main").write_text("0" * 40)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / model

    server = LiveServer(path if path.is_dir() else model, tmp_path / "stderr")
    try:
        server.wait_until_ready()
        with server.client() as client:
            (card,) = client.get("/v1/models").json()["data"]
    finally:
        server.kill()

    assert card["id"] == ("best" if path.is_dir() else model)


def test_sigterm_finishes_what_runs_and_takes_nothing_new(start: Start) -> None:
    server = start()
    stream = server.open_stream(max_tokens=900, seed=4)
    events = stream.events()
    next(events)

    server.process.send_signal(signal.SIGTERM)
    with server.client() as client:
        until(lambda: client.get("/health/ready").json()["status"] == "draining", 10)
        refused = client.post("/v1/completions", json=request())
        live = client.get("/health/live")
    rest = list(events)
    stream.close()

    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "shutting_down"
    assert live.status_code == 200
    assert stream.is_done
    assert rest[-1]["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(30) == 0


def test_sigterm_to_all_processes_finishes_what_runs_as_well(start: Start) -> None:
    server = start()
    stream = server.open_stream(max_tokens=900, seed=4)
    events = stream.events()
    next(events)

    for pid in (server.worker_pid, server.pid):  # as systemd does
        os.kill(pid, signal.SIGTERM)
    *_, last = events
    stream.close()

    assert stream.is_done
    assert last["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(30) == 0
    assert "engine died" not in server.log.read_text()


def test_what_outlasts_the_drain_ends_with_an_error_and_never_with_done(start: Start) -> None:
    server = start("--drain-seconds", "0.2")
    stream = server.open_stream(max_tokens=1000, n=16, logprobs=5, seed=4)
    worker = server.worker_pid
    events = stream.events()
    next(events)

    server.process.send_signal(signal.SIGTERM)
    for _ in events:
        pass
    stream.close()

    assert not stream.is_done
    assert stream.error is not None
    assert stream.error["code"] == "shutting_down"
    assert server.process.wait(30) == 0
    until(lambda: not Path(f"/proc/{worker}").exists(), 5)


def test_a_second_sigterm_ends_at_once(start: Start) -> None:
    server = start()
    stream = server.open_stream(max_tokens=1000, n=8, seed=4)
    worker = server.worker_pid
    next(stream.events())

    server.process.send_signal(signal.SIGTERM)
    with server.client() as client:
        until(lambda: client.get("/health/ready").json()["status"] == "draining", 10)
    server.process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    status = server.process.wait(30)

    assert status == 128 + signal.SIGTERM
    assert time.monotonic() - begin < 2
    until(lambda: not Path(f"/proc/{worker}").exists(), 5)
    stream.close()


def refusal(*options: str, checkpoint: Path | str) -> tuple[int, str]:
    """How a server that cannot start ends: its status and what it says."""
    done = subprocess.run(
        command(checkpoint, *options), capture_output=True, text=True, timeout=120, cwd=ROOT,
        env=environment(),
    )  # fmt: skip
    assert not done.stdout
    return done.returncode, done.stderr


def test_what_prevents_a_start_is_told_in_a_sentence(live_checkpoint: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in live_checkpoint.iterdir():
        (cut / file.name).write_bytes(file.read_bytes())
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = [
            refusal(checkpoint=tmp_path / "nowhere"),
            refusal(checkpoint=cut),
            refusal("--port", port, checkpoint=live_checkpoint),
            refusal("--num-blocks", "3", checkpoint=live_checkpoint),
            refusal("--tls-certificate", str(cut / "config.json"), checkpoint=live_checkpoint),
            refusal("--api-key-file", str(tmp_path / "nowhere"), checkpoint=live_checkpoint),
        ]

    for status, message in cases:
        assert status == 1
        assert "Traceback" not in message
        assert message.splitlines()[-1].startswith("error:")
        assert "ERROR" not in message  # the log would only say it again
    assert "nowhere" in cases[0][1]
    assert "model.safetensors" in cases[1][1]
    assert port in cases[2][1]
    assert "num_blocks" in cases[3][1]
    assert "TLS" in cases[4][1]


def test_https_with_a_certificate_and_a_key(start: Start, tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-out", str(certificate),
         "-keyout", str(key)],
        capture_output=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    server = start("--tls-certificate", str(certificate), "--tls-key", str(key))

    context = ssl.create_default_context(cafile=certificate)
    with httpx2.Client(verify=context, trust_env=False, timeout=60) as client:
        reply = client.post(f"{server.url}/v1/completions", json=request())

    assert server.url.startswith("https://")
    assert reply.status_code == 200
