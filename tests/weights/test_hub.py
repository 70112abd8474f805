"""Models by directory and by hub id, the latter from a hub on the loopback interface."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

from headrace.errors import CheckpointError
from headrace.weights.hub import resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "mill/tiny-model"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 64,
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"a b",
    "pytorch_model.bin": b"pickled",
    "consolidated.safetensors": b"the same weights once more",
    "original/params.json": b"{}",
    "README.md": b"# tiny",
}
WANTED = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "chat_template.jinja",
    "merges.txt",
}


class FakeHub(ThreadingHTTPServer):
    """The part of the hub's interface that a download needs."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.files = dict(FILES)
        self.refusal: tuple[int, str] | None = None
        self.refused_paths = "/"
        self.downloads: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class FakeHubHandler(BaseHTTPRequestHandler):
    """Answers /api/models/{id}/revision, /api/models/{id}/tree and /{id}/resolve."""

    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        refusal = self.server.refusal
        if refusal is not None and path.startswith(self.server.refused_paths):
            self.reply(refusal[0], b"{}", {"X-Error-Code": refusal[1]})
        elif path in (f"/api/models/{MODEL}/revision/main", f"/api/models/{MODEL}/revision/v2"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self.reply_json({"id": MODEL, "sha": COMMIT, "siblings": siblings})
        elif path == f"/api/models/{MODEL}/tree/{COMMIT}":
            self.reply_json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": self.etag(data)}
                    for name, data in self.server.files.items()
                ]
            )
        elif path.startswith(f"/{MODEL}/resolve/{COMMIT}/"):
            self.reply_file(path.removeprefix(f"/{MODEL}/resolve/{COMMIT}/"))
        elif path.startswith(f"/api/models/{MODEL}/revision/"):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def reply_file(self, name: str) -> None:
        data = self.server.files[name]
        if self.command == "GET":
            self.server.downloads.append(name)
        self.reply(200, data, {"ETag": f'"{self.etag(data)}"', "X-Repo-Commit": COMMIT})

    def reply_json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    @staticmethod
    def etag(data: bytes) -> str:
        return hashlib.sha1(data, usedforsecurity=False).hexdigest()

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""


@pytest.fixture(autouse=True)
def clean_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxy, no offline switch, no login and no open connection from outside the test."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def no_hub() -> str:
    """A URL at which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_downloads_what_a_model_needs_and_nothing_else(hub: FakeHub, tmp_path: Path) -> None:
    path = resolve_model(MODEL, None, str(tmp_path), endpoint=hub.url)
    assert path.is_relative_to(tmp_path)
    assert names(path) == WANTED
    assert (path / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert set(hub.downloads) == WANTED


def test_downloads_a_tokenizer_without_the_weights(hub: FakeHub, tmp_path: Path) -> None:
    path = resolve_model(MODEL, "v2", str(tmp_path), weights=False, endpoint=hub.url)
    assert names(path) == WANTED - {"model.safetensors"}


def test_downloads_once_and_then_works_without_the_hub(
    hub: FakeHub, no_hub: str, tmp_path: Path
) -> None:
    first = resolve_model(MODEL, None, str(tmp_path), endpoint=hub.url)
    downloads = len(hub.downloads)
    assert resolve_model(MODEL, None, str(tmp_path), endpoint=hub.url) == first
    assert len(hub.downloads) == downloads
    assert resolve_model(MODEL, None, str(tmp_path), endpoint=no_hub) == first


def test_an_incomplete_cache_is_not_taken_without_the_hub(
    hub: FakeHub, no_hub: str, tmp_path: Path
) -> None:
    path = resolve_model(MODEL, None, str(tmp_path), endpoint=hub.url)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be reached|has no \*\.safetensors"):
        resolve_model(MODEL, None, str(tmp_path), endpoint=no_hub)


def test_a_repository_without_safetensors(hub: FakeHub, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors.*save_pretrained"):
        resolve_model(MODEL, None, str(tmp_path), endpoint=hub.url)


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((404, "RepoNotFound"), "no such model.*hf auth login"),
        ((401, "RepoNotFound"), "no such model.*hf auth login"),
        ((403, "GatedRepo"), f"gated.*{MODEL}.*hf auth login"),
        ((500, ""), "cannot be reached.*directory of a copy"),
    ],
)
def test_the_hub_refuses(
    hub: FakeHub, tmp_path: Path, refusal: tuple[int, str], message: str
) -> None:
    hub.refusal = refusal
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve_model(MODEL, None, str(tmp_path), endpoint=hub.url)
    assert "\n" not in str(caught.value)
    assert "is not a directory" in str(caught.value)


def test_a_gated_model_whose_list_of_files_is_public(hub: FakeHub, tmp_path: Path) -> None:
    hub.refusal, hub.refused_paths = (403, "GatedRepo"), f"/{MODEL}/resolve"
    with pytest.raises(CheckpointError, match="gated"):
        resolve_model(MODEL, None, str(tmp_path), endpoint=hub.url)


def test_unknown_model(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model"):
        resolve_model("mill/other", None, str(tmp_path), endpoint=hub.url)


def test_unknown_revision(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no revision 'v9'"):
        resolve_model(MODEL, "v9", str(tmp_path), endpoint=hub.url)


def test_no_network_and_nothing_cached(no_hub: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"cannot be reached and {tmp_path}"):
        resolve_model(MODEL, None, str(tmp_path), endpoint=no_hub)


def test_offline_mode(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="directory of a copy"):
        resolve_model(MODEL, None, str(tmp_path), endpoint=hub.url)


def test_full_disk(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_file = Path.open

    def open_on_full_disk(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> IO[Any]:
        file = open_file(path, mode, *args, **kwargs)
        if mode != "r" and path.name.endswith(".incomplete"):
            file.close()
            return FullDiskFile()
        return file

    monkeypatch.setattr(Path, "open", open_on_full_disk)
    with pytest.raises(CheckpointError, match=f"disk of {tmp_path} is full.*download_dir"):
        resolve_model(MODEL, None, str(tmp_path), endpoint=hub.url)
    monkeypatch.undo()
    assert names(resolve_model(MODEL, None, str(tmp_path), endpoint=hub.url)) == WANTED


class FullDiskFile(IO[Any]):
    """A file on a disk without room."""

    def __enter__(self) -> FullDiskFile:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was written."""

    def write(self, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_read_only_cache(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(path: str | Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=f"{tmp_path} cannot be written to.*download_dir"):
        resolve_model(MODEL, None, str(tmp_path), endpoint=hub.url)


def test_a_local_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (tmp_path / name).touch()
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        (directory / name).touch()
    assert resolve_model("~/model") == directory


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ([], r"no config\.json and no \*\.safetensors"),
        (["config.json", "model.onnx"], r"has no \*\.safetensors.*save_pretrained"),
        (["model.safetensors"], r"has no config\.json;"),
    ],
)
def test_a_directory_that_is_no_checkpoint(
    tmp_path: Path, present: list[str], message: str
) -> None:
    for name in present:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=message):
        resolve_model(str(tmp_path))


