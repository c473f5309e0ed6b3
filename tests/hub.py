"""A Hub on this machine, for the real client: repositories of one account, which a token may write to."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

TOKEN, OWNER = "hf_right", "me"


@dataclass
class FakeHub:
    """What it holds and was asked. ``fails``: parts of addresses that are answered with an error of the server's.

    ``repositories``: by name, whether private and the files. ``others``: names that are somebody else's.
    """

    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    fails: set[str] = field(default_factory=set)
    url: str = ""

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON."""
        self.asked.append(f"{method} {path}")
        if any(part in path for part in self.fails):
            return 503, {"error": "the disk of the Hub is full"}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name, _, asked = path.removeprefix("/api/models/").partition("/")
        owner, name = name, f"{name}/{asked.partition('/')[0]}"
        if path.endswith("/auth-check/write"):
            return (403, {"error": "no write access"}) if owner != OWNER else (200, {})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if "/commit/" in path:
            return self._commit(name, [json.loads(line) for line in body.splitlines()])
        return (200, {"id": name}) if name in self.repositories or name in self.others else (404, {"error": "no"})

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        owner = asked["organization"] or OWNER
        name = f"{owner}/{asked['name']}"
        if owner != OWNER:
            return 403, {"error": f"You don't have the rights to create a model under the namespace {owner}"}
        if name in self.repositories:
            return 409, {"error": "exists", "url": f"{self.url}/{name}"}
        self.repositories[name] = {"private": asked.get("visibility") == "private", "files": {}}
        return 200, {"url": f"{self.url}/{name}"}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines[1:]}
        self.repositories[name]["files"] |= files
        return 200, {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1", "pullRequestUrl": None}


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """One that the Hub's client asks in the place of the real one, with a token that it takes."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, said = hub.answer(self.command, self.path, self.headers.get("Authorization", ""), body)
            sent = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
