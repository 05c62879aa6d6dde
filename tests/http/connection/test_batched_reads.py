"""Many connections are read in one call: each gets its own responses, whatever else its client does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import resource
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from inferpool.http.connection import batched_reads
from inferpool.http.connection.connection import Connection

from tests.chaos import inferpool_chaos as chaos
from tests.conftest import Serve, chaos_in
from tests.http.connection.fakes import Harness
from tests.http.connection.test_pipelining import Wire, request, sums
from tests.server import Server


@pytest.fixture(autouse=True)
def module() -> None:
    compiled = vars(batched_reads)["_socketio"] is not None
    assert compiled or "CI" not in os.environ, "CI has a compiler"
    if not compiled:
        pytest.skip("the project was installed without a C compiler, or the system has no epoll")


always_batched = pytest.mark.parametrize(
    "server_module", ["tests.servers.always_batched_reads"], indirect=True, scope="module"
)

CLIENTS = 24
"""More than are needed for their connections to join."""


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A marked run of the model `one-by-one` waits for it."""
    gate = tmp_path_factory.mktemp("gate") / "gate"
    os.mkfifo(gate)
    return gate


@pytest.fixture(scope="module")
def server(module_serve: Serve, tmp_path_factory: pytest.TempPathFactory, gate: Path) -> Server:
    """A server that is fast enough on a busy machine, where measurements would make its batches small.

    Its queue has room for all that the clients send. The model `one-by-one` runs one row at a time.
    """
    make = chaos_in(tmp_path_factory.mktemp("repository"))
    make("one-by-one", "[instances]\ncount = 1\n[batching]\nmax_rows = 1\n", run_gate=str(gate))
    config = "[batching]\nmax_rows = 1024\n[queue]\nmax_rows = 1000000\n"
    return module_serve(make("m", config, run_ms=2), "--max-body-bytes", "400000", "--measure-ms", "0")


def mixed(wire: Wire, rng: random.Random) -> None:
    """Send one of many kinds of requests, and check the response."""
    kind = rng.randrange(12)
    marks = [rng.randrange(10 ** rng.randrange(1, 6)) for _ in range(rng.choice((1, 1, 1, 2)))]
    text = request(*marks)
    if kind == 0:  # in two sends
        cut = rng.randrange(1, len(text))
        wire.send(text[:cut])
        wire.send(text[cut:])
    elif kind == 1:  # pipelined
        wire.send(text * 3)
        for _ in range(2):
            assert json.loads(wire.answer()[2])["outputs"]["sum"] == sums(*marks)
    elif kind == 2:  # another route
        wire.send("GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert wire.answer()[0] == 200
        return
    elif kind == 3:  # so large that it is received straight into its memory
        body = np.zeros((3000, 4), np.float32)
        body[:, 0] = marks[0]
        described = {"name": "x", "datatype": "FP32", "shape": [3000, 4]}
        head = json.dumps({"inputs": [{**described, "parameters": {"binary_data_size": body.nbytes}}]})
        padded = head + " " * 150_000
        fields = (
            f"content-length: {len(padded) + body.nbytes}\r\ninference-header-content-length: {len(padded)}"
        )
        wire.send(f"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\n{fields}\r\n\r\n{padded}".encode())
        wire.send(body.tobytes())
        status, _, answer = wire.answer()
        assert status == 200, answer[:300]
        return
    elif kind == 4:  # named
        wire.send(request(*marks, headers="x-request-id: mine\r\n"))
        status, headers, answer = wire.answer()
        assert (status, headers["x-request-id"]) == (200, "mine")
        assert json.loads(answer)["outputs"]["sum"] == sums(*marks)
        return
    elif kind == 5:  # wrong
        wire.send(text.replace("[", "{"))
        assert wire.answer()[0] == 400
        return
    else:
        wire.send(text)
    status, _, answer = wire.answer()
    assert status == 200
    assert json.loads(answer)["outputs"]["sum"] == sums(*marks)


@always_batched
def test_a_client_that_disconnects_while_a_batch_runs_is_dropped_from_the_queue(
    server: Server, gate: Path
) -> None:
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(Wire(server)) for _ in range(4)]
        for wire in wires:
            wire.send(request(1, path="/predict/one-by-one"))
            assert wire.answer()[0] == 200
        wires[0].send(request(chaos.WAIT, path="/predict/one-by-one"))
        server.wait_for_metric("in_flight_requests", 1)
        server.wait_for_metric("queue_rows", at_most=0, model="one-by-one")
        for number in (1, 2, 3):
            wires[number].send(request(number, path="/predict/one-by-one"))
        server.wait_for_metric("in_flight_requests", 4)
        wires[3].close()
        server.wait_for_metric("dropped_entries_total", 1, model="one-by-one", reason="disconnected")
        chaos.open_gate(gate)
        for mark, wire in zip((chaos.WAIT, 1, 2), wires, strict=False):
            assert json.loads(wire.answer()[2])["outputs"]["sum"] == sums(mark)


