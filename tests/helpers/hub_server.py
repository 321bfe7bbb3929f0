"""A server on loopback that answers as the Hugging Face hub does, as far as models need it."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

LARGE = 1000  # bytes from which a file is sent by the protocol of large files


@dataclass
class Hub:
    """What the hub holds.

    Attributes:
        url: its address.
        models: name -> branch -> path -> content.
        private: the names of private models.
        commits: how many were made.
        sent: method and path of every request, with the range that was asked for.
        refuse: the start of paths that are answered with 401.
    """

    url: str = ""
    models: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    commits: int = 0
    large: dict[str, bytes] = field(default_factory=dict)
    sent: list[tuple[str, str, str | None]] = field(default_factory=list)
    refuse: str = "-"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self) -> None:
        path, _, query = self.path.partition("?")
        path = unquote(path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        self.hub.sent.append((self.command, path, self.headers.get("Range")))
        if path.startswith(self.hub.refuse):
            self._json({"error": "Invalid username or password."}, 401)
            return
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match is not None and self.command in method:
                answer(self, body, query, *match.groups())
                return
        self._json({"error": f"no route {self.command} {path}"}, 404)

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _json(self, value: Any, status: int = 200, error: str = "") -> None:
        self._bytes(json.dumps(value).encode(), status, {"X-Error-Code": error} if error else {})

    def _bytes(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815

    def files(self, model: str, branch: str | None) -> dict[str, bytes] | None:
        found = self.hub.models.get(model)
        if found is None:
            self._json({"error": "Repository not found"}, 404, "RepoNotFound")
            return None
        if (branch or "main") not in found:
            self._json({"error": "Revision not found"}, 404, "RevisionNotFound")
            return None
        return found[branch or "main"]

    def model(self, _: bytes, __: str, model: str, branch: str | None = None) -> None:
        if (files := self.files(model, branch)) is not None:
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": model, "sha": "0" * 40, "siblings": siblings, "private": True})

    def tree(self, _: bytes, query: str, model: str, branch: str, inner: str | None) -> None:
        if (files := self.files(model, branch)) is None:
            return
        start = f"{inner}/" if inner else ""
        found = [self._entry(n, files[n]) for n in sorted(files) if n.startswith(start)]
        if "recursive=true" not in query.lower():
            found = [entry for entry in found if "/" not in entry["path"].removeprefix(start)]
        if not found and inner:
            self._json({"error": "Entry not found"}, 404, "EntryNotFound")
            return
        self._json(found)

    def paths_info(self, body: bytes, _: str, model: str, branch: str) -> None:
        if (files := self.files(model, branch)) is not None:
            asked = json.loads(body)["paths"]
            self._json([self._entry(name, files[name]) for name in asked if name in files])

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "oid": oid, "size": len(content), "path": name}

    def resolve(self, _: bytes, __: str, model: str, branch: str, name: str) -> None:
        if (files := self.files(model, branch)) is None:
            return
        content, asked = files[name], self.headers.get("Range")
        if asked is None:
            self._bytes(content, 200, {})
            return
        start, stop = map(int, asked.removeprefix("bytes=").split("-"))
        part = content[start : stop + 1]
        where = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        self._bytes(part, 206, {"Content-Range": where})

    def create(self, body: bytes, _: str) -> None:
        asked = json.loads(body)
        model = "/".join(p for p in (asked.get("organization"), asked["name"]) if p)
        if model in self.hub.models:
            self._json({"error": "exists", "url": f"{self.hub.url}/{model}"}, 409)
            return
        self.hub.models[model] = {"main": {".gitattributes": b""}}
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.private |= {model} if private else set()
        self._json({"url": f"{self.hub.url}/{model}", "id": model})

    def branch(self, _: bytes, __: str, model: str, branch: str) -> None:
        found = self.hub.models[model]
        found.setdefault(branch, dict(found["main"]))
        self._json({})

    def preupload(self, body: bytes, _: str, __: str, ___: str) -> None:
        files = json.loads(body)["files"]
        modes = {f["path"]: "lfs" if f["size"] >= LARGE else "regular" for f in files}
        told = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]
        self._json({"files": told})

    def batch(self, body: bytes, _: str, __: str) -> None:
        objects = json.loads(body)["objects"]
        for one in objects:
            one["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def put_large(self, body: bytes, _: str, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self._json({})

    def commit(self, body: bytes, _: str, model: str, branch: str) -> None:
        if (files := self.files(model, branch)) is None:
            return
        added: dict[str, bytes] = {}
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                added[value["path"]] = self.hub.large[value["oid"]]
        files.update(added)
        self.hub.commits += 1
        url = f"{self.hub.url}/{model}/commit/{'1' * 40}"
        self._json({"success": True, "commitUrl": url, "commitOid": "1" * 40})

    def valid(self, *_: Any) -> None:
        self._json({"errors": [], "warnings": []})


_MODEL, _REV = r"([\w.-]+/[\w.-]+)", r"([\w.%-]+)"
_ROUTES: tuple[tuple[tuple[str, ...], str, Any], ...] = (
    (("GET",), rf"/api/models/{_MODEL}", _Handler.model),
    (("GET",), rf"/api/models/{_MODEL}/revision/{_REV}", _Handler.model),
    (("GET",), rf"/api/models/{_MODEL}/tree/{_REV}(?:/(.+))?", _Handler.tree),
    (("POST",), rf"/api/models/{_MODEL}/paths-info/{_REV}", _Handler.paths_info),
    (("GET", "HEAD"), rf"/{_MODEL}/resolve/{_REV}/(.+)", _Handler.resolve),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), rf"/api/models/{_MODEL}/branch/{_REV}", _Handler.branch),
    (("POST",), "/api/validate-yaml", _Handler.valid),
    (("POST",), rf"/api/models/{_MODEL}/preupload/{_REV}", _Handler.preupload),
    (("POST",), rf"/{_MODEL}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), r"/lfs/(\w+)", _Handler.put_large),
    (("POST",), rf"/api/models/{_MODEL}/commit/{_REV}", _Handler.commit),
)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve an empty hub."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
