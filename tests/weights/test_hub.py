import errno
import hashlib
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from weights.errors import HubError
from weights.hub import name_of, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"
MODEL_FILES = {
    "config.json": b'{"model_type": "gpt2"}',
    "generation_config.json": b"{}",
    "model.safetensors": b"weights " * 1000,
    "vocab.json": b"{}",
    "merges.txt": b"#version: 0.2\n",
    "tokenizer_config.json": b"{}",
    # What must stay where it is:
    "pytorch_model.bin": b"a pickle",
    "rust_model.ot": b"another",
    "README.md": b"# GPT-2",
    "onnx/config.json": b"{}",
    "models/other.safetensors": b"other weights",
}


class Hub(ThreadingHTTPServer):
    """The routes of the Hugging Face hub that huggingface_hub asks for, and a record of them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Routes)
        self.requests: list[str] = []
        self.cuts_off: str | None = None  # a file whose transfer breaks
        self.commits = {
            "openai/gpt2": {"main": COMMIT, "v1": OLD_COMMIT},
            "openai/pickled": {"main": COMMIT},
            "openai/dataset": {"main": COMMIT},
        }
        self.files = {
            ("openai/gpt2", COMMIT): MODEL_FILES,
            ("openai/gpt2", OLD_COMMIT): {**MODEL_FILES, "config.json": b'{"old": true}'},
            ("openai/pickled", COMMIT): {"config.json": b"{}", "pytorch_model.bin": b"a pickle"},
            ("openai/dataset", COMMIT): {"README.md": b"no model"},
        }
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Routes(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: object) -> None:
        """Keep the tests' output clean."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append(f"{self.command} {path}")
        match path.strip("/").split("/"):
            case ["api", "models", "openai", "gated", *_]:
                self._refuse(403, "GatedRepo", "Access to model openai/gated is restricted.")
            case ["api", "models", "openai", "broken", *_]:
                self._answer(500, b"out of order")
            case ["api", "models", "openai", "portal", *_]:
                self._answer(200, b"<html>Please log in to the network</html>")
            case ["api", "models", owner, name, "revision", revision]:
                commit = self._commit(f"{owner}/{name}", revision)
                files = self.server.files.get((f"{owner}/{name}", commit), {})
                if commit:
                    siblings = [{"rfilename": file} for file in files]
                    facts = {"id": f"{owner}/{name}", "sha": commit, "siblings": siblings}
                    self._answer(200, json.dumps(facts).encode())
            case ["api", "models", owner, name, "tree", revision]:
                commit = self._commit(f"{owner}/{name}", revision)
                files = self.server.files[f"{owner}/{name}", commit]
                tree = [
                    {"type": "file", "path": file, "size": len(content), "oid": _digest(content)}
                    for file, content in files.items()
                ]
                self._answer(200, json.dumps(tree).encode())
            case [owner, name, "resolve", revision, *parts]:
                commit = self._commit(f"{owner}/{name}", revision)
                content = self.server.files[f"{owner}/{name}", commit]["/".join(parts)]
                headers = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": commit}
                length = 100 if parts == [self.server.cuts_off] else len(content)
                self._answer(200, content, headers, length)
            case _:
                self._refuse(404, "EntryNotFound", "no such route")

    def _commit(self, repository: str, revision: str) -> str:
        if repository not in self.server.commits:
            self._refuse(401, "RepoNotFound", "Repository not found")
            return ""
        commits = self.server.commits[repository]
        commit = revision if revision in commits.values() else commits.get(revision, "")
        if not commit:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _answer(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:length])


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    # The tests of others may run with HF_HUB_OFFLINE; huggingface_hub reads it once, on import.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server = Hub()
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def closed_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_local_directory_is_returned_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()

    assert resolve(str(tmp_path / "model")) == tmp_path / "model"


def test_model_is_called_what_its_user_calls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "step-00000750").mkdir()
    (tmp_path / "best").symlink_to("step-00000750")
    monkeypatch.chdir(tmp_path / "step-00000750")

    assert name_of(str(tmp_path / "best")) == "best"
    assert name_of("../best/") == "best"
    assert name_of(".") == "step-00000750"
    assert name_of("openai-community/gpt2") == "openai-community/gpt2"


def test_name_becomes_a_directory_of_safetensors_config_and_tokenizer(
    hub: Hub, cache: Path
) -> None:
    directory = resolve("openai/gpt2", endpoint=hub.address, cache_directory=cache)

    names = {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
    }
    for name in names:
        assert (directory / name).read_bytes() == MODEL_FILES[name]


