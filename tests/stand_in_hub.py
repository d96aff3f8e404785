"""A hub on this machine, as far as uploading a folder and downloading a model ask it, in the hub's own protocol.

Small files come in the commit, large ones by git-LFS's basic transfer. It keeps all in memory.
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

TOKEN = "hf_stand_in"


class Hub:
    """What it holds.

    Attributes:
        repos: Repositories by name: files by path.
        private: Which of them were made private.
        commits: Messages.
        address: Where it listens.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, Any] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[str] = []


@contextmanager
def running() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        return hub

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_PUT(self) -> None:
        self.hub.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, 401)
        parts = self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization") or "me", asked["name"])))
            self.hub.private[name] = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repos.setdefault(name, {})
            return self._answer({"url": f"{self.hub.address}/{name}", "name": name, "id": name})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.path.endswith("/info/lfs/objects/batch"):
            wanted = [
                {**each, "actions": {"upload": {"href": f"{self.hub.address}/objects/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": wanted})
        repo, what = "/".join(parts[2:4]), parts[4]
        if what == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".gguf")) else "regular",
                 "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            return self._answer({"files": files})
        assert what == "commit", self.path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(value["summary"])
            elif line["key"] == "file":
                self.hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.repos[repo][value["path"]] = self.hub.objects[value["oid"]]
        sha = hashlib.sha1(body).hexdigest()
        self._answer({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.address}/{repo}/commit/{sha}"})

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in self.hub.repos:
            repo = "/".join(parts[2:4])
            if len(parts) > 4 and parts[4] == "tree":
                files = self.hub.repos[repo].items()
                return self._answer([{"type": "file", "path": p, "size": len(d), "oid": "0"} for p, d in files])
            siblings = [{"rfilename": path} for path in sorted(self.hub.repos[repo])]
            return self._answer({"id": repo, "sha": "0" * 40, "siblings": siblings})
        if len(parts) > 3 and parts[2] == "resolve":
            data = self.hub.repos.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
            if data is not None:
                etag = hashlib.sha256(data).hexdigest()
                return self._answer(data, ETag=f'"{etag}"', X_Repo_Commit="0" * 40)
            return self._answer({}, 404, X_Error_Code="EntryNotFound")
        self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None:
        pass
