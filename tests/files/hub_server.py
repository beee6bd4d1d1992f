"""A small Hugging Face Hub on this machine: what the real client asks to make, fill and read repositories."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_right"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server holds, and how it is to behave."""

    url: str = ""
    repos: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # name -> what was asked for when it was made
    files: dict[str, bytes] = field(default_factory=dict)  # "me/lora/folder/file" -> content
    down: bool = False  # answer everything with an error that the client does not try again
    gate: threading.Event = field(default_factory=threading.Event)  # commits wait for it

    def answer(
        self, method: str, path: str, token: str | None, body: bytes
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON or bytes, and headers of one request."""
        if self.down:
            return 400, {"error": "out of order"}, {}
        if token != TOKEN:
            return 401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in self.repos
            self.repos.setdefault(name, asked)
            return (409 if known else 200), {"url": f"{self.url}/{name}"}, {}
        if path.startswith("/api/models/"):
            return self._api(path.removeprefix("/api/models/"), body)
        return self._resolve(path)

    def _api(self, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        user, repo, action = path.split("/")[:3]
        name = f"{user}/{repo}"
        if name not in self.repos:
            return 404, {"error": "no such repository"}, {"X-Error-Code": "RepoNotFound"}
        if action == "preupload":
            files = json.loads(body)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False}  # content comes with the commit
            return 200, {"files": [{"path": f["path"], **modes} for f in files]}, {}
        if action == "commit":
            self.gate.wait(30)
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[f"{name}/{value['path']}"] = base64.b64decode(value["content"])
            url = f"{self.url}/{name}/commit/{COMMIT}"
            return 200, {"commitUrl": url, "commitOid": COMMIT, "commitMessage": "", "hookOutput": ""}, {}
        names = [path.removeprefix(f"{name}/") for path in self.files if path.startswith(f"{name}/")]
        if action == "tree":
            tree = [
                {
                    "type": "file",
                    "path": n,
                    "size": len(self.files[f"{name}/{n}"]),
                    "oid": self._etag(f"{name}/{n}"),
                }
                for n in names
            ]
            return 200, tree, {}
        return 200, {"id": name, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}, {}

    def _resolve(self, path: str) -> tuple[int, Any, dict[str, str]]:
        parts = path.strip("/").split("/")
        if len(parts) < 5 or parts[2] != "resolve":
            return 404, {"error": "no such page"}, {}
        name = "/".join((*parts[:2], *parts[4:]))
        if name not in self.files:
            return 404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"}
        return 200, self.files[name], {"ETag": f'"{self._etag(name)}"', "X-Repo-Commit": COMMIT}

    def _etag(self, name: str) -> str:
        return hashlib.sha1(self.files[name]).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()
    hub.gate.set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            status, content, headers = hub.answer(
                self.command, unquote(urlsplit(self.path).path), token, body
            )
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = do_PUT = _handle

        def log_message(self, *arguments: object) -> None:
            """Keep the tests' output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()


def point_client_at(hub: Hub, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """What HF_ENDPOINT and HF_HOME do for a new process, for the client imported in this one."""
    resolve = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub.url + resolve)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