def test_a_tokenizer_directory_needs_no_weights(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").touch()
    assert resolve_model(str(tmp_path), weights=False) == tmp_path


def test_a_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="give the directory"):
        resolve_model(str(file))


@pytest.mark.parametrize(
    "model", ["", "llama", "./llama", "/no/such/dir", "a/b/c", "org/na me", "a" * 5000, "\0"]
)
def test_neither_a_directory_nor_a_hub_id(model: str) -> None:
    with pytest.raises(CheckpointError, match=r"directory with config\.json.*org/name"):
        resolve_model(model)


PIECES = [f"model-Q8_0-{number:05d}-of-00002.gguf" for number in (1, 2)]


@pytest.fixture
def gguf_hub(hub: FakeHub) -> FakeHub:
    """A repository of GGUF files alone, one of them in pieces."""
    for name in [name for name in hub.files if name.endswith(".safetensors")]:
        del hub.files[name]
    hub.files |= {name: name.encode() for name in ("model-Q4_K_M.gguf", "model-Q4_0.gguf", *PIECES)}
    return hub


@pytest.mark.parametrize(
    ("chosen", "wanted"), [("Q4_K_M", ["model-Q4_K_M.gguf"]), ("Q8_0", PIECES)]
)
def test_downloads_the_file_that_is_named(
    chosen: str, wanted: list[str], gguf_hub: FakeHub, tmp_path: Path
) -> None:
    path = resolve_model(f"{MODEL}:{chosen}", None, str(tmp_path), endpoint=gguf_hub.url)
    assert path.name == wanted[0] and path.read_bytes() == wanted[0].encode()
    assert sorted(gguf_hub.downloads) == wanted


@pytest.mark.parametrize(
    ("chosen", "message"),
    [("Q4", r"found: model-Q4_0\.gguf, model-Q4_K_M\.gguf"), ("Q2_K", "found: none")],
)
def test_one_file_must_have_the_name(
    chosen: str, message: str, gguf_hub: FakeHub, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        resolve_model(f"{MODEL}:{chosen}", None, str(tmp_path), endpoint=gguf_hub.url)


def test_a_repository_of_files_says_how_one_is_named(gguf_hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="org/name:Q4_K_M"):
        resolve_model(MODEL, None, str(tmp_path), endpoint=gguf_hub.url)


def test_a_file_is_a_model(tmp_path: Path) -> None:
    file = tmp_path / "Model-Q4_0.GGUF"
    file.touch()
    assert resolve_model(str(file)) == file
    file.with_suffix(".gguf").touch()
    with pytest.raises(CheckpointError, match=r"holds GGUF files; give the path of one"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / name).touch()
    for model in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=r"can run any code.*save_pretrained"):
            resolve_model(str(model))
