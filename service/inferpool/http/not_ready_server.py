"""Answers while the models of a store are being fetched: the server is live, and not ready.

Nothing of the server proper runs yet, so that its processes start once they have models. A probe for life
that found nobody would end the server in the middle of a long download.
"""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any, Final

from inferpool.http.access.tls import Certificates

_TIMEOUT_S: Final = 5.0
_RETRY_AFTER_S: Final = 5
_LOOK_S: Final = 0.1
_MOST_BODY_BYTES: Final = 2**20
_REASON: Final = "the models are being fetched from their store; try again later"


class _Handler(BaseHTTPRequestHandler):
    """One request a connection."""

    timeout = _TIMEOUT_S
    root_path = ""

    def answer(self) -> None:
        """Answer 200 to a probe for life, 503 to everything else."""
        length = self.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) <= _MOST_BODY_BYTES:
            self.rfile.read(int(length))  # a connection that is closed with data unread is reset
        path = self.path.partition("?")[0].rstrip("/")
        if self.root_path and path.startswith(f"{self.root_path}/"):
            path = path.removeprefix(self.root_path)
        if path == "/health/live":
            self._send(200, "application/json", {"status": "live"})
        elif path == "/v2/health/live":
            self._send(200, "application/json", {"live": True})
        elif path.startswith("/v2"):
            self._send(503, "application/json", {"error": _REASON, "code": "not_ready"})
        elif path in ("/health", "/health/ready"):
            self._send(
                503,
                "application/json",
                {"status": "loading", "ready": False, "problems": {"repository": _REASON}},
            )
        else:
            problem = {"type": "about:blank", "title": "Service Unavailable", "status": 503}
            problem |= {"code": "not_ready", "detail": _REASON}
            self._send(503, "application/problem+json", problem)

    def _send(self, status: int, media_type: str, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(content)))
        if status == 503:
            self.send_header("Retry-After", str(_RETRY_AFTER_S))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = answer

    def version_string(self) -> str:
        """Say nothing of the software."""
        return "inferpool"

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: probes come all the time."""


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, listener: socket.socket, certificates: Certificates | None, root_path: str) -> None:
        handler = type("Handler", (_Handler,), {"root_path": root_path})
        super().__init__(("", 0), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener.dup()
        # A client that leaves before it is accepted must not stop the loop. The listener shares this.
        self.socket.setblocking(False)
        self._certificates = certificates

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; a client that stops in the middle of a handshake keeps only its own thread."""
        connection, address = self.socket.accept()
        connection.settimeout(_TIMEOUT_S)
        if self._certificates is not None:
            connection = self._certificates.context.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        return connection, address or ("", 0)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up."""


@contextlib.contextmanager
def answer_not_ready(
    listener: socket.socket, certificates: Certificates | None, root_path: str
) -> Iterator[None]:
    """Answer on `listener` as long as the context lasts. Connections that wait then are the server's."""
    server = _Server(listener, certificates, root_path)
    timeout = listener.gettimeout()
    thread = threading.Thread(target=server.serve_forever, args=(_LOOK_S,), name="not-ready", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        with contextlib.suppress(OSError, ssl.SSLError):
            server.socket.close()
        listener.settimeout(timeout)
