"""Pages of other origins: the Fetch standard's headers on every route, and a browser that obeys them."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from inferpool.errors import ConfigError
from inferpool.http.access.cors import CorsPolicy, is_preflight, make_cors
from inferpool.settings_sources import read_settings

from tests.conftest import MakeChaos, Serve
from tests.server import Server

PAGE = "https://app.example.com"
ORIGIN = {"origin": PAGE}
ROW = {"inputs": {"x": [[1.0] * 4]}}
PATHS = (
    "/predict",
    "/predict/m",
    "/v2/models/m/infer",
    "/models",
    "/health",
    "/metrics",
    "/docs",
    "/docs/",
    "/nothing",
)
PREFLIGHT = {
    **ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-timeout-ms",
}


class PageServer:
    """Serves one page, on an origin of its own."""

    def __init__(self) -> None:
        self.page = ""
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = outer.page.encode()
                self.send_response(200)
                self.send_header("content-type", "text/html")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def page_server() -> Iterator[PageServer]:
    pages = PageServer()
    yield pages
    pages.close()


@pytest.fixture(scope="module")
def server(module_serve: Serve, module_make_chaos: MakeChaos, page_server: PageServer) -> Server:
    repository = module_make_chaos("m")
    origins = ("--cors-allow-origin", PAGE, "--cors-allow-origin", page_server.origin)
    return module_serve(repository, *origins)


@pytest.mark.parametrize("path", PATHS)
def test_a_preflight_is_answered_on_every_path_whatever_is_there(server: Server, path: str) -> None:
    before = server.metric("requests_total")
    answer = server.request("OPTIONS", path, headers=PREFLIGHT)
    headers = answer.headers
    assert (answer.status_code, answer.content) == (204, b"")
    assert headers["access-control-allow-origin"] == PAGE
    assert "POST" in headers["access-control-allow-methods"]
    assert headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
    assert int(headers["access-control-max-age"]) > 0
    assert "access-control-allow-credentials" not in headers
    assert {"origin", "access-control-request-headers"} <= vary(headers.get_list("vary"))
    assert headers["x-request-id"]
    assert server.metric("requests_total") == before, "a preflight is no request for a model"


def vary(lines: list[str]) -> set[str]:
    return {name.strip().lower() for line in lines for name in line.split(",")}


@pytest.mark.parametrize("path", PATHS)
def test_a_preflight_of_another_origin_is_refused(server: Server, path: str) -> None:
    before = server.metric("requests_total")
    answer = server.request("OPTIONS", path, headers=PREFLIGHT | {"origin": "https://evil.example"})
    assert answer.status_code == 403
    assert answer.json()["error" if path.startswith("/v2") else "detail"]
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert "origin" in vary(answer.headers.get_list("vary"))
    assert server.metric("requests_total") == before


def test_a_preflight_may_have_a_body_and_the_connection_goes_on(server: Server) -> None:
    lines = "".join(f"{name}: {value}\r\n" for name, value in PREFLIGHT.items())
    preflight = f"OPTIONS /predict/m HTTP/1.1\r\nHost: x\r\n{lines}content-length: 5\r\n\r\nhello"
    body = json.dumps(ROW)
    predict = (
        f"POST /predict/m HTTP/1.1\r\nHost: x\r\norigin: {PAGE}\r\ncontent-length: {len(body)}\r\n\r\n{body}"
    )
    last = f"GET /health HTTP/1.1\r\nHost: x\r\nconnection: close\r\norigin: {PAGE}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall((preflight + predict + last).encode())
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"204", b"200", b"200"]
    assert received.lower().count(b"access-control-allow-origin: " + PAGE.encode()) == 3


def test_answers_and_errors_can_be_read_by_the_page_alone(server: Server) -> None:
    asked: list[tuple[str, str, object, int]] = [
        ("POST", "/predict/m", ROW, 200),
        ("POST", "/predict/m", ROW, 200),  # the head is cached now
        ("POST", "/predict/m", {"inputs": {}}, 422),
        ("POST", "/predict/none", ROW, 404),
        ("GET", "/predict/m", None, 405),
        ("POST", "/v2/models/none/infer", ROW, 404),
        ("GET", "/models", None, 200),
        ("GET", "/nothing", None, 404),
        ("OPTIONS", "/models", None, 405),
    ]
    for method, path, body, status in asked:
        allowed = server.request(method, path, json=body, headers=ORIGIN)
        assert allowed.status_code == status, path
        assert allowed.headers.get_list("access-control-allow-origin") == [PAGE], path
        exposed = allowed.headers["access-control-expose-headers"].lower().split(", ")
        assert {"x-request-id", "server-timing", "retry-after"} <= set(exposed)
        for other in ({}, {"origin": "https://evil.example"}, {"origin": "null"}, {"origin": PAGE + ".evil"}):
            refused = server.request(method, path, json=body, headers=other)
            assert refused.status_code == status, path
            assert "access-control-allow-origin" not in refused.headers, path
            assert "origin" in vary(refused.headers.get_list("vary")), path


def test_refused_heads_can_be_read_too(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST /predict/m HTTP/1.1\r\nhost: x\r\norigin: {PAGE}\r\nx-large: {'x' * 70_000}\r\n\r\n"
        connection.sendall(head.encode())
        received = connection.recv(65536)
    assert received.startswith(b"HTTP/1.1 431")
    assert b"access-control-allow-origin: " + PAGE.encode() in received


def test_without_the_setting_nothing_is_allowed() -> None:
    assert make_cors(read_settings({}, {}).cors_allow_origin) is None


def test_every_origin_may_be_allowed() -> None:
    policy = CorsPolicy(("*", "https://a.example"))
    assert policy.allows(b"null")
    headers = dict(policy.headers(b"https://any.example"))
    assert headers[b"access-control-allow-origin"] == b"*"
    assert b"vary" not in headers, "all origins get the same response"


@pytest.mark.parametrize("names", [b"x\r\nset-cookie: a=b", b"a b", b"x" * 5000, b"", b"(,)"])
def test_names_that_are_no_header_names_are_not_repeated(names: bytes) -> None:
    allowed = dict(CorsPolicy(("*",)).preflight_headers([(b"access-control-request-headers", names)]))
    assert allowed[b"access-control-allow-headers"].startswith(b"Authorization, Content-Type")


def test_a_plain_options_request_is_no_preflight() -> None:
    origin, method = (b"origin", b"https://a.example"), (b"access-control-request-method", b"POST")
    assert is_preflight("OPTIONS", [origin, method])
    assert not is_preflight("OPTIONS", [origin])
    assert not is_preflight("OPTIONS", [method])
    assert not is_preflight("POST", [origin, method])


def test_origins_are_spelled_as_browsers_spell_them() -> None:
    given = "HTTPS://App.Example.com:443,http://127.0.0.1:80,http://a.example:8080,https://[::1]:3000,*"
    assert read_settings({"cors_allow_origin": [given, "http://a.example:8080"]}, {}).cors_allow_origin == (
        "https://app.example.com",
        "http://127.0.0.1",
        "http://a.example:8080",
        "https://[::1]:3000",
        "*",
    )


@pytest.mark.parametrize(
    "text",
    ["app.example.com", "https://", "https://a.example/", "https://a.example/x", "null", "https://*.a/x"],
)
def test_what_is_no_origin_is_refused_at_the_start(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--cors-allow-origin: .* is no origin; write scheme://host"):
        read_settings({"cors_allow_origin": [text]}, {})


SCRIPT = """<body>waiting</body><script>
async function ask() {
  const send = (path, body) => fetch("SERVER" + path, {method: "POST", body: JSON.stringify(body),
    headers: {"Content-Type": "application/json", "X-Timeout-Ms": "30000", "Authorization": "Bearer none"}});
  try {
    const answer = await send("/predict/m", {inputs: {x: [[1, 2, 3, 4]]}});
    const refusal = await send("/predict/m", {inputs: {}});
    return [answer.status, (await answer.json()).model, refusal.status, (await refusal.json()).code,
      !!answer.headers.get("x-request-id"), !!answer.headers.get("server-timing")].join(" ");
  } catch (error) { return "blocked: " + error.name; }
}
ask().then(text => { document.body.textContent = text; });
</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium: apt-get install chromium")
@pytest.mark.parametrize(
    ("host", "shown"),
    [("127.0.0.1", "200 m 422 invalid_input true true"), ("localhost", "blocked: TypeError")],
)
def test_a_browser_lets_pages_of_allowed_origins_predict(
    server: Server, page_server: PageServer, tmp_path: Path, host: str, shown: str
) -> None:
    before = server.metric("requests_total", code="200")
    page_server.page = SCRIPT.replace("SERVER", server.url)
    command = [
        *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *(f"--user-data-dir={tmp_path}", "--virtual-time-budget=10000", "--dump-dom"),
        page_server.origin.replace("127.0.0.1", host) + "/",
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert f"<body>{shown}</body>" in run.stdout, run.stdout + run.stderr
    assert server.metric("requests_total", code="200") == before + shown.startswith("200")
