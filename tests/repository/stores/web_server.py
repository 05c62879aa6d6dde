"""A web server for files that can cut connections, change files and count what it sends."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

LAST_MODIFIED = "Mon, 02 Nov 2026 10:00:00 GMT"


class Asked(NamedTuple):
    """One request, and how many bytes of content were sent."""

    method: str
    path: str
    headers: Mapping[str, str]
    sent: int


class WebServer:
    """Serves `files` by path, with parts and conditions as RFC 9110 has them.

    Attributes:
        files: the content of each path.
        replies: full answers for paths: status, headers and body.
        cuts: how many answers with content are cut off next.
        cut_after: after how many bytes.
        busy: how many requests are answered with 503 next.
        required: the value that the header Authorization must have; "" for none.
        ranges: whether parts can be asked for.
        on_get: called before each answer with content.
        asked: all requests.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.replies: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.cuts = 0
        self.cut_after = 1000
        self.busy = 0
        self.required = ""
        self.ranges = True
        self.on_get: Any = lambda: None
        self.asked: list[Asked] = []
        own = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                own.answer(self)

            def do_GET(self) -> None:
                own.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def sent(self) -> int:
        """The bytes of content that were sent."""
        return sum(asked.sent for asked in self.asked)

    def answer(self, handler: Any) -> None:
        """Answer one request."""
        path, headers = handler.path, handler.headers
        if self.busy:
            self.busy -= 1
            self.send(handler, 503, {}, b"")
        elif self.required and headers.get("Authorization") != self.required:
            self.send(handler, 401, {"WWW-Authenticate": 'Basic realm="test"'}, b"")
        elif path in self.replies:
            self.send(handler, *self.replies[path])
        elif path.partition("?")[0] in self.files:
            if handler.command == "GET":
                self.on_get()
            self._send_file(handler, self.files[path.partition("?")[0]])
        else:
            self.send(handler, 404, {}, b"")

    def _send_file(self, handler: Any, content: bytes) -> None:
        tag = f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'
        headers = {
            "ETag": tag, "Last-Modified": LAST_MODIFIED, "Accept-Ranges": "bytes" if self.ranges else "none"
        }  # fmt: skip
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        if handler.headers.get("If-Match", tag) != tag:
            self.send(handler, 412, {}, b"")
        elif asked is None or not self.ranges:
            self.send(handler, 200, headers, content)
        else:
            start, end = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            self.send(handler, 206, headers, content[start : end + 1])

    def send(self, handler: Any, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Send an answer; a client that has it finds it in `asked`."""
        length = str(len(body))
        if handler.command == "HEAD":
            body = b""
        if self.cuts and len(body) > self.cut_after and status < 300:
            self.cuts -= 1
            body = body[: self.cut_after]
        counted = len(body) if status in (200, 206) else 0
        self.asked.append(Asked(handler.command, handler.path, dict(handler.headers), counted))
        handler.send_response(status)
        for name, value in {"Content-Length": length, **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def web_server() -> Iterator[WebServer]:
    """A server until the context ends."""
    server = WebServer()
    try:
        yield server
    finally:
        server.close()
