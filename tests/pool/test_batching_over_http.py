"""The laws of batching through the real server, with the backend that misbehaves on demand.

A request with a row marked `WAIT` holds an instance until its gate opens. Requests that are sent meanwhile
wait together.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.chaos import inferpool_chaos as chaos
from tests.clients import Client, Reply, with_clients
from tests.conftest import MakeChaos, Serve
from tests.server import POLL_S, Server

ONE = "[instances]\ncount = 1\n"
ONE_ROW = ONE + "[batching]\nmax_rows = 1\n"


def body(*marks: float, **rest: object) -> bytes:
    """A request with a row for each mark."""
    return json.dumps({"inputs": [[mark, 0, 0, 0] for mark in marks], **rest}).encode()


def sums(*marks: float) -> list[float]:
    """The right answer to this request."""
    rows = np.zeros((len(marks), 4))
    rows[:, 0] = marks
    answer: list[float] = chaos.expected(rows).tolist()
    return answer


async def post(server: Server, content: bytes, **headers: str) -> Reply:
    """One request on a connection of its own."""
    client = await Client.connect(server.port)
    try:
        return await client.post(
            "/predict/m", content, {name.replace("_", "-"): of for name, of in headers.items()}
        )
    finally:
        await client.close()


async def until(server: Server, name: str, at_least: float, **labels: Any) -> None:
    """Wait until a metric has reached a value."""
    await asyncio.to_thread(server.wait_for_metric, name, at_least=at_least, **labels)


def gather(*work: Coroutine[Any, Any, Reply]) -> list[Reply]:
    """Run requests at the same time."""

    async def run() -> list[Reply]:
        return list(await asyncio.gather(*work))

    return asyncio.run(run())


def code(reply: Reply) -> str:
    """The code of a problem."""
    found: str = json.loads(reply.body)["code"]
    return found


def outputs(reply: Reply) -> list[float]:
    """The sums of an answer."""
    assert reply.status == 200, reply
    found: list[float] = json.loads(reply.body)["outputs"]["sum"]
    return found


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A named pipe: the `run_gate` of a model."""
    path = tmp_path / "gate"
    os.mkfifo(path)
    return path


@contextlib.asynccontextmanager
async def held(server: Server, gate: Path, instances: int = 1) -> AsyncIterator[None]:
    """Hold so many instances while the block runs. Then the gate opens, and their answers are checked."""
    waiting = [asyncio.create_task(post(server, body(chaos.WAIT))) for _ in range(instances)]
    await until(server, "in_flight_requests", instances)
    await asyncio.to_thread(server.wait_for_metric, "queue_rows", at_most=0, model="m")
    yield
    while not all(task.done() for task in waiting):
        # A run that comes to the gate later than it opens needs it to be opened again.
        with contextlib.suppress(OSError):  # no run has come to the gate yet
            os.close(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))
        await asyncio.sleep(POLL_S)
    for task in waiting:
        assert outputs(task.result()) == sums(chaos.WAIT)


def while_held(server: Server, gate: Path, *contents: bytes) -> list[Reply]:
    """Send requests that all wait together; returns their replies."""

    async def scenario() -> list[Reply]:
        async with held(server, gate):
            tasks = [asyncio.create_task(post(server, content)) for content in contents]
            await until(server, "in_flight_requests", 1 + len(contents))
            await until(server, "queue_rows", len(contents), model="m")
        return list(await asyncio.gather(*tasks))

    return asyncio.run(scenario())


