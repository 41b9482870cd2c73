"""As much of the Hugging Face Hub as uploading a folder and downloading its files take, on this machine.

The client's own rules are upstream's; what is served here was read off its requests (huggingface_hub 2.4). Files travel inside
the commit, none through large-file storage.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0" * 40


def _hash(held: bytes) -> str:
    return hashlib.sha1(held, usedforsecurity=False).hexdigest()


class Hub(ThreadingHTTPServer):
    """Repositories by name, each a mapping of paths to what the files hold."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}

    @property
    def address(self) -> str:
        """What HF_ENDPOINT should say."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self._body()
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repositories.setdefault(name, {".gitattributes": b""})
            self._answer({"url": f"{self.server.address}/{name}"})
        elif parts[4:5] == ["preupload"]:
            files = json.loads(body)["files"]
            self._answer({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]})
        elif parts[4:5] == ["commit"]:
            name = "/".join(parts[2:4])
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.server.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer({"commitUrl": f"{self.server.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._answer({})

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            files = self.server.repositories.get(name, {})
            if parts[4:5] == ["tree"]:
                tree = [{"type": "file", "path": path, "size": len(held), "oid": _hash(held)} for path, held in files.items()]
                self._answer(tree)
                return
            self._answer({"id": name, "sha": COMMIT, "private": False, "siblings": [{"rfilename": path} for path in files]})
        elif parts[2:3] == ["resolve"]:
            held = self.server.repositories.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
            if held is None:
                self._answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            else:
                self._answer(held, 200, {"ETag": f'"{_hash(held)}"', "X-Repo-Commit": COMMIT})
        else:
            self._answer({"error": "not here"}, 404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        held = b""
        while size := int(self.rfile.readline(), 16):
            held += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return held

    def _answer(self, found: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        held = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(held)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(held)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serve() -> Iterator[Hub]:
    """Serve until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
