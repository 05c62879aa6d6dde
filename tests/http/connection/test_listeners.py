"""Where a server listens, whom it lets in, and the settings of its connections."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from inferpool.errors import ConfigError
from inferpool.system import listeners
from inferpool.system.connection_counts import ConnectionCounts, make_counts, set_absent
from inferpool.system.listeners import address_of, client_address, listen, listen_unix

from tests.conftest import MakeChaos, Serve
from tests.http.connection.test_pipelining import Wire, check_host_is_required, request, sums
from tests.server import Server, wait_until

MODES = {"in-process": (), "process": ("--engine", "process", "--web-processes", "2")}
"""Two web processes, which share the limit of connections."""
BODY = json.dumps({"inputs": [[1, 0, 0, 0]]})
MOST = 6


@pytest.fixture(scope="module", params=MODES)
def flags(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return MODES[request.param]


@pytest.fixture(scope="module")
def server(module_serve: Serve, module_make_chaos: MakeChaos, flags: tuple[str, ...]) -> Server:
    with contextlib.suppress(FileExistsError):
        module_make_chaos("m", run_ms=1)
    repository = module_make_chaos(f"other-{len(flags)}")
    return module_serve(
        repository, *flags, "--host", "::", "--root-path", "/models/served", "--keep-alive-s", "1",
        "--max-head-bytes", "2000", "--connections-per-address", str(MOST), "--access-log",
    )  # fmt: skip


def curl(*arguments: str) -> str:
    command = ["curl", "-gsS", "-m", "30", "-H", "Content-Type: application/json", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=40).stdout


def test_ipv6_and_ipv4_reach_the_same_port(server: Server) -> None:
    for host in ("127.0.0.1", "[::1]", "localhost"):
        answer = curl("-d", BODY, f"http://{host}:{server.port}/predict/m")
        assert json.loads(answer)["outputs"]["sum"] == sums(1)
    assert server.url.startswith("http://[::]:")


def test_without_ipv6_all_addresses_are_those_of_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "_has_ipv6", lambda: False)
    with listen("::", 0) as listener:
        assert listener.family == socket.AF_INET
        assert address_of(listener, tls=True).startswith("https://0.0.0.0:")


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        (("::ffff:192.0.2.1", 5, 0, 0), "192.0.2.1"), (("192.0.2.1", 5), "192.0.2.1"),
        (("2001:db8::1", 5, 0, 0), "2001:db8::1"), ("", ""), (None, ""),
    ],
)  # fmt: skip
def test_clients_have_the_address_of_their_own_protocol(peer: object, address: str) -> None:
    assert client_address(peer) == address


def test_a_unix_socket_serves_curl_and_is_removed_at_the_end(
    serve: Serve, make_chaos: MakeChaos, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    path = tmp_path / "server.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))  # as a server leaves it that was killed
    own = ("--unix-socket", str(path), "--unix-socket-mode", "600")
    # One web process: a second one would listen in the same way.
    server = serve(make_chaos("m", run_ms=1), *own, *flags[:2])
    assert server.url == f"unix:{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    answer = curl("--unix-socket", str(path), "-d", BODY, "http://localhost/predict/m")
    assert json.loads(answer)["outputs"]["sum"] == sums(1)
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x") as client:
        for _ in range(5):
            assert client.post("/predict/m", json=json.loads(BODY)).status_code == 200
        assert client.get("/health/ready").status_code == 200
        with pytest.raises(ConfigError, match="another server listens there"):
            listen_unix(path, 0o600)
    with socket.socket(socket.AF_UNIX) as half:
        # A client that ends its side, and then leaves before it has its answer.
        half.connect(str(path))
        half.sendall(request(1).encode())
        half.shutdown(socket.SHUT_WR)
        assert half.recv(1000).startswith((b"HTTP/1.1 200", b"HTTP/1.1 100"))
    with socket.socket(socket.AF_UNIX) as bare:
        bare.connect(str(path))
        check_host_is_required(bare)
    assert server.stop() == 0
    assert not path.exists()
    assert not [line for line in server.log if line["level"] in ("error", "raw")]


def test_a_file_that_is_no_socket_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="the file exists and is no socket; remove it"):
        listen_unix(path, 0o660)
    assert path.read_text() == "precious"
    with pytest.raises(ConfigError, match=r"missing/x.sock: .*--unix-socket names a file"):
        listen_unix(tmp_path / "missing" / "x.sock", 0o660)


def ask(server: Server, method: str, target: str, body: str = "") -> tuple[int, dict[str, str], bytes]:
    with Wire(server) as wire:
        wire.send(f"{method} {target} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n{body}")
        return wire.answer()


V2 = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 0, 0, 0]}]})
ROUTES = {
    "/predict/m": ("POST", BODY), "/predict/m/1": ("POST", BODY), "/v2/models/m/infer": ("POST", V2),
    "/models": ("GET", ""), "/models/m": ("GET", ""), "/models/m/1": ("GET", ""), "/health": ("GET", ""),
    "/health/ready": ("GET", ""), "/metrics": ("GET", ""), "/openapi.json": ("GET", ""), "/docs": ("GET", ""),
    "/v2": ("GET", ""), "/v2/models/m": ("GET", ""), "/v2/models/m/ready": ("GET", ""),
    "/v2/health/live": ("GET", ""), "/v2/repository/index": ("POST", "{}"),
}  # fmt: skip


@pytest.mark.parametrize("path", ROUTES)
def test_a_slash_at_the_end_and_the_prefix_of_a_proxy_change_no_answer(server: Server, path: str) -> None:
    method, body = ROUTES[path]
    for target in (path, f"{path}/", f"/models/served{path}", f"/models/served{path}/?x=y"):
        if target.partition("?")[0].endswith("/docs/"):
            status, headers, _ = ask(server, method, target)
            assert (status, headers["location"]) == (307, "../docs")
        else:
            assert ask(server, method, target, body)[0] == 200, target
    assert ask(server, method, f"/models/servedx{path}", body)[0] in (404, 405)


def test_the_document_of_the_api_names_the_prefix_and_the_page_links_below_it(server: Server) -> None:
    for prefix in ("", "/models/served"):
        document = json.loads(ask(server, "GET", f"{prefix}/openapi.json")[2])
        assert document["servers"] == [{"url": "/models/served"}]
        page = ask(server, "GET", f"{prefix}/docs")[2].decode()
        assert "url: 'openapi.json'" in page
    assert "Location" not in str(ask(server, "GET", "/models/served"))  # the prefix alone is no redirect


def test_an_idle_connection_is_kept_as_long_as_the_setting_says(server: Server) -> None:
    with Wire(server) as wire:
        wire.send(request(1))
        assert wire.answer()[0] == 200
        assert wire.ended()  # within the time limit of the socket, far below the default


def test_heads_up_to_the_setting_are_taken(server: Server) -> None:
    with Wire(server) as wire:
        wire.send(request(1, headers=f"x: {'y' * 1800}\r\n"))
        assert wire.answer()[0] == 200
        wire.send(request(1, headers=f"x: {'y' * 2000}\r\n"))
        status, _, body = wire.answer()
        assert (status, b"2000 bytes" in body) == (431, True)


@pytest.fixture
def full(server: Server) -> Iterator[contextlib.ExitStack]:
    """As many connections as one address may have."""
    with contextlib.ExitStack() as stack:
        made: list[Wire] = []

        def all_open() -> bool:
            while len(made) < MOST:
                wire = stack.enter_context(Wire(server))
                try:
                    wire.send(request(1))
                    assert wire.answer()[0] == 200
                    wire.send("GET /")  # idle, it would be closed after a second
                except (OSError, AssertionError):  # those of the test before are not closed yet
                    return False
                made.append(wire)
            return True

        wait_until(all_open, "all connections are open")
        yield stack


def test_an_address_has_as_many_connections_as_the_setting_says(
    server: Server, full: contextlib.ExitStack
) -> None:
    with pytest.raises((OSError, AssertionError)), Wire(server) as wire:  # noqa: PT012 - either may notice
        wire.send(request(1))
        wire.answer()
    server.wait_for(rf"127\.0\.0\.1 has {MOST} connections, and more are closed")
    with socket.create_connection(("::1", server.port)) as other:  # another address
        other.sendall(request(1).encode())
        assert other.recv(1000).startswith(b"HTTP/1.1 200")
    counted = re.search(
        r'refused_connections_total\{reason="address_limit"\} ([1-9])',
        curl(f"http://[::1]:{server.port}/metrics"),
    )
    assert counted, "the closed connections are counted"
    full.close()

    def fits() -> bool:
        with contextlib.suppress(OSError, AssertionError), Wire(server) as wire:
            wire.send(request(1))
            return wire.answer()[0] == 200
        return False

    wait_until(fits, "closed connections count no longer")


def test_processes_share_the_limit_and_one_that_ends_has_no_connections() -> None:
    file = make_counts(2)
    first, second = (ConnectionCounts(file, number, 2) for number in range(2))
    places = [first.enter("192.0.2.1", 3), second.enter("192.0.2.1", 3), second.enter("192.0.2.1", 3)]
    assert places == [places[0]] * 3
    assert first.enter("192.0.2.1", 3) == second.enter("192.0.2.1", 3) == -1
    assert first.enter("192.0.2.2", 3) >= 0
    set_absent(file, 1, 2)
    assert first.enter("192.0.2.1", 3) == first.enter("192.0.2.1", 3) == places[0]
    assert first.enter("192.0.2.1", 3) == -1
    first.leave(places[0])
    assert first.enter("192.0.2.1", 3) == places[0]
    first.set(9)
    assert first.lead() == 0, "the other process does not accept"


def test_https_sent_to_a_plain_port_is_named_in_the_log(server: Server) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        Wire(server, ssl.create_default_context())
    server.wait_for("127.0.0.1: the client speaks TLS, and this port takes plain HTTP; ask for http://")
