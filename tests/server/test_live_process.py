"""The server as a process: how it starts, what prevents that, and how signals end it."""

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from tests.server.live import (
    ROOT,
    LiveServer,
    command,
    environment,
    live_server,
    request,
    until,
)

Start = Callable[..., LiveServer]


@pytest.fixture
def start(live_checkpoint: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a server that ends with the test."""
    with contextlib.ExitStack() as servers:

        def start_one(*options: str) -> LiveServer:
            server = live_server(live_checkpoint, tmp_path / "stderr", *options)
            return servers.enter_context(server)

        yield start_one


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
    name = path if path.is_dir() else model

    with live_server(name, tmp_path / "stderr") as server, server.client() as client:
        (card,) = client.get("/v1/models").json()["data"]

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
            refusal("--max-num-scheduled-tokens", "10", checkpoint=live_checkpoint),
            refusal("--hang-seconds", "0", checkpoint=live_checkpoint),
        ]

    for status, message in cases:
        assert status == 1
        assert "Traceback" not in message
        assert message.splitlines()[-1].startswith("error:")
        assert "ERROR" not in message  # the log would only say it again
    assert "nowhere" in cases[0][1]
    assert "model.safetensors" in cases[1][1]
    assert port in cases[2][1]
    assert "raise --num-blocks to" in cases[3][1]
    assert "TLS" in cases[4][1]
    assert "error: --max-num-scheduled-tokens must be at least --max-num-seq" in cases[6][1]
    assert "error: --hang-seconds must be positive, got 0" in cases[7][1]


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
