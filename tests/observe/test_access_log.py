"""The access log: one line per request, with all its facts and nothing of its body."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from inferpool.observe.background import MOST_WAITING
from inferpool.observe.logs import AccessLog, LineHandler

from tests.chaos.inferpool_chaos import DIE, RAISE
from tests.clients import Client
from tests.conftest import MakeChaos, Serve
from tests.server import CHAOS, ROOT, Server, wait_until

TRACE = "0af7651916cd43dd8448eb211c80319c"
FIELDS = {
    "time", "level", "logger", "message", "request_id", "trace_id", "status", "code", "model", "version",
    "rows", "batch_rows", "queue_ms", "compute_ms", "total_ms", "bytes_in", "bytes_out", "tenant", "key",
    "client", "method", "path",
}  # fmt: skip


@pytest.fixture(scope="module")
def logging_server(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[Server]:
    """A server with `--access-log` of the models `m`, `slow`, and `delayed`, which waits for 8 rows."""
    repository = tmp_path_factory.mktemp("repository")
    for name, run_ms in (("m", 0), ("slow", 20), ("delayed", 0)):
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "1" / "model.chaos").write_text(json.dumps({"run_ms": run_ms}))
    config = "[batching]\nmax_delay_ms = 600000\nmax_rows = 8\n"
    (repository / "delayed" / "model.toml").write_text(config)
    # A busy machine may measure that one row at a time is best; two rows of a request are to run together.
    (repository / "slow" / "model.toml").write_text("[batching]\nmax_rows = 8\n")
    environ = {"INFERPOOL_CACHE_DIR": str(cache_dir), "INFERPOOL_MEASURE_MS": "200"}
    server = Server(
        repository, ("--access-log", "--log-level", "debug", "--trusted-proxies", "127.0.0.1"), environ
    )
    server.wait_loaded()
    yield server
    server.kill()


def mark(server: Server) -> int:
    """Return the position of the log behind the lines of all requests that have been answered.

    A line is written after the answer, so that the log may still lack lines of earlier requests. They come
    before the line of a request that is sent now.
    """
    own = secrets.token_hex(8)
    server.post("/predict/nobody", json={}, headers={"x-request-id": own})
    position = 0

    def written() -> bool:
        nonlocal position
        position = 1 + next((n for n, line in enumerate(server.log) if line.get("request_id") == own), -1)
        return position > 0

    wait_until(written, "the line of a request")
    return position


def lines_since(server: Server, begin: int) -> list[dict[str, Any]]:
    """The lines of requests from this position of the log on; all requests must have ended."""
    end = mark(server) - 1
    return [line for line in server.log[begin:end] if line.get("logger") == "inferpool.access"]


def lines(server: Server) -> list[dict[str, Any]]:
    """Stop the server and return the lines of its requests."""
    assert server.stop() == 0
    return [line for line in server.log if line.get("logger") == "inferpool.access"]


def test_a_request_leaves_one_line(logging_server: Server) -> None:
    """Id, trace, model, version, rows, times, status, code and bytes."""
    server, begin = logging_server, mark(logging_server)
    body = json.dumps({"inputs": [[1, 2, 3, 4], [5, 6, 7, 8]]}).encode()
    headers = {"X-Request-Id": "mine", "traceparent": f"00-{TRACE}-b7ad6b7169203331-00"}
    answer = server.post("/predict/slow", content=body, headers=headers)
    assert answer.status_code == 200
    (line,) = lines_since(server, begin)
    line.pop("process", None)  # a server of one process names none
    assert line.keys() == FIELDS
    assert line | {"time": 0, "queue_ms": 0, "compute_ms": 0, "total_ms": 0} == {
        "time": 0, "level": "info", "logger": "inferpool.access", "message": "predict",
        "request_id": "mine", "trace_id": TRACE, "status": 200, "code": "ok", "model": "slow", "version": 1,
        "rows": 2, "batch_rows": 2, "queue_ms": 0, "compute_ms": 0, "total_ms": 0,
        "bytes_in": len(body), "bytes_out": len(answer.content),
        "tenant": None, "key": None, "client": "127.0.0.1", "method": "POST", "path": "/predict/slow",
    }  # fmt: skip
    assert 20 <= line["compute_ms"] <= line["total_ms"]
    assert 0 <= line["queue_ms"] <= line["total_ms"] - line["compute_ms"]


def test_a_line_says_who_asked_for_what(logging_server: Server) -> None:
    server, begin = logging_server, mark(logging_server)
    body = {"inputs": [[1, 2, 3, 4]]}
    for forwarded in ("203.0.113.7", "203.0.113.8", "6.6.6.6, 203.0.113.9, 127.0.0.1", "unknown"):
        for _ in range(2):  # the second head is cached
            server.post("/predict/m?secret=1", json=body, headers={"x-forwarded-for": forwarded})
    server.request("DELETE", "/predict/m")
    server.post("/v2/models/" + "m" * 5000 + "/infer", json={})
    server.post("/predict/%0a%1b[31m", json={})
    found = lines_since(server, begin)
    assert [line["client"] for line in found[:8:2]] == [
        "203.0.113.7", "203.0.113.8", "203.0.113.9", "127.0.0.1",
    ]  # fmt: skip
    assert [line["client"] for line in found[:8:2]] == [line["client"] for line in found[1:8:2]]
    assert {(line["method"], line["path"]) for line in found[:8]} == {("POST", "/predict/m")}
    assert [line["method"] for line in found[8:]] == ["DELETE", "POST", "POST"]
    assert len(found[9]["path"]) == 200
    assert found[10]["path"] == "/predict/%0a%1b[31m"


def test_failed_requests_leave_lines_too(logging_server: Server) -> None:
    """The code is that of the response; unknown fields are null."""
    server, begin = logging_server, mark(logging_server)
    server.post("/predict/m", json={"inputs": [[RAISE] * 4]})
    server.post("/predict/m", json={"inputs": [[1]]})
    server.post("/predict/m", content=b"{")
    server.post("/predict/nothing", json={})

    async def post_too_much() -> int:
        client = await Client.connect(server.port)
        reply = await client.post("/predict/m", b"", {"content-length": "99999999"})
        await client.close()
        return reply.status

    assert asyncio.run(post_too_much()) == 413
    found = lines_since(server, begin)
    assert [(line["status"], line["code"], line["level"], line["model"], line["rows"]) for line in found] == [
        (500, "model_failed", "error", "m", 1),
        (422, "invalid_input", "info", "m", None),
        (400, "malformed_body", "info", "m", None),
        (404, "model_not_found", "info", None, None),
        (413, "body_too_large", "info", "m", None),
    ]
    assert [line["bytes_in"] > 0 for line in found] == [True, True, True, False, False], (
        "bytes that were read"
    )
    assert found[0]["queue_ms"] is not None
    assert all(line["queue_ms"] is None for line in found[1:])


def test_a_client_that_disconnects_leaves_a_line(logging_server: Server) -> None:
    """Status 499, whether the request was complete or not, and one line only."""
    server, begin = logging_server, mark(logging_server)

    async def leave() -> None:
        waiting, sending = [await Client.connect(server.port) for _ in range(2)]
        waiting.send("/predict/delayed", b'{"inputs": [[1, 2, 3, 4]]}', {"x-request-id": "waiting"})
        sending.send("/predict/delayed", b"{", {"x-request-id": "sending", "content-length": "100"})
        await asyncio.to_thread(server.wait_for_metric, "in_flight_requests", 2)
        await asyncio.to_thread(server.wait_for_metric, "queue_rows", 1)
        for client in (waiting, sending):
            await client.close()
        await asyncio.to_thread(server.wait_for_metric, "in_flight_requests", at_most=0)

    asyncio.run(leave())
    found = {line["request_id"]: line for line in lines_since(server, begin)}
    assert found.keys() == {"waiting", "sending"}
    assert {(line["status"], line["code"]) for line in found.values()} == {(499, "disconnected")}
    assert (found["waiting"]["rows"], found["sending"]["rows"]) == (1, None)
    assert found["sending"]["bytes_in"] == 1


def test_without_the_setting_failures_are_logged(serve: Serve, make_chaos: MakeChaos) -> None:
    """Each 500 leaves a line, and the first 503 and 504 of a model; the end of the server has lines, too."""
    make_chaos("mortal")
    repository = make_chaos("m", run_ms=5)
    (repository / "broken" / "1").mkdir(parents=True)
    (repository / "broken" / "1" / "model.onnx").write_bytes(b"no model")
    server = serve(repository)
    server.post("/predict/m", json={"inputs": [[1, 2, 3, 4]]})
    server.post("/predict/m", json={"inputs": [[1]]})
    for _ in range(3):
        server.post("/predict/m", json={"inputs": [[1, 2, 3, 4]]}, headers={"X-Timeout-Ms": "0.001"})
        server.post("/predict/broken", json={"inputs": [[1]]})
        server.post("/predict/nobody", json={"inputs": [[1]]})
        server.post("/predict/m", json={"inputs": [[RAISE] * 4]})
    server.post("/predict/mortal", json={"inputs": [[DIE] * 4]})
    found = lines(server)
    assert [(line["status"], line["code"], line["level"], line["model"]) for line in found] == [
        (504, "deadline_exceeded", "warning", "m"),
        (503, "not_ready", "warning", "broken"),
        *[(500, "model_failed", "error", "m")] * 3,
        (500, "model_failed", "error", "mortal"),
    ]
    assert found[-1]["compute_ms"] is None, "the run did not end, and an unknown time is not 0"
    messages = [line["message"] for line in server.log]
    assert "SIGTERM: draining" in messages
    assert messages[-1] == "stopped: every accepted request was answered"


def test_failures_of_one_model_and_code_have_a_line_a_minute() -> None:
    access = AccessLog(cast("LineHandler", None), every=False)
    assert [access.throttles(status) for status in (500, 503, 504)] == [False, True, True]
    assert [access.admit("m", "not_ready", now) for now in (0.0, 1.0, 59.0, 60.0, 61.0, 120.0)] == [
        0, -1, -1, 2, -1, 1,
    ]  # fmt: skip
    assert access.admit("m", "deadline_exceeded", 121.0) == access.admit("other", "not_ready", 121.0) == 0
    assert access.admit("m", "not_ready", 50.0) == 0, "a clock that was set back does not silence the log"
    assert not AccessLog(cast("LineHandler", None), every=True).throttles(503)


@pytest.mark.parametrize(
    ("level", "every", "expected"),
    [
        ("info", True, [200, 404, 499, 500, 503, 504]),
        ("warning", True, [500, 503, 504]),
        ("error", True, [500]),
        ("info", False, [500, 503, 504]),
        ("error", False, [500]),
    ],
)
def test_the_level_of_the_log_holds_for_requests(level: str, every: bool, expected: list[int]) -> None:
    """With `--log-level warning`, requests with a status below 500 leave no line."""
    program = f"""
