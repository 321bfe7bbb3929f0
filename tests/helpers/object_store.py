"""An S3 server on loopback, and a proxy in front of it that counts what passes and breaks it."""

from __future__ import annotations

import http.client
import http.server
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEY, SECRET = "testkey", "verysecretvalue"
BUCKET = "models"


@dataclass
class Request:
    """A request that came through, and the bytes of its answer's body."""

    method: str
    path: str
    range: str | None
    received: int = 0
    sent: int = 0


@dataclass
class Proxy:
    """What tests see of the proxy.

    Attributes:
        url: where it listens.
        requests: what came through since the last `clear`.
        fault: asked for every request, by its number from 0 and the request: None, or what goes
            wrong with it: "503", "cut" (the connection ends in the middle of the body), "stall" (no
            byte for some seconds) or "die" (the connection ends at once).
    """

    url: str
    requests: list[Request] = field(default_factory=list)
    fault: Callable[[int, Request], str | None] = lambda number, request: None
    stall: float = 3.0

    def clear(self) -> None:
        self.requests.clear()
        self.fault = lambda number, request: None

    def count(self, method: str, part: str = "") -> int:
        return sum(r.method == method and part in r.path for r in self.requests)

    @property
    def bytes_down(self) -> int:
        return sum(r.received for r in self.requests if r.method == "GET")


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: Proxy
    target: tuple[str, int]
    lock = threading.Lock()

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            length = int(self.headers.get("Content-Length") or 0)
            return self.rfile.read(length) if length else b""
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def handle_any(self) -> None:
        proxy = self.proxy
        body = self._body()
        request = Request(self.command, self.path, self.headers.get("Range"), sent=len(body))
        with self.lock:
            number = len(proxy.requests)
            proxy.requests.append(request)
        fault = proxy.fault(number, request)
        if fault == "die":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault in ("503", "403"):
            self._answer(int(fault), [("Content-Type", "application/xml")], _SLOW_DOWN)
            return
        inner = http.client.HTTPConnection(*self.target, timeout=30)
        own = ("connection", "transfer-encoding", "content-length")
        headers = {k: v for k, v in self.headers.items() if k.lower() not in own}
        if body or self.command in ("PUT", "POST", "PATCH"):
            headers["Content-Length"] = str(len(body))
        inner.request(self.command, self.path, body=body, headers=headers)
        answer = inner.getresponse()
        content = answer.read()
        request.received = len(content)
        kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in _OURS]
        if self.command == "HEAD":
            kept.append(("Content-Length", answer.getheader("Content-Length") or "0"))
        inner.close()
        if fault == "stall":
            time.sleep(proxy.stall)
        self._answer(answer.status, kept, content, half=fault == "cut")

    def _answer(
        self, status: int, headers: list[tuple[str, str]], content: bytes, half: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        try:
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if half else content)
            if half:
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            self.close_connection = True  # whoever asked has given up

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = handle_any  # noqa: N815


_OURS = ("content-length", "transfer-encoding", "connection", "date", "server")
_SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>ServiceUnavailable</Code>"
    b"<Message>Please reduce your request rate.</Message></Error>"
)


@contextmanager
def proxied(host: str, port: int) -> Iterator[Proxy]:
    """Stand in front of a server."""
    proxy = Proxy("")
    handler = type("Handler", (_Handler,), {"proxy": proxy, "target": (host, port)})
    front = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    front.daemon_threads = True
    thread = threading.Thread(target=front.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    proxy.url = f"http://127.0.0.1:{front.server_address[1]}"
    try:
        yield proxy
    finally:
        front.shutdown()
        front.server_close()


@contextmanager
def s3_server() -> Iterator[Proxy]:
    """Serve an empty S3 store with one bucket; checks no signatures until it is told to."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        with proxied(*server.get_host_and_port()) as proxy:
            yield proxy
    finally:
        server.stop()


def client(proxy: Proxy) -> Any:
    """Return boto3's client of the server."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=proxy.url,
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
    )


def upload(store: Any, folder: Path, prefix: str, bucket: str = BUCKET) -> None:
    """Put a folder, or a file, into the store."""
    files = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    for path in files:
        name = path.relative_to(folder).as_posix() if path != folder else ""
        key = f"{prefix}/{name}" if name else prefix
        store.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())


def names(store: Any, prefix: str = "", bucket: str = BUCKET) -> list[str]:
    """Return the keys below a prefix."""
    listed = store.list_objects_v2(Bucket=bucket, Prefix=prefix)
    return [item["Key"] for item in listed.get("Contents", [])]


def unfinished_uploads(store: Any, bucket: str = BUCKET) -> list[str]:
    """Return the keys of multipart uploads that were begun and not ended."""
    return [u["Key"] for u in store.list_multipart_uploads(Bucket=bucket).get("Uploads", [])]
