"""Pictures are fetched from named hosts alone, at addresses that were checked, within bounds."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from inferpool.allowance import UNLIMITED, Allowance
from inferpool.errors import BodyTooLarge, ConfigError, InvalidInput
from inferpool.http.predict.picture_urls import PictureUrls

from tests.certificates import Authority
from tests.conftest import Serve
from tests.server import Server, wait_until

PICTURE = Path("models/digits/samples/7.png")


class HostServer(ThreadingHTTPServer):
    """Runs `Host`, and keeps quiet about clients that disconnect."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Write nothing."""


class Host(BaseHTTPRequestHandler):
    """Sends a picture, or what its path says."""

    asked: ClassVar[list[tuple[str, dict[str, str]]]] = []
    go_on: ClassVar[threading.Event] = threading.Event()
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        picture = PICTURE.read_bytes()
        way, _, value = self.path.removeprefix("/").partition("/")
        if way == "status":
            self.send_response(int(value))
            self.send_header("location", "/picture")
            self.send_header("content-length", "0")
            self.end_headers()
            return
        if way == "slow":
            self.go_on.wait(60)
        self.send_response(200)
        if way == "gzip":
            self.send_header("content-encoding", "gzip")
        if way != "endless":
            self.send_header("content-length", value or str(len(picture)))
        self.end_headers()
        if way == "trickle":
            while self._write(b"x"):
                self.go_on.wait(0.02)
        self._write(picture)
        if way == "endless":
            while self._write(bytes(65536)):
                pass
        self.close_connection = True

    def _write(self, data: bytes) -> bool:
        try:
            self.wfile.write(data)
        except OSError:
            return False
        return True

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing."""


@pytest.fixture(scope="module")
def host() -> Iterator[HostServer]:
    server = HostServer(("127.0.0.1", 0), Host)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    Host.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def origin(host: HostServer) -> str:
    Host.asked.clear()
    return f"http://127.0.0.1:{host.server_port}"


def fetch(urls: PictureUrls, url: str, seconds: float = 60, allowance: Allowance = UNLIMITED) -> bytes:
    return urls.fetch(url, allowance, time.monotonic() + seconds)


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[tuple[str, int]]:
    """Let every name have these addresses; return where connections go, which then fail."""
    tried: list[tuple[str, int]] = []

    def resolve(host: str, port: int, **_: object) -> list[tuple[Any, ...]]:
        return [(0, 0, 0, "", (address, port)) for address in addresses]

    def connect(target: tuple[str, int], timeout: float) -> socket.socket:
        tried.append(target)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    return tried


def test_a_picture_of_a_named_host_is_fetched_without_credentials(origin: str) -> None:
    assert fetch(PictureUrls([origin]), f"{origin}/a.png?size=1") == PICTURE.read_bytes()
    [(path, headers)] = Host.asked
    assert path == "/a.png?size=1"
    assert headers == {
        "host": origin.removeprefix("http://"),
        "user-agent": "inferpool",
        "accept": "image/*",
        "accept-encoding": "identity",
        "connection": "close",
    }


@pytest.mark.parametrize(
    "url",
    [
        "https://other.example/x.png",
        "http://images.example/x.png",
        "https://images.example:8443/x.png",
        "https://images.example.evil.example/x.png",
        "https://evil.example/?https://images.example/",
    ],
)
def test_another_host_scheme_or_port_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = resolving(monkeypatch, "1.1.1.1")
    with pytest.raises(InvalidInput, match="only from the hosts"):
        fetch(PictureUrls(["images.example"]), url)
    assert not tried


@pytest.mark.parametrize(
    "url",
    [
        "https://user@images.example/x.png",
        "https://images.example\\@evil.example/x.png",
        "https://images.example#@evil.example/",
        "https://images.example/x.png HTTP/1.1\r\nX-Key: 1",
        "https://images.example/\u00e9.png",
        "https://im\u0430ges.example/x.png",
        "https://images.example/\u017f.png",
        "http\u017f://images.example/x.png",
        "https://images.example/" + 9000 * "x",
        "https://",
    ],
)
def test_a_url_that_could_be_read_in_two_ways_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="no URL"):
        fetch(PictureUrls(["images.example"]), url)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"),
        *("::1", "fe80::1", "fd00::1", "::ffff:a00:1", "64:ff9b::a00:1", "2002:a00:1::", "2001:0:1::1"),
        *("64:ff9b:1::a00:1", "fec0::1", "::7f00:2"),
    ],
)
def test_a_private_address_is_refused_unless_its_network_is_named(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = resolving(monkeypatch, address)
    with pytest.raises(InvalidInput, match="no public address"):
        fetch(PictureUrls(["images.example"]), "https://images.example/x.png")
    assert not tried
    length = 128 if ":" in address else 32
    with pytest.raises(InvalidInput, match="connection failed"):
        fetch(PictureUrls(["images.example", f"{address}/{length}"]), "https://images.example/x.png")
    assert tried == [(address, 443)]


def test_the_connection_goes_to_addresses_that_were_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = resolving(monkeypatch, "10.0.0.1", "1.1.1.1", "2606:4700::1111", "127.0.0.1")
    with pytest.raises(InvalidInput, match="connection failed"):
        fetch(PictureUrls(["images.example:8443"]), "https://Images.Example:8443/x.png")
    assert tried == [("1.1.1.1", 8443), ("2606:4700::1111", 8443)]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        *[(f"status/{status}", "redirect") for status in (301, 302, 307, 308)],
        ("status/404", "status 404"),
        ("gzip", "compressed"),
        ("picture/99999", "before the end"),
    ],
)
def test_an_answer_that_is_no_picture_is_refused(origin: str, path: str, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        fetch(PictureUrls([origin]), f"{origin}/{path}")
    assert len(Host.asked) == 1


def test_the_bytes_are_taken_before_they_are_read_and_bounded(origin: str) -> None:
    urls = PictureUrls([origin])
    for path in ("picture/99999999", "endless"):
        with pytest.raises(BodyTooLarge, match="more than 16777216 bytes"):
            fetch(urls, f"{origin}/{path}")
    with pytest.raises(BodyTooLarge, match="more than 100 bytes"):
        fetch(urls, f"{origin}/picture", allowance=Allowance(100))


def test_a_host_that_answers_slowly_has_one_deadline_for_all_it_sends(origin: str) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidInput, match="in time"):
        fetch(PictureUrls([origin]), f"{origin}/trickle/1000000", 0.3)
    assert time.monotonic() - began >= 0.3


def test_the_certificate_of_a_host_is_verified(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.issue(tmp_path / "c.pem", tmp_path / "k.pem", names=("named.example",))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "c.pem", tmp_path / "k.pem")
    server = HostServer(("127.0.0.1", 0), Host)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        target = f"127.0.0.1:{server.server_port}"
        known = PictureUrls([target], authority.client_context())
        assert fetch(known, f"https://{target}/x.png") == PICTURE.read_bytes()
        with pytest.raises(InvalidInput, match="certificate"):
            fetch(PictureUrls([target]), f"https://{target}/x.png")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    "text", ["", "https://", "ftp://a", "10.0.0.0/99", "a.example/path", "http://a/b", "*"]
)
def test_a_value_that_names_no_host_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--image-urls"):
        PictureUrls([text])


@pytest.fixture(scope="module")
def server(module_serve: Serve, models: Path, host: HostServer) -> Server:
    named = f"http://127.0.0.1:{host.server_port}"
    return module_serve(models, "--image-urls", named, "--measure-ms", "0")


Body = Callable[[str], tuple[str, dict[str, Any]]]
BODIES: dict[str, Body] = {
    "native": lambda url: ("/predict/digits", {"inputs": url}),
    "model in the body": lambda url: ("/predict", {"model": "digits", "inputs": [url]}),
    "V1": lambda url: ("/v1/models/digits:predict", {"instances": [url]}),
}


@pytest.mark.parametrize("kind", BODIES)
def test_a_request_has_its_picture_fetched(server: Server, origin: str, kind: str) -> None:
    path, body = BODIES[kind](f"{origin}/7.png")
    answer = server.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert len(Host.asked) == 1
    path, body = BODIES[kind]("https://example.com/7.png")
    answer = server.post(path, json=body)
    assert answer.status_code == 422
    assert "only from the hosts that --image-urls names" in answer.text


def test_a_slow_host_keeps_no_other_request_waiting(server: Server, origin: str) -> None:
    Host.go_on.clear()
    answers: list[int] = []

    def ask() -> None:
        answers.append(server.post("/predict/digits", json={"inputs": f"{origin}/slow"}).status_code)

    waiting = [threading.Thread(target=ask) for _ in range(4)]
    for thread in waiting:
        thread.start()
    wait_until(lambda: len(Host.asked) == 4, "the host is asked four times")
    assert server.post("/predict/digits", json={"inputs": f"{origin}/7.png"}).status_code == 200
    late = server.post("/predict/digits", json={"inputs": f"{origin}/slow", "parameters": {"timeout_ms": 50}})
    assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
    assert not answers
    Host.go_on.set()
    for thread in waiting:
        thread.join()
    assert answers == [200] * 4
