"""SIGTERM: what was accepted is answered, what comes later is told to go, and the exit status says so."""

from __future__ import annotations

import asyncio
import json

import httpx
import numpy as np
import pytest

from tests.chaos import inferpool_chaos as chaos
from tests.clients import Client, with_clients
from tests.conftest import LANES, MakeChaos, Serve

pytestmark = pytest.mark.parametrize("lane", LANES, indirect=True, scope="module")


def test_sigterm_under_load_loses_no_accepted_request(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", run_ms=20, config="[batching]\nmax_rows = 4\n[instances]\ncount = 1\n"))
    clients, answered, terminated = 64, 0, False
    endings: list[str] = []

    async def ask(client: Client, number: int) -> None:
        nonlocal answered
        rng = np.random.default_rng(number)
        while True:
            rows = rng.integers(0, 9, (1, 4)).astype(float)
            client.send("/predict/m", json.dumps({"inputs": rows.tolist()}).encode())
            accepted = not terminated
            try:
                reply = await client.receive()
            except (asyncio.IncompleteReadError, ConnectionError):
                assert not accepted, "a request that was there before the signal got no answer"
                endings.append("closed")
                return
            if reply.status == 200:
                assert json.loads(reply.body)["outputs"]["sum"] == chaos.expected(rows).tolist()
                answered += 1
                if reply.headers.get("connection") == "close":
                    endings.append("asked to go")
                    return
            else:
                assert (reply.status, json.loads(reply.body)["code"]) == (503, "draining")
                assert reply.headers["connection"] == "close"
                endings.append("refused")
                return

    async def load() -> None:
        nonlocal terminated
        work = asyncio.create_task(with_clients(server.port, clients, ask))
        while await asyncio.to_thread(server.metric, "queue_rows", model="m") < clients / 2:
            assert not work.done()
        before = answered
        server.process.terminate()
        await asyncio.to_thread(server.wait_for, "draining")
        terminated = True
        await work
        assert answered - before >= clients / 2, "what waited when the signal came was answered"

    asyncio.run(load())
    assert server.process.wait(30) == 0
    assert len(endings) == clients


def test_readiness_goes_first_and_work_is_finished(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", run_ms=1500, config="[instances]\ncount = 1\n"), "--measure-ms", "0")

    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as session:
            slow = asyncio.create_task(session.post("/predict/m", json={"inputs": [[1, 2, 3, 4]]}))
            while (await session.get("/metrics")).text.find("inferpool_in_flight_requests 1.0") < 0:
                pass
            server.process.terminate()
            while (await session.get("/health/ready")).status_code == 200:
                pass
            assert (await session.get("/health/live")).status_code == 200
            assert (await session.get("/health")).json()["status"] == "draining"
            late = await session.post("/predict/m", json={"inputs": [[1, 2, 3, 4]]})
            assert late.status_code == 503
            assert late.json()["code"] == "draining"
            assert late.headers["retry-after"]
            assert (await slow).status_code == 200

    asyncio.run(scenario())
    assert server.process.wait(30) == 0


def test_while_it_settles_requests_are_answered_and_their_clients_asked_to_go(
    serve: Serve, make_chaos: MakeChaos
) -> None:
    server = serve(make_chaos("m"), "--drain-settle-s", "2")
    body = json.dumps({"inputs": [[1, 2, 3, 4]]}).encode()

    async def scenario() -> None:
        idle, kept, late = [await Client.connect(server.port) for _ in range(3)]
        for client in (idle, kept):
            assert "connection" not in (await client.post("/predict/m", body)).headers
        server.process.terminate()
        while server.get("/health/ready").status_code == 200:
            pass
        assert server.get("/health").json()["status"] == "draining"
        for path in ("/health/live", "/models", "/nothing", "/v2/health/live", "/predict/m"):
            answer = server.get(path)
            assert answer.headers["connection"] == "close", path
        for client in (kept, late):
            reply = await client.post("/predict/m", body)
            assert (reply.status, reply.headers["connection"]) == (200, "close")
            with pytest.raises(asyncio.IncompleteReadError):
                await client.receive()
        # What stays quiet is closed without a word: no answer that could be taken for the next one's.
        with pytest.raises(asyncio.IncompleteReadError) as ended:
            await idle.receive()
        assert ended.value.partial == b""
        for client in (idle, kept, late):
            await client.close()

    asyncio.run(scenario())
    assert server.process.wait(30) == 0
    server.wait_for("settled")


def test_what_is_not_done_in_time_makes_the_exit_status_1(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", run_ms=3000), "--measure-ms", "0", "--drain-timeout-s", "0.2")

    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as session:
            slow = asyncio.create_task(session.post("/predict/m", json={"inputs": [[1, 2, 3, 4]]}))
            while (await session.get("/metrics")).text.find("inferpool_in_flight_requests 1.0") < 0:
                pass
            server.process.terminate()
            await asyncio.wait([slow])
            slow.exception()

    asyncio.run(scenario())
    assert server.process.wait(30) == 1


def test_a_client_that_never_finishes_its_body_does_not_hold_up_the_end(
    serve: Serve, make_chaos: MakeChaos
) -> None:
    server = serve(make_chaos("m"))

    async def scenario() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /predict/m HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
        while server.metric("in_flight_requests") < 1:
            pass
        server.process.terminate()
        await asyncio.to_thread(server.process.wait, 15)
        writer.close()

    asyncio.run(scenario())
    assert server.process.returncode == 0