from inferpool.observe.logs import AccessLog, configure_logs
access = AccessLog(configure_logs({level!r}, "json"), every={every})
print([status for status in (200, 404, 499, 500, 503, 504) if access.wants(status)])
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert json.loads(run.stdout) == expected


def test_no_line_has_a_payload(logging_server: Server) -> None:
    """No part of a body gets into the log, whatever the outcome of the request."""
    server, begin = logging_server, mark(logging_server)
    secret = 2718.281828
    for inputs in ([[1, 1, 1, secret]], [[secret]], [[RAISE, 1, 1, secret]], f"it is {secret}", {secret: 1}):
        server.post("/predict/m", json={"inputs": inputs})
    server.post("/predict/m", content=f'{{"inputs": {secret}'.encode())
    server.post("/v2/models/m/infer", json={"inputs": [{"name": secret}]})
    assert len(lines_since(server, begin)) == 7
    assert "2718" not in json.dumps(server.log)


def test_many_requests_leave_as_many_complete_lines(logging_server: Server) -> None:
    """2,000 requests of 20 clients leave 2,000 lines with different ids."""
    server, begin = logging_server, mark(logging_server)

    async def send() -> None:
        async def one() -> None:
            client = await Client.connect(server.port)
            for _ in range(100):
                assert (await client.post("/predict/m", b'{"inputs": [[1, 2, 3, 4]]}')).status == 200
            await client.close()

        await asyncio.gather(*(one() for _ in range(20)))

    asyncio.run(send())
    found = lines_since(server, begin)
    assert len(found) == len({line["request_id"] for line in found}) == 2000
    assert not [line for line in server.log if line["level"] == "raw"]


