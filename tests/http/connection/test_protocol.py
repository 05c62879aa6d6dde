"""`PredictProtocol` beside uvicorn's protocol."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import struct
import subprocess
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import MakeChaos, Serve
from tests.http.connection.test_pipelining import Wire, request, sums
from tests.server import Server

GETS = ("/models", "/metrics", "/health/live", "/openapi.json", "/predict/m")


@pytest.fixture(scope="module")
def server(module_serve: Serve, module_make_chaos: MakeChaos) -> Server:
    # A busy machine may measure that one row at a time is best, and a large request has 60,000.
    module_make_chaos("slow", run_ms=20)
    repository = module_make_chaos("m", "[batching]\nmax_rows = 1024\n", run_ms=1)
    return module_serve(repository, "--drain-settle-s", "60", "--cors-allow-origin", "*")


def test_a_head_without_end_is_refused(server: Server) -> None:
    with Wire(server) as wire:
        wire.send(request(1, headers=f"x: {'y' * 30_000}\r\n"))
        assert wire.answer()[0] == 200
    with Wire(server) as wire:
        wire.send("POST /predict/m HTTP/1.1\r\nhost: x\r\n")
        with pytest.raises(ConnectionError):  # noqa: PT012 - whichever write notices first
            for number in range(10_000):
                wire.send(f"x-{number}: {'y' * 10_000}\r\n")
    with Wire(server) as wire:
        wire.send("GET /models HTTP/1.1\r\nhost: x\r\nx: " + "y" * 70_000)
        assert wire.status()[0] == 431


JAVA_HEAD = (
    "POST {path} HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nContent-Length: {length}\r\n"
    "Host: 127.0.0.1:46765\r\nHTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA\r\n"
    "Upgrade: h2c\r\nUser-Agent: Java-http-client/17.0.15\r\nContent-Type: application/json\r\n\r\n"
)
"""What `java.net.http.HttpClient` of OpenJDK 17.0.15 sent, byte for byte; it sends the body by itself."""

JAVA_PROGRAM = """
import java.net.URI;
import java.net.http.*;

