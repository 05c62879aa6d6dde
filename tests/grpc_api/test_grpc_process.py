"""The process that serves gRPC: keys, TLS, deadlines, clients that hang up, its death and its end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from inferpool.errors import ConfigError
from inferpool.grpc_api.client_line import _address
from inferpool.grpc_api.message_budget import MessageBudget
from inferpool.grpc_api.messages import message
from inferpool.grpc_api.rest_client import RestAnswer
from inferpool.grpc_api.service import Service
from inferpool.grpc_api.tls_credentials import TlsCredentials
from inferpool.http.access.make_gate import check_exposure
from inferpool.http.access.tls import TlsFiles
from inferpool.http.problems import GRPC_STATUSES, STATUSES
from inferpool.settings import Settings

from tests.certificates import Authority
from tests.chaos import inferpool_chaos as chaos
from tests.conftest import MakeChaos, Serve
from tests.grpc_api.calls import Caller, metadata_of, process_of, rows_request
from tests.http.access.keys import KeyFile, with_every_scope
from tests.server import Server, wait_until

FLAGS = ("--grpc-port", "0", "--measure-ms", "0")


class Guarded:
    """A server with keys."""

    def __init__(self, server: Server, keys: KeyFile) -> None:
        self.server = server
        self.keys = keys

    def caller(self, name: str) -> Caller:
        return Caller(self.server, self.keys.keys[name])


@pytest.fixture(scope="module")
def guarded(
    module_serve: Serve, module_make_chaos: MakeChaos, tmp_path_factory: pytest.TempPathFactory
) -> Guarded:
    keys = with_every_scope(tmp_path_factory.mktemp("keys") / "keys.toml")
    keys.add("rival", "predict", tenant="rival")
    repository = module_make_chaos("m", "[instances]\ncount = 1\n")
    server = module_serve(
        repository, *FLAGS, "--keys-file", str(keys.path), "--public-scopes", "metrics", "--access-log"
    )
    return Guarded(server, keys)


@pytest.mark.parametrize(
    ("key", "status"),
    [
        (None, "UNAUTHENTICATED"),
        ("infp_nobody", "UNAUTHENTICATED"),
        ("expired", "UNAUTHENTICATED"),
        ("read", "PERMISSION_DENIED"),
        ("other", "PERMISSION_DENIED"),
    ],
)
def test_a_call_without_the_right_key_is_refused(guarded: Guarded, key: str | None, status: str) -> None:
    caller = Caller(guarded.server, None if key is None else guarded.keys.keys.get(key, key))
    error = caller.refused(rows_request("m", 1))
    assert error.code().name == status
    assert "code" in metadata_of(error)
    caller.close()


def test_each_call_needs_the_scope_of_its_route(guarded: Guarded) -> None:
    predict, read, admin = (guarded.caller(name) for name in ("predict", "read", "admin"))
    assert predict.infer(rows_request("m", 1)).model_name == "m"
    assert [entry.name for entry in read.call("RepositoryIndex").models] == ["m"]
    assert read.call("ModelReady", name="m").ready
    refused: list[tuple[Caller, str, dict[str, Any]]] = [
        (predict, "RepositoryIndex", {}),
        (read, "RepositoryModelLoad", {"model_name": "m"}),
    ]
    for caller, method, fields in refused:
        with pytest.raises(grpc.RpcError) as raised:
            caller.call(method, **fields)
        assert raised.value.code().name == "PERMISSION_DENIED"
    admin.call("RepositoryModelUnload", model_name="m")
    assert predict.refused(rows_request("m", 1)).code().name == "UNAVAILABLE"
    admin.call("RepositoryModelLoad", model_name="m")
    assert predict.infer(rows_request("m", 1)).model_name == "m"
    for caller in (predict, read, admin):
        caller.close()


def test_the_access_log_has_the_address_of_the_client(guarded: Guarded) -> None:
    caller = guarded.caller("predict")
    request = rows_request("m", 1)
    request.id = "seen"
    call = caller.begin(request)
    request_id = metadata_of(call)["x-request-id"]
    wait_until(
        lambda: any(line.get("request_id") == request_id for line in guarded.server.log), "the call is logged"
    )
    [line] = [line for line in guarded.server.log if line.get("request_id") == request_id]
    assert line["client"] in ("127.0.0.1", "::1")
    caller.close()


def test_calls_of_a_client_that_hangs_up_leave_the_queue(guarded: Guarded) -> None:
    caller = guarded.caller("predict")
    running = caller.begin(rows_request("m", chaos.WAIT))
    guarded.server.wait_for_metric("in_flight_requests", at_least=1)
    waiting = caller.begin(rows_request("m", 1))
    guarded.server.wait_for_metric("queue_rows", at_least=1, model="m")
    waiting.cancel()
    guarded.server.wait_for_metric("queue_rows", at_most=0, model="m")
    running.cancel()
    # The run that nobody waits for is stopped.
    assert caller.infer(rows_request("m", 1)).model_name == "m"
    caller.close()


def test_a_stream_that_its_client_breaks_off_leaves_the_queue(guarded: Guarded) -> None:
    caller = guarded.caller("predict")
    ended = threading.Event()

    def requests() -> Iterator[Any]:
        yield rows_request("m", 1)
        yield rows_request("m", chaos.WAIT)
        guarded.server.wait_for_metric("in_flight_requests", at_least=1)
        yield rows_request("m", 1, 1, 1)
        ended.wait()

    stream = caller.stream(requests())
    assert next(stream).infer_response.model_name == "m"
    guarded.server.wait_for_metric("queue_rows", at_least=3, model="m")
    stream.cancel()
    ended.set()
    guarded.server.wait_for_metric("queue_rows", at_most=0, model="m")
    guarded.server.wait_for_metric("in_flight_requests", at_most=0)
    assert caller.infer(rows_request("m", 1)).model_name == "m"
    caller.close()


def test_a_stream_has_one_deadline_and_goes_on_after_an_error(guarded: Guarded) -> None:
    caller = guarded.caller("predict")
    wrong = rows_request("m", 1)
    wrong.id, wrong.inputs[0].name = "wrong", "y"
    stream = caller.stream(iter([rows_request("m", 1), wrong, rows_request("m", 2)]))
    first, second, third = stream
    assert (second.infer_response.id, second.infer_response.model_name) == ("wrong", "m")
    assert '"y"' in second.error_message
    assert not first.error_message
    assert not third.error_message
    ended = threading.Event()

    def requests() -> Iterator[Any]:
        yield rows_request("m", chaos.WAIT)
        ended.wait()  # else the call may end well, with the refusal of the request, just before its deadline

    stream = caller.stream(requests(), timeout=1)
    with pytest.raises(grpc.RpcError) as raised:
        list(stream)
    ended.set()
    assert raised.value.code().name == "DEADLINE_EXCEEDED"
    assert caller.infer(rows_request("m", 1)).model_name == "m"
    caller.close()


@pytest.mark.parametrize("key", [None, "infp_nobody"])
def test_a_stream_needs_a_key_before_its_first_message(guarded: Guarded, key: str | None) -> None:
    caller, sent = Caller(guarded.server, key), threading.Event()

    def requests() -> Iterator[Any]:
        sent.wait(60)
        yield from ()

    with pytest.raises(grpc.RpcError) as raised:
        next(caller.stream(requests(), timeout=30))
    sent.set()
    assert raised.value.code().name == "UNAUTHENTICATED"
    caller.close()


def test_a_tenant_cannot_hold_all_streams(guarded: Guarded) -> None:
    """A tenant that has its share of the streams is refused one more; another tenant still gets one."""
    greedy, other, done = guarded.caller("predict"), guarded.caller("rival"), threading.Event()

    def requests() -> Iterator[Any]:
        yield rows_request("m", 1)
        done.wait(60)

    def held(caller: Caller, streams: list[Any]) -> Any:
        stream = caller.stream(requests())
        streams.append(stream)
        return next(stream).infer_response.model_name

    streams: list[Any] = []
    with pytest.raises(grpc.RpcError) as raised:  # noqa: PT012 - the count depends on the memory of the machine
        for _ in range(10_000):
            held(greedy, streams)
    assert raised.value.code().name == "RESOURCE_EXHAUSTED"
    assert metadata_of(raised.value)["code"] == "rate_limited"
    assert "open streams" in raised.value.details()
    assert held(other, streams) == "m"
    done.set()
    for stream in streams:
        stream.cancel()
    for caller in (greedy, other):
        caller.close()


def test_a_deadline_reaches_the_run(guarded: Guarded) -> None:
    caller = guarded.caller("predict")
    error = caller.refused(rows_request("m", chaos.WAIT), timeout=1)
    assert error.code().name == "DEADLINE_EXCEEDED"
    assert caller.infer(rows_request("m", 1)).model_name == "m"
    caller.close()


class FakeContext:
    """The context of a call, as far as `Service.ask` needs one."""

    def __init__(self, left_s: float | None, *metadata: tuple[str, str]) -> None:
        self._left_s = left_s
        self._metadata = metadata

    def time_remaining(self) -> float | None:
        return self._left_s

    def invocation_metadata(self) -> Any:
        return self._metadata

    def set_trailing_metadata(self, metadata: Any) -> None:
        pass


class FakeRest:
    head = b""

    async def ask(self, client: bytes, head: bytes, parts: Any) -> RestAnswer:
        self.head = head
        return RestAnswer(200, {}, b"")


class FakeLines:
    def of(self, context: Any) -> bytes:
        return b""


def test_the_request_has_the_deadline_and_the_metadata_of_the_call() -> None:
    rest: Any = FakeRest()
    lines: Any = FakeLines()
    service = Service(rest, MessageBudget(0, 1), lines, needs_key=False)
    context: Any = FakeContext(1.5, ("x-api-key", "k"), ("traceparent", "a\r\nhost: b"), ("user-agent", "x"))
    asyncio.run(service.ask(context, "GET", "/v2"))
    lines_of_head = rest.head.split(b"\r\n")
    assert b"x-timeout-ms: 1500.000" in lines_of_head
    assert b"x-api-key: k" in lines_of_head
    assert b"traceparent" not in rest.head
    assert b"user-agent" not in rest.head
    for endless in (FakeContext(None), FakeContext(1e11)):
        asyncio.run(service.ask(endless, "GET", "/v2"))  # type: ignore[arg-type]
        assert b"x-timeout-ms" not in rest.head


def test_every_error_of_the_catalogue_has_a_status() -> None:
    assert GRPC_STATUSES.keys() == STATUSES.keys()
    assert {grpc.StatusCode[name] for name in GRPC_STATUSES.values()}


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.1", "192.0.2.1"),
        ("ipv6:%5B2001:db8::1%5D", "2001:db8::1"),
        ("ipv6:%5B::ffff:192.0.2.1%5D", "192.0.2.1"),
        ("unix", ""),
    ],
)
def test_the_address_of_a_peer_is_read_as_grpc_writes_it(peer: str, address: str) -> None:
    assert _address(peer) == address


@pytest.mark.parametrize("engine", ["in-process", "process"])
def test_a_process_that_is_killed_comes_back_and_a_drain_answers_its_calls(
    serve: Serve, make_chaos: MakeChaos, tmp_path: Path, engine: str
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    flags = ("--engine", engine, *(("--web-processes", "1") if engine == "process" else ()))
    server = serve(make_chaos("m", run_gate=str(gate)), *FLAGS, *flags)
    caller = Caller(server)
    assert caller.infer(rows_request("m", 1)).model_name == "m"
    pid = process_of(server)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert server.post("/predict/m", json={"inputs": [[1, 0, 0, 0]]}).status_code == 200
    server.wait_for_metric("grpc_restarts_total", at_least=1)
    wait_until(lambda: process_of(server) not in (None, pid), "another process has taken its place")
    assert caller.infer(rows_request("m", 1)).model_name == "m"

    ended = threading.Event()

    def requests() -> Iterator[Any]:
        yield rows_request("m", 1)
        ended.wait()

    idle = caller.stream(requests())
    assert next(idle).infer_response.model_name == "m"
    last = caller.begin(rows_request("m", chaos.WAIT))
    server.wait_for_metric("in_flight_requests", at_least=1)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("SIGTERM: draining")
    chaos.open_gate(gate)
    assert last.result().model_name == "m"
    # A stream without a request in flight ends as if its client had ended it.
    assert list(idle) == []
    ended.set()
    assert server.process.wait(60) == 0
    caller.close()


def test_a_certificate_may_take_the_place_of_a_key(
    serve: Serve, make_chaos: MakeChaos, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    authority.issue(certificate, key)
    make_chaos("other")
    server = serve(
        make_chaos("m"), *FLAGS, "--tls-certificate-file", str(certificate), "--tls-key-file", str(key),
        "--tls-client-ca-file", str(authority.file), "--tls-client-scopes", "predict:m",
    )  # fmt: skip
    own_certificate, own_key = tmp_path / "client.crt", tmp_path / "client.key"
    authority.issue(own_certificate, own_key, "acme", names=())
    root = authority.file.read_bytes()
    caller = Caller(
        server,
        credentials=grpc.ssl_channel_credentials(root, own_key.read_bytes(), own_certificate.read_bytes()),
    )
    assert caller.infer(rows_request("m", 1)).model_name == "m"
    error = caller.refused(rows_request("other", 1))
    assert error.code().name == "PERMISSION_DENIED"
    assert '"acme"' in error.details()
    caller.close()
    stranger = Caller(server, credentials=grpc.ssl_channel_credentials(root))
    method = stranger.method("ServerLive")
    with pytest.raises(grpc.RpcError) as raised:
        method(message("ServerLiveRequest")(), timeout=60)
    assert raised.value.code().name == "UNAVAILABLE"
    stranger.close()


def test_renewed_tls_files_are_read_again_and_wrong_ones_are_not(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    authority.issue(certificate, key)
    credentials = TlsCredentials(TlsFiles(certificate, key, None))
    assert credentials._renewed() is None
    old = key.read_bytes()
    authority.issue(certificate, key)
    new = key.read_bytes()
    key.write_bytes(old)
    assert credentials._renewed() is None
    key.write_bytes(new)
    assert credentials._renewed() is not None
    assert credentials._renewed() is None


def test_a_port_that_is_taken_ends_the_start(serve: Serve, make_chaos: MakeChaos) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AssertionError, match="--grpc-port choose another address"):
            serve(make_chaos("m"), "--grpc-port", str(port))


def test_grpc_is_exposed_although_http_has_a_unix_socket(tmp_path: Path) -> None:
    settings = Settings(host="0.0.0.0", unix_socket=tmp_path / "s", admin_routes="on")
    check_exposure(settings)
    with pytest.raises(ConfigError, match=r"everyone who reaches 0\.0\.0\.0"):
        check_exposure(settings.model_copy(update={"grpc_port": 8001}))


def test_the_port_is_a_port() -> None:
    assert Settings().grpc_port is None
    with pytest.raises(ValueError, match="65535"):
        Settings(grpc_port=65_536)
