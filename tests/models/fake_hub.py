"""A Hugging Face hub on 127.0.0.1 that serves one model and refuses others in every way that the real one does."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"

REFUSALS: dict[str, tuple[int, dict[str, str]]] = {
    "org/missing": (401, {}),
    "org/gone": (404, {"X-Error-Code": "RepoNotFound"}),
    "org/bad-token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "org/forbidden": (403, {}),
    "org/down": (500, {}),
    "org/busy": (429, {}),
}
"""Repository -> status and headers of every answer about it."""

LISTINGS: dict[str, list[str]] = {
    "org/gated": ["config.json", "model.safetensors"],
    "org/pickle": ["config.json", "pytorch_model.bin"],
    "org/gguf": ["config.json", "model.Q4_K_M.gguf"],
    "org/no-config": ["README.md", "model.safetensors"],
}
"""Repositories whose list of files can be read, but no file."""


class HubServer(ThreadingHTTPServer):
    """Serves the files of `model` as org/good and remembers the paths that were asked for a model."""

    def __init__(self, model: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = {path.name: path.read_bytes() for path in sorted(model.iterdir())}
        self.paths: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    """The three routes that downloads use: a model's info, its tree, a file."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args: Any) -> None:
        """Keep the terminal quiet."""

    def _answer(self) -> None:
        # huggingface_hub asks for a list of coding agents by itself.
        if self.path != "/api/agent-harnesses":
            self.server.paths.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._send(*self._listing("/".join(parts[2:4]), parts[4:]))
        else:
            self._send(*self._file("/".join(parts[:2]), "/".join(parts[4:])))

    def _listing(self, repo: str, rest: list[str]) -> tuple[int, dict[str, str], bytes]:
        if repo == "org/slow":
            time.sleep(1.0)
        if repo in REFUSALS:
            return *REFUSALS[repo], b""
        if rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = self.server.files
        if rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": p, "size": len(files[p]), "oid": _etag(files[p])} for p in files]
            return 200, {}, json.dumps(tree).encode()
        siblings = [{"rfilename": name} for name in LISTINGS.get(repo, files)]
        return 200, {}, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()

    def _file(self, repo: str, name: str) -> tuple[int, dict[str, str], bytes]:
        if repo == "org/gated":
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if name not in self.server.files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        content = self.server.files[name]
        return 200, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT}, content

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@contextmanager
def serve(model: Path) -> Iterator[HubServer]:
    """A running hub that serves `model` as org/good."""
    with HubServer(model) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