public class Post {
  public static void main(String[] arguments) throws Exception {
    HttpClient client = HttpClient.newHttpClient();
    for (String address : new String[] {arguments[0], arguments[0], arguments[1]}) {
      HttpRequest request = HttpRequest.newBuilder(URI.create(address))
          .header("Content-Type", "application/json")
          .POST(HttpRequest.BodyPublishers.ofString(arguments[2])).build();
      HttpResponse<String> response = client.send(request, HttpResponse.BodyHandlers.ofString());
      System.out.println(response.statusCode() + " " + response.body());
    }
  }
}
"""


def test_the_standard_client_of_java_is_answered_although_it_asks_for_http_2(server: Server) -> None:
    native = '{"inputs": [[1, 0, 0, 0]]}'
    with Wire(server) as wire:
        for _ in range(3):
            wire.send(JAVA_HEAD.format(path="/predict/m", length=len(native)))
            wire.send(native)
            status, headers, body = wire.answer()
            assert (status, headers.get("connection")) == (200, None)
            assert json.loads(body)["outputs"]["sum"] == sums(1)


@pytest.mark.skipif(shutil.which("javac") is None, reason="there is no JDK")
def test_a_real_java_client_is_answered(server: Server, tmp_path: Path) -> None:
    source = tmp_path / "Post.java"
    source.write_text(JAVA_PROGRAM)
    addresses = [f"{server.url}/predict/m", f"{server.url}/models/m/unknown"]
    run = subprocess.run(
        ["java", str(source), *addresses, '{"inputs": [[1, 0, 0, 0]]}'],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert [line[:3] for line in run.stdout.splitlines()] == ["200", "200", "405"], run.stderr


def test_an_upgrade_is_ignored_and_the_bytes_of_the_body_are_never_taken_for_a_request(
    server: Server,
) -> None:
    hidden = "GET /models/smuggled HTTP/1.1\r\nhost: x\r\n\r\n"
    upgrade = "connection: upgrade\r\nupgrade: h2c\r\n"
    bodies = {
        f"content-length: {len(hidden)}\r\n\r\n": hidden,
        "transfer-encoding: chunked\r\n\r\n": f"{len(hidden):x}\r\n{hidden}\r\n0\r\n\r\n",
    }
    for path, status in (("/predict/m", 400), ("/models", 405)):
        for framing, body in bodies.items():
            head = f"POST {path} HTTP/1.1\r\nhost: x\r\n{upgrade}{framing}"
            for pieces in ([head, body], [head + body]):
                with Wire(server) as wire:
                    for piece in pieces:
                        wire.send(piece)
                    assert wire.answer()[0] == status
                    wire.send(request(2, headers=upgrade))  # the connection goes on
                    answered, _, answer = wire.answer()
                    assert (answered, json.loads(answer)["outputs"]["sum"]) == (200, sums(2))


def test_the_body_of_a_large_request_that_asks_to_upgrade_is_read(server: Server) -> None:
    marks = [1.0] * 60_000
    with Wire(server) as wire:
        wire.send(request(*marks, headers="connection: upgrade\r\nupgrade: websocket\r\n"))
        status, _, body = wire.answer()
        assert (status, len(json.loads(body)["outputs"]["sum"])) == (200, len(marks))
        wire.send(request(1))
        assert wire.answer()[0] == 200


@pytest.mark.parametrize(
    "target", ["http://x/predict/m", "HTTP://x:80/predict/m/1?y=z", "http://x/v2/models/m/infer"]
)
def test_a_target_may_be_an_absolute_uri_as_proxies_are_sent(server: Server, target: str) -> None:
    body = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [3, 0, 0, 0]}]}
    native = request(3, path=target)
    text = json.dumps(body)
    v2 = f"POST {target} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(text)}\r\n\r\n{text}"
    with Wire(server) as wire:
        wire.send(v2 if "v2" in target else native)
        status, _, answer = wire.answer()
        assert status == 200
        outputs = json.loads(answer)["outputs"]
        assert (outputs[0]["data"] if "v2" in target else outputs["sum"]) == sums(3)
        wire.send(f"GET {target} HTTP/1.1\r\nhost: x\r\n\r\n")
        status, headers, answer = wire.answer()
        assert (status, headers["allow"], json.loads(answer)["code"]) == (405, "POST", "method_not_allowed")
        wire.send("POST http://x/nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
        assert wire.answer()[0] == 404
        wire.send("POST http://x HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
        assert wire.status()[0] == 400


def test_a_client_that_disconnects_in_the_middle_of_a_pipeline_causes_no_error(server: Server) -> None:
    before = len(server.log)
    pipeline = "".join(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n" for path in GETS)
    for count in range(30):
        with contextlib.suppress(ConnectionError), Wire(server) as wire:
            # Closed with a reset, which the server notices while it answers.
            wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            wire.send((request(1) * (count % 2) + pipeline) * 20)
            assert wire.status()[0] == 200
    with Wire(server) as wire:
        wire.send(request(1))
        assert wire.answer()[0] == 200
    server.wait_for_metric("in_flight_requests", at_most=0)
    assert [line for line in server.log[before:] if line["level"] not in ("info", "debug")] == []


SPLITTING = ("\r", "\n", "\0", "\x0b", "\x7f", "\x85", "\u00e9", "\r\n x: y")


def test_nothing_that_is_echoed_splits_a_response(server: Server) -> None:
    for evil in (f"a{byte}set-cookie: b" for byte in SPLITTING):
        sent = [
            request(1, path=path, headers=f"{field}: {evil}\r\n")
            for path in ("/predict/m", "/predict/nobody", "/models", "/v2/models/m/infer")
            for field in ("x-request-id", "origin", "traceparent", "accept")
        ]
        escaped = "".join(f"%{value:02x}" for value in evil.encode())
        for text in (*sent, request(1, path=f"/predict/{escaped}")):
            with Wire(server) as wire:
                wire.send(text.encode("latin-1"))
                status, headers, _ = wire.answer()
                assert status in (200, 400, 404, 405, 406, 422), text
                assert "set-cookie" not in headers
                assert headers["x-request-id"].isprintable()


def test_pipelined_requests_are_all_answered_while_the_server_settles(server: Server) -> None:
    """Only the last answer says that the connection closes: after it a client expects no more.

    The last test of this server.
    """
    slow = partial(request, path="/predict/slow")
    gets = "".join(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n" for path in GETS)
    whole = slow(1) + gets + slow(2) + slow(3)
    with Wire(server) as mixed, Wire(server) as ends_with_get, Wire(server) as cut:
        server.process.terminate()
        server.wait_for("draining")
        mixed.send(whole)
        answers = [mixed.answer() for _ in range(len(GETS) + 3)]
        assert [status for status, _, _ in answers] == [200, 200, 200, 200, 200, 405, 200, 200]
        assert [headers.get("connection") == "close" for _, headers, _ in answers] == [False] * 7 + [True]
        assert json.loads(answers[-1][2])["outputs"]["sum"] == sums(3)
        assert mixed.ended()
        ends_with_get.send(slow(1) + gets)
        answers = [ends_with_get.answer() for _ in range(len(GETS) + 1)]
        assert [headers.get("connection") == "close" for _, headers, _ in answers] == [False] * 5 + [True]
        assert ends_with_get.ended()
        # The next request has only begun when this one is answered.
        cut.send(slow(1) + slow(2)[:20])
        assert "connection" not in cut.answer()[1]
        cut.send(slow(2)[20:])
        status, headers, _ = cut.answer()
        assert (status, headers["connection"]) == (200, "close")
        assert cut.ended()
