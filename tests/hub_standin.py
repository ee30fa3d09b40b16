"""A stand-in for the hub's HTTP API: what huggingface_hub asks of it when a folder is pushed and a file is fetched.

A repository's name says what goes wrong: `conflict` at the commit, `dropped` while weights are sent, `lost` the answer
to a commit that is made.
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

TOKEN = "hf_ours"
SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """On a port of its own; `repositories` has the committed files by repository and path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was dropped is no news."""


@contextmanager
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:  # noqa: PLR0911
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(f"POST {self.path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json(401, {"error": "Invalid credentials in Authorization header"})
        parts = self.path.partition("?")[0].strip("/").split("/")
        if self.path == "/api/repos/create":
            named = json.loads(body)
            name = f"{named['organization']}/{named['name']}"
            new = name not in self.server.repositories
            self.server.repositories.setdefault(name, {})
            return self._json(200 if new else 409, {"url": f"{self.server.endpoint}/{name}", "error": "exists"})
        if self.path == "/api/validate-yaml":
            errors = [{"message": '"license" must be one of the known ones'}] if b"no-such" in body else []
            return self._json(400 if errors else 200, {"errors": errors, "warnings": []})
        if parts[4:5] == ["preupload"]:
            files = [file["path"] for file in json.loads(body)["files"]]
            mode = {True: "lfs", False: "regular"}
            answer = [{"path": path, "uploadMode": mode[path.endswith((".safetensors", ".onnx"))],
                       "shouldIgnore": False} for path in files]  # fmt: skip
            return self._json(200, {"files": answer})
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            where = f"{self.server.endpoint}/lfs/{parts[1].removesuffix('.git')}"
            objects = [{**one, "actions": {"upload": {"href": f"{where}/{one['oid']}"}, "verify": {"href": where}}}
                       for one in json.loads(body)["objects"]]  # fmt: skip
            return self._json(200, {"transfer": "basic", "objects": objects})
        if parts[4:5] == ["commit"]:
            return self._commit("/".join(parts[2:4]), body)
        return self._json(200, {})

    def do_PUT(self) -> None:
        body, oid = self.rfile.read(int(self.headers["Content-Length"])), self.path.split("/")[-1]
        self.server.asked.append("PUT")
        if "/dropped/" in self.path:
            self.close_connection = True
            return self.connection.close()
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        return self._json(200, {})

    def do_GET(self) -> None:
        owner, name, kind, _, *file = self.path.strip("/").split("/") if "/resolve/" in self.path else [""] * 4
        files = self.server.repositories.get(f"{owner}/{name}")
        if kind != "resolve":
            return self._json(200, {"id": self.path, "sha": SHA, "siblings": []})
        if files is None or "/".join(file) not in files:
            code = "RepoNotFound" if files is None else "EntryNotFound"
            return self._json(404, {"error": code}, {"X-Error-Code": code})
        content = files["/".join(file)]
        etag = hashlib.sha256(content).hexdigest()
        return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"})

    do_HEAD = do_GET

    def _commit(self, name: str, body: bytes) -> None:
        if name.endswith("/conflict"):
            return self._json(409, {"error": "A conflict happened. Please try again"})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.repositories[name][value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                self.server.repositories[name][value["path"]] = self.server.objects[value["oid"]]
        if name.endswith("/lost"):
            self.close_connection = True
            return self.connection.close()
        return self._json(200, {"commitUrl": f"{self.server.endpoint}/{name}/commit/{SHA}", "commitOid": SHA})

    def _json(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing."""