@always_batched
@pytest.mark.parametrize("headers", ["connection: close\r\n", "upgrade: x\r\nconnection: upgrade, close\r\n"])
def test_the_refusal_of_a_large_request_arrives(server: Server, headers: str) -> None:
    """The kernel resets a connection that is closed with unread bytes, and the client loses its response."""
    with Wire(server) as wire:
        for _ in range(2):
            wire.send(request(1))
            assert wire.answer()[0] == 200
        wire.send(request(*range(1500), path="/predict/nobody", headers=headers))
        assert wire.answer()[0] in (400, 404)
        assert wire.ended()


@pytest.mark.parametrize("server_module", ["inferpool"], indirect=True, scope="module")
def test_without_descriptors_the_loop_goes_on_reading(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(Wire(server)) for _ in range(CLIENTS)]
        for wire in wires:
            wire.send(request(1))
            assert wire.answer()[0] == 200
        reader = server.web_process()
        used = len(list(Path(f"/proc/{reader}/fd").iterdir()))
        _, most = resource.prlimit(reader, resource.RLIMIT_NOFILE)
        before = resource.prlimit(reader, resource.RLIMIT_NOFILE, (used, most))
        for number, wire in enumerate(wires):
            wire.send(request(number))
        for number, wire in enumerate(wires):
            assert json.loads(wire.answer()[2])["outputs"]["sum"] == sums(number)
        resource.prlimit(reader, resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    "server_module", ["inferpool", "tests.servers.always_batched_reads"], indirect=True, scope="module"
)
def test_clients_that_mix_requests_of_all_kinds_get_their_own_responses(server: Server) -> None:
    """The last test of each server."""
    faults: list[BaseException] = []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(3):
                with Wire(server) as wire:
                    for _ in range(25):
                        mixed(wire, rng)
                    if rng.random() < 0.5:
                        wire.send(request(1))  # and close without reading the response
        except BaseException as error:
            faults.append(error)
            raise

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not faults
    assert not any(thread.is_alive() for thread in threads)
    assert not [line for line in server.log if line["level"] in ("error", "raw")]
    assert server.stop() == 0


def test_connections_are_aborted_if_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> list[tuple[int, bytes | None]]:
        raise MemoryError

    ends: list[str] = []
    aborted = asyncio.Event()
    near, far = socket.socketpair()
    transport: Any = SimpleNamespace(
        get_extra_info=lambda name: near if name == "socket" else None,
        pause_reading=lambda: ends.append("paused"),
        abort=lambda: aborted.set(),
    )
    with near, far, asyncio.Runner() as runner:

        async def read() -> None:
            loop = asyncio.get_running_loop()
            connection = Connection(SimpleNamespace(), Harness().shared, loop, SimpleNamespace())
            connection.made(transport, SimpleNamespace(read_paused=True), ())
            own = batched_reads.ReadBatcher(0)
            own.join(connection, 1)
            assert connection.batched
            monkeypatch.setattr(batched_reads, "_socketio", SimpleNamespace(receive=exhausted))
            far.sendall(b"x")
            await aborted.wait()
            own.close()
            assert not connection.batched

        runner.run(read())
    assert ends[0] == "paused"