def test_pickles_are_never_asked_for(hub: Hub, cache: Path) -> None:
    resolve("openai/gpt2", endpoint=hub.address, cache_directory=cache)

    assert hub.requests
    assert not [request for request in hub.requests if ".bin" in request or ".ot" in request]


def test_revision_follows_an_at_sign(hub: Hub, cache: Path) -> None:
    directory = resolve("openai/gpt2@v1", endpoint=hub.address, cache_directory=cache)

    assert (directory / "config.json").read_bytes() == b'{"old": true}'


def test_second_time_nothing_is_fetched_again(hub: Hub, cache: Path) -> None:
    first = resolve("openai/gpt2", endpoint=hub.address, cache_directory=cache)
    hub.requests.clear()

    second = resolve("openai/gpt2", endpoint=hub.address, cache_directory=cache)

    assert second == first
    assert not [request for request in hub.requests if "/resolve/" in request]


def test_what_was_fetched_once_is_there_without_the_hub(cache: Path, hub: Hub) -> None:
    address = hub.address
    first = resolve("openai/gpt2", endpoint=address, cache_directory=cache)
    hub.close()

    assert resolve("openai/gpt2", endpoint=address, cache_directory=cache) == first


def test_unreachable_hub_is_said_and_not_blamed_on_the_name(hub: Hub, cache: Path) -> None:
    with pytest.raises(HubError) as refusal:
        resolve("openai/gpt2", endpoint=closed_port(), cache_directory=cache)

    message = str(refusal.value)
    assert message.startswith("There is no directory openai/gpt2 here, it was not downloaded befor")
    assert "cannot be reached" in message
    assert "refused" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("openai/gpt3", r"no model of that name .* Check the spelling; if the model is private"),
        ("openai/gated", r"openai/gated is gated: .* hf auth login"),
        ("openai/gpt2@v7", r"openai/gpt2 is on http.*, but has no revision v7\."),
        ("openai/broken", r"cannot be reached \(Server error '500 Internal Server Error'"),
        ("openai/portal", r"an answer about openai/portal that is not a hub's .* login page"),
        ("openai/pickled", r"only as pytorch_model\.bin: .* kvik convert pickled pickled-safeten"),
        ("openai/dataset", r"has no \*\.safetensors file .* It holds README\.md\."),
        ("openai/double--dash", r"neither a directory nor a name on the hub"),
    ],
)
def test_refusal_says_what_is_wrong_and_what_to_do(
    hub: Hub, cache: Path, name: str, message: str
) -> None:
    with pytest.raises(HubError, match=message) as refusal:
        resolve(name, endpoint=hub.address, cache_directory=cache)

    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "model", ["./modle", "modle", "{here}/modle", "{here}/modle/deeper", "a b"]
)
def test_misspelt_path_is_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub, model: str
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    path = model.format(here=tmp_path)

    with pytest.raises(HubError) as refusal:
        resolve(path, endpoint=hub.address)

    assert f"There is no directory {path}: " in str(refusal.value)
    assert (f"Did you mean {tmp_path / 'model'}?" in str(refusal.value)) is ("modle" in path)
    assert hub.requests == []


def test_name_under_an_existing_directory_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    (tmp_path / "runs" / "step-2000").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    with pytest.raises(HubError, match=r"There is no directory runs/step-200: .*step-2000\?"):
        resolve("runs/step-200", endpoint=hub.address)

    assert hub.requests == []


def test_broken_transfer_is_said_and_made_good_later(hub: Hub, cache: Path) -> None:
    hub.cuts_off = "model.safetensors"
    with pytest.raises(HubError, match=r"openai/gpt2 cannot be downloaded: .* try again\."):
        resolve("openai/gpt2", endpoint=hub.address, cache_directory=cache)
    hub.cuts_off = None

    directory = resolve("openai/gpt2", endpoint=hub.address, cache_directory=cache)

    assert (directory / "model.safetensors").read_bytes() == MODEL_FILES["model.safetensors"]


def test_file_in_place_of_a_directory_is_to_be_converted(tmp_path: Path) -> None:
    (tmp_path / "ckpt.pt").write_bytes(b"")

    with pytest.raises(HubError, match=r"ckpt\.pt is a file, .* kvik convert .*ckpt\.pt DIRECTORY"):
        resolve(str(tmp_path / "ckpt.pt"))


def test_a_directory_behind_a_closed_one_is_refused_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(path: Path) -> bool:  # nothing is closed to root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_dir", closed)

    with pytest.raises(HubError, match=r"/model cannot be read: Permission denied\.$"):
        resolve(str(tmp_path / "model"))


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)

    with pytest.raises(HubError, match=r"pip install 'kvik\[hub\]'"):
        resolve("openai/gpt2")