def test_a_model_that_mixes_rows_is_served_alone_and_right(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", mix=True))
    batching = server.get("/models/m/1").json()["batching"]
    assert batching["enabled"] is False
    assert "differs" in batching["reason"]
    replies = gather(*(post(server, body(1, number)) for number in range(32)))
    for number, reply in enumerate(replies):
        alone = np.array(sums(1, number))
        np.testing.assert_allclose(outputs(reply), alone - alone.mean())
    assert server.metric("batch_rows_sum", model="m") == server.metric("batch_rows_count", model="m")


def test_a_fixed_first_dimension_is_served_alone(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", first=2))
    assert "fixed at 2" in server.get("/models/m/1").json()["batching"]["reason"]
    assert outputs(gather(post(server, body(1, 2)))[0]) == sums(1, 2)
    assert code(gather(post(server, body(1)))[0]) == "invalid_input"


def test_latencies_are_shown_kept_between_starts_and_updated(serve: Serve, make_chaos: MakeChaos) -> None:
    # No other test has a model with this time, whose plan might be in the cache already.
    repository = make_chaos("m", run_ms=2.125)
    server = serve(repository)
    first = server.get("/models/m/1").json()
    assert first["latency"][0]["rows"] == 1
    assert first["latency"][0]["compute_ms"] >= 2
    for _ in range(5):
        server.post("/predict/m", content=body(1))
    again = server.get("/models/m/1").json()["latency"][0]
    assert again["runs"] == first["latency"][0]["runs"] + 5
    server.stop()
    restarted = serve(repository).get("/models/m/1").json()
    assert restarted["batching"] == first["batching"]
    assert restarted["latency"] == first["latency"], "a new measurement would give other numbers"


def test_a_deadline_that_cannot_be_met_is_refused_at_once(
    serve: Serve, make_chaos: MakeChaos, gate: Path
) -> None:
    server = serve(make_chaos("m", run_ms=50, run_gate=str(gate), config=ONE_ROW))

    async def scenario() -> tuple[list[Reply], Reply]:
        async with held(server, gate):
            waiting = [asyncio.create_task(post(server, body(1))) for _ in range(20)]
            await until(server, "queue_rows", 20, model="m")
            late = await post(server, body(2, parameters={"priority": 9}), x_timeout_ms="500")
        return list(await asyncio.gather(*waiting)), late

    replies, late = asyncio.run(scenario())
    assert all(reply.status == 200 for reply in replies)
    assert (late.status, code(late)) == (504, "deadline_exceeded")
    assert "the deadline would be missed: estimated" in json.loads(late.body)["detail"]
    assert server.metric("dropped_entries_total", model="m") == 0, "the request has never waited"


def test_a_deadline_that_passes_in_the_queue_is_answered_then_and_never_run(
    serve: Serve, make_chaos: MakeChaos, gate: Path
) -> None:
    # Nothing is measured, so that the refusal cannot be foreseen.
    server = serve(make_chaos("m", run_gate=str(gate), config=ONE), "--measure-ms", "0")

    async def scenario() -> Reply:
        async with held(server, gate):
            return await post(server, body(2, parameters={"timeout_ms": 2000}))

    late = asyncio.run(scenario())
    assert (late.status, code(late)) == (504, "deadline_exceeded")
    # Timers of the event loop count whole milliseconds.
    assert float(late.headers["server-timing"].rsplit("=", 1)[1]) >= 1999
    assert server.metric("dropped_entries_total", reason="deadline") == 1
    assert server.metric("batch_rows_sum", model="m") == 1


def test_a_full_queue_refuses_and_says_when_to_come_back(
    serve: Serve, make_chaos: MakeChaos, gate: Path
) -> None:
    config = ONE_ROW + "[queue]\nmax_rows = 4\n"
    server = serve(make_chaos("m", run_ms=100, run_gate=str(gate), config=config))

    async def scenario() -> tuple[list[Reply], list[Reply]]:
        async with held(server, gate):
            waiting = [asyncio.create_task(post(server, body(number))) for number in range(4)]
            await until(server, "queue_rows", 4, model="m")
            refused = await asyncio.gather(*(post(server, body(9)) for _ in range(10)))
        return list(await asyncio.gather(*waiting)), list(refused)

    answered, refused = asyncio.run(scenario())
    assert [outputs(reply) for reply in answered] == [sums(number) for number in range(4)]
    for reply in refused:
        assert (reply.status, code(reply)) == (429, "queue_full")
        assert int(reply.headers["retry-after"]) >= 1
        # A row takes 100 ms, and much longer on a machine that is busy.
        assert 100 <= json.loads(reply.body)["retry_after_ms"] < 5000


def test_bytes_that_wait_are_bounded_too(serve: Serve, make_chaos: MakeChaos, gate: Path) -> None:
    config = ONE_ROW + "[queue]\nmax_bytes = 40\n"
    server = serve(make_chaos("m", run_gate=str(gate), config=config))

    async def scenario() -> tuple[list[Reply], Reply]:
        async with held(server, gate):
            waiting = [asyncio.create_task(post(server, body(number))) for number in range(2)]
            await until(server, "queue_rows", 2, model="m")
            refused = await post(server, body(3))
        return list(await asyncio.gather(*waiting)), refused

    answered, refused = asyncio.run(scenario())
    assert [reply.status for reply in answered] == [200, 200], "two rows of 16 bytes"
    assert (refused.status, code(refused)) == (429, "queue_full")
    assert "32 bytes wait and 40 may" in json.loads(refused.body)["detail"]


def test_urgent_requests_overtake_and_no_request_starves(
    serve: Serve, make_chaos: MakeChaos, gate: Path
) -> None:
    server = serve(make_chaos("m", run_ms=10, run_gate=str(gate), config=ONE_ROW))

    async def scenario() -> list[int]:
        done: list[int] = []

        async def one(priority: int) -> None:
            reply = await post(server, body(1, parameters={"priority": priority}))
            assert reply.status == 200
            done.append(priority)

        async with held(server, gate):
            tasks = [asyncio.create_task(one(9)) for _ in range(20)]
            await until(server, "queue_rows", 20, model="m")
            tasks += [asyncio.create_task(one(1)) for _ in range(20)]
            await until(server, "queue_rows", 40, model="m")
        await asyncio.gather(*tasks)
        return done

    order = asyncio.run(scenario())
    last_urgent = max(index for index, priority in enumerate(order) if priority == 1)
    lax = [index for index, priority in enumerate(order) if priority == 9]
    assert lax[-1] > last_urgent, "the urgent ones went first"
    assert sum(index < last_urgent for index in lax) >= 4, "one batch in four was led by the oldest entry"


def test_a_request_whose_client_has_gone_is_never_run(
    serve: Serve, make_chaos: MakeChaos, gate: Path
) -> None:
    server = serve(make_chaos("m", run_gate=str(gate), config=ONE_ROW))

    async def scenario() -> None:
        async with held(server, gate):
            leavers = [await Client.connect(server.port) for _ in range(5)]
            for client in leavers:
                client.send("/predict/m", body(chaos.RAISE))
            await until(server, "queue_rows", 5, model="m")
            for client in leavers:
                await client.close()
            await until(server, "dropped_entries_total", 5, reason="disconnected")

    asyncio.run(scenario())
    assert server.metric("queue_rows", model="m") == 0
    assert server.metric("batch_rows_sum", model="m") == 1
    server.wait_for_metric("in_flight_requests", at_most=0)


def test_poison_fails_alone_among_its_batch(serve: Serve, make_chaos: MakeChaos, gate: Path) -> None:
    config = ONE + "[batching]\nmax_rows = 64\n"
    server = serve(make_chaos("m", run_gate=str(gate), config=config))
    marks = [chaos.RAISE if number % 16 == 7 else float(number) for number in range(64)]
    replies = while_held(server, gate, *map(body, marks))
    for mark, reply in zip(marks, replies, strict=True):
        if mark == chaos.RAISE:
            assert (reply.status, code(reply)) == (500, "model_failed")
        else:
            assert outputs(reply) == sums(mark)
    assert server.metric("batch_rows_bucket", model="m", le="64.0") == 2, "the held row, and one batch"


def test_a_model_that_fails_again_and_again_is_not_logged_each_time(
    serve: Serve, make_chaos: MakeChaos
) -> None:
    server = serve(make_chaos("m", config=ONE))
    for number in range(20):
        headers = {"x-request-id": f"the-{number}th"}
        assert server.post("/predict/m", content=body(chaos.RAISE), headers=headers).status_code == 500
    # The log is read to its end once the server has ended.
    assert server.stop() == 0
    lines = [line for line in server.log if " failed on " in line["message"]]
    assert len(lines) == 1
    assert lines[0]["message"].endswith(
        "failed on request the-0th (0 more since the last such line): a marked row among […, …, …, …],"
        " which cannot be"
    )
    assert "in run\n" in lines[0]["exception"]
    assert "\nValueError: a marked row" in lines[0]["exception"]


def kept_plans(cache_dir: Path) -> set[Path]:
    """The plans in a server's cache."""
    return set(cache_dir.glob("*.json"))


def test_wrong_rows_turn_batching_off_and_every_answer_is_right(
    serve: Serve, make_chaos: MakeChaos, gate: Path, tmp_path: Path
) -> None:
    cache_dir = tmp_path / "cache"
    server = serve(make_chaos("m", run_gate=str(gate), config=ONE), INFERPOOL_CACHE_DIR=str(cache_dir))
    assert len(kept_plans(cache_dir)) == 1
    marks = [chaos.WRONG_ROWS, *map(float, range(7))]
    replies = while_held(server, gate, *map(body, marks))
    assert [outputs(reply) for reply in replies] == [sums(mark) for mark in marks]
    batching = server.get("/models/m/1").json()["batching"]
    assert (batching["enabled"], batching["evidence"], batching["max_rows"]) == (False, None, 1)
    assert batching["reason"] == 'turned off while serving: output "sum" has shape [9] for 8 rows'
    assert server.metric("batching_stopped_total", model="m", reason="rows") == 1
    assert not kept_plans(cache_dir)
    replies = gather(*(post(server, body(number, 1)) for number in range(20)))
    assert [outputs(reply) for reply in replies] == [sums(number, 1) for number in range(20)]


def test_a_model_that_mixes_rarely_is_found_out_while_it_serves(
    serve: Serve, make_chaos: MakeChaos, gate: Path, tmp_path: Path
) -> None:
    """No made-up row makes this model mix, so that runs at load prove it; a batch of real rows refutes it."""
    cache_dir = tmp_path / "cache"
    repository = make_chaos("m", run_gate=str(gate), reads=False, config=ONE)
    server = serve(repository, INFERPOOL_CACHE_DIR=str(cache_dir))
    batching = server.get("/models/m/1").json()["batching"]
    assert (batching["enabled"], batching["evidence"]) == (True, "runs")
    assert server.metric("batching_stopped_total", model="m") == 0
    marks = [chaos.MIX, *map(float, range(7))]
    replies = while_held(server, gate, *map(body, marks))
    assert [outputs(reply)[0] - sums(mark)[0] for mark, reply in zip(marks, replies, strict=True)] == [7] * 8
    server.wait_for_metric("batching_stopped_total", at_least=1, model="m", reason="answer")
    batching = server.get("/models/m/1").json()["batching"]
    assert batching["enabled"] is False
    assert batching["reason"].startswith('turned off while serving: output "sum" differs by ')
    assert batching["reason"].endswith(" in a batch of 8 rows")
    assert not kept_plans(cache_dir)
    assert any("batching is off from here on" in line["message"] for line in server.log)
    replies = gather(*(post(server, body(mark)) for mark in marks * 4))
    assert [outputs(reply) for reply in replies] == [sums(mark) for mark in marks * 4]


def test_a_large_request_is_split_and_joined(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", config="[batching]\nmax_rows = 16\n"))
    marks = [float(number) for number in range(1000)]
    assert outputs(gather(post(server, body(*marks)))[0]) == sums(*marks)
    assert server.metric("batch_rows_bucket", model="m", le="16.0") == server.metric(
        "batch_rows_count", model="m"
    )


def test_small_requests_are_answered_between_the_slices_of_a_large_one(
    serve: Serve, make_chaos: MakeChaos
) -> None:
    """The large request takes 3 s at least, its slices 16 ms each."""
    server = serve(make_chaos("m", row_ms=1, config=ONE + "[batching]\nmax_rows = 32\n"))

    async def scenario() -> None:
        large = asyncio.create_task(post(server, body(*range(3000))))
        await until(server, "queue_rows", 1000, model="m")

        async def small(client: Client, number: int) -> None:
            for _ in range(5):
                reply = await client.post("/predict/m", body(number))
                assert outputs(reply) == sums(number)

        await with_clients(server.port, 4, small)
        assert not large.done()
        assert outputs(await large) == sums(*range(3000))

    asyncio.run(scenario())


def test_an_instance_that_dies_is_replaced_and_its_batch_runs_again(
    serve: Serve, make_chaos: MakeChaos, gate: Path
) -> None:
    server = serve(make_chaos("m", run_gate=str(gate), config=ONE))
    marks = [chaos.DIE if number == 5 else float(number) for number in range(16)]
    replies = while_held(server, gate, *map(body, marks))
    for mark, reply in zip(marks, replies, strict=True):
        if mark == chaos.DIE:
            assert (reply.status, code(reply)) == (500, "model_failed")
        else:
            assert outputs(reply) == sums(mark)
    assert server.get("/health/ready").status_code == 200
    assert server.get("/models/m/1").json()["instances"] == [{"device": "cpu", "state": "ready"}]


def test_readiness_knows_when_every_instance_is_lost(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", config=ONE))
    for _ in range(10):
        gather(post(server, body(chaos.DIE)))
    assert server.get("/health/ready").status_code == 503
    health = server.get("/health").json()
    assert "instances are lost" in health["problems"]["m/1"]
    reply = gather(post(server, body(1)))[0]
    assert (reply.status, code(reply)) == (503, "not_ready")
    assert server.get("/health/live").status_code == 200
    assert server.metric("instances", model="m", state="lost") == 1


def test_several_instances_run_at_once_from_one_queue(
    serve: Serve, make_chaos: MakeChaos, gate: Path
) -> None:
    config = "[instances]\ncount = 4\n[batching]\nmax_rows = 1\n"
    server = serve(make_chaos("m", run_gate=str(gate), config=config))

    async def scenario() -> list[Reply]:
        async with held(server, gate, instances=4):
            tasks = [asyncio.create_task(post(server, body(number))) for number in range(16)]
            await until(server, "queue_rows", 16, model="m")
        return list(await asyncio.gather(*tasks))

    assert [outputs(reply) for reply in asyncio.run(scenario())] == [sums(number) for number in range(16)]


def test_a_configured_delay_gathers_a_batch_and_never_passes_a_deadline(
    serve: Serve, make_chaos: MakeChaos
) -> None:
    """The delay is longer than a test may take."""
    config = ONE + "[batching]\nmax_delay_ms = 600000\nmax_rows = 8\n"
    server = serve(make_chaos("m", row_ms=50, config=config))

    async def scenario() -> None:
        tasks = [asyncio.create_task(post(server, body(number))) for number in range(7)]
        await until(server, "queue_rows", 7, model="m")
        assert server.metric("batch_rows_count", model="m") == 0
        tasks.append(asyncio.create_task(post(server, body(7))))
        assert [outputs(reply) for reply in await asyncio.gather(*tasks)] == [sums(n) for n in range(8)]
        assert server.metric("batch_rows_count", model="m") == 1, "a full batch does not wait"
        # A full batch takes 400 ms and this one 50 ms, so that the instance may wake up 350 ms late.
        reply = await post(server, body(1), x_timeout_ms="3000")
        assert outputs(reply) == sums(1)

    asyncio.run(scenario())