def test_console_lines(make_chaos: MakeChaos, cache_dir: Path) -> None:
    """On a console a line is text: time, level, message, and the fields that have a value."""
    repository = make_chaos("m")
    environ = {"INFERPOOL_CACHE_DIR": str(cache_dir), "INFERPOOL_LOG_FORMAT": "console"}
    server = Server(repository, ("--access-log",), environ)
    server.wait_loaded()
    server.post("/predict/m", json={"inputs": [[1, 2, 3, 4]]}, headers={"X-Request-Id": "mine"})
    server.stop()
    (line,) = [line["message"] for line in server.log if "request_id=mine" in line["message"]]
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d\.\d{3} INFO     "
        r"(web-1: )?predict request_id=mine status=200 code=ok model=m version=1 rows=1"
        r" batch_rows=1 queue_ms=[\d.]+ compute_ms=[\d.]+ total_ms=[\d.]+ bytes_in=\d+ bytes_out=\d+"
        r" client=127.0.0.1 method=POST path=/predict/m",
        line,
    )
    server.kill()


@pytest.fixture
def unread(make_chaos: MakeChaos, cache_dir: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server and its port; nobody reads its log after its models are loaded."""
    command = [
        sys.executable,
        "-m",
        "inferpool",
        "serve",
        str(make_chaos("m")),
        "--port",
        "0",
        "--access-log",
    ]
    process = subprocess.Popen(
        command,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": f"{ROOT}:{CHAOS}",
            "INFERPOOL_LOG_FORMAT": "json",
            "INFERPOOL_CACHE_DIR": str(cache_dir),
        },
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    port = 0
    for text in process.stderr:
        message = json.loads(text)["message"]
        if found := re.search(r"listening on http://\S+:(\d+)", message):
            port = int(found[1])
        if "models" in message:
            break
    yield process, port
    process.kill()
    process.wait()
    process.stderr.close()


async def fill_log(port: int, count: int = 1000) -> None:
    """Send `count` requests; a pipe holds 64 KiB, and a thousand lines are several times as large."""
    client = await Client.connect(port)
    for _ in range(count):
        assert (await client.post("/predict/m", b'{"inputs": [[1, 2, 3, 4]]}')).status == 200
    await client.close()


def test_a_log_that_nobody_reads_delays_nothing(unread: tuple[subprocess.Popen[str], int]) -> None:
    """If nobody reads the log, requests are still answered, and SIGTERM still ends the server."""
    process, port = unread

    async def use() -> None:
        await fill_log(port)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"a request that is not HTTP makes uvicorn log a line\r\n\r\n")
        assert (await reader.readline()).split()[1] == b"400"
        writer.close()
        await fill_log(port, 1)

    asyncio.run(asyncio.wait_for(use(), 120))
    process.terminate()
    assert process.wait(20) == 0


def test_dropped_lines_are_counted_in_the_log(unread: tuple[subprocess.Popen[str], int]) -> None:
    """Lines beyond the limit are dropped and counted; all others are written."""
    process, port = unread
    assert process.stderr is not None
    sent = MOST_WAITING + 4000
    request = b"POST /predict/nobody HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"

    async def use() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request * sent)
        for _ in range(sent):
            head = await reader.readuntil(b"\r\n\r\n")
            found = re.search(rb"content-length: (\d+)", head)
            assert found is not None
            await reader.readexactly(int(found[1]))
        writer.close()

    asyncio.run(asyncio.wait_for(use(), 120))
    written = 0
    for text in process.stderr:
        line = json.loads(text)
        if dropped := re.search(r"(\d+) items were dropped", line["message"]):
            break
        written += line["message"] == "predict"
    assert dropped is not None
    assert int(dropped[1]) > 0
    assert written + int(dropped[1]) == sent


def test_the_last_lines_of_a_process_are_written() -> None:
    """A process that ends with an error writes every earlier line, even after a line that failed."""
    program = """
import logging
from inferpool.observe.logs import configure_logs
configure_logs("info", "json")
log = logging.getLogger("m")
log.info("%d is no number", "this")
for number in range(1000):
    log.info("line %d", number)
raise SystemExit(3)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 3
    first, *rest = [json.loads(line)["message"] for line in run.stderr.splitlines()]
    assert "%d is no number" in first
    assert rest == [f"line {number}" for number in range(1000)]
