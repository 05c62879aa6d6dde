"""The laws of batching through the real server, with the backend that misbehaves on demand."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence

import numpy as np

from tests.chaos import inferpool_chaos as chaos
from tests.clients import Client, Reply, with_clients
from tests.conftest import MakeChaos, Serve
from tests.server import Server

ONE = "[instances]\ncount = 1\n"


def body(*marks: float, **rest: object) -> bytes:
    """A request with a row for each mark."""
    return json.dumps({"inputs": [[mark, 0, 0, 0] for mark in marks], **rest}).encode()


def sums(*marks: float) -> list[float]:
    """What it answers."""
    rows = np.zeros((len(marks), 4))
    rows[:, 0] = marks
    return chaos.expected(rows).tolist()


async def post(server: Server, content: bytes, **headers: str) -> Reply:
    """One request on a connection of its own."""
    client = await Client.connect(server.port)
    try:
        return await client.post(
            "/predict/m", content, {name.replace("_", "-"): of for name, of in headers.items()}
        )
    finally:
        await client.close()


async def until(server: Server, name: str, at_least: float, **labels: str) -> None:
    """Wait until a metric has reached a value."""
    await asyncio.to_thread(server.wait_for_metric, name, at_least, **labels)


def gather(*work: object) -> list[Reply]:
    """Run requests at the same time."""

    async def run() -> list[Reply]:
        return list(await asyncio.gather(*work))

    return asyncio.run(run())


def code(reply: Reply) -> str:
    """The code of a problem."""
    return json.loads(reply.body)["code"]


def test_a_model_that_mixes_rows_is_served_alone_and_right(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", mix=True))
    batching = server.get("/models/m/1").json()["batching"]
    assert batching["enabled"] is False
    assert "differs" in batching["reason"]
    replies = gather(*(post(server, body(1, number)) for number in range(32)))
    for number, reply in enumerate(replies):
        alone = np.array(sums(1, number))
        np.testing.assert_allclose(json.loads(reply.body)["outputs"]["sum"], alone - alone.mean())
    assert server.metric("batch_rows_sum", model="m") == server.metric("batch_rows_count", model="m")


def test_a_fixed_first_dimension_is_served_alone(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", first=2))
    assert "fixed at 2" in server.get("/models/m/1").json()["batching"]["reason"]
    assert json.loads(gather(post(server, body(1, 2)))[0].body)["outputs"]["sum"] == sums(1, 2)
    assert code(gather(post(server, body(1)))[0]) == "invalid_input"


def test_what_was_measured_is_shown_kept_and_live(serve: Serve, make_chaos: MakeChaos) -> None:
    # As no other test has it, or its plan might be in the cache already.
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
    assert restarted["load_ms"] < first["load_ms"] / 2, "what was measured is kept between starts"


def test_a_deadline_that_cannot_be_met_is_refused_at_once(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", run_ms=50, config=ONE + "[batching]\nmax_rows = 1\n"))

    async def scenario() -> tuple[list[Reply], float, Reply]:
        waiting = [asyncio.create_task(post(server, body(1))) for _ in range(20)]
        await until(server, "queue_rows", 10, model="m")
        began = time.perf_counter()
        late = await post(server, body(2, parameters={"priority": 9}), x_timeout_ms="100")
        took = time.perf_counter() - began
        return list(await asyncio.gather(*waiting)), took, late

    replies, took, late = asyncio.run(scenario())
    assert all(reply.status == 200 for reply in replies)
    assert (late.status, code(late)) == (504, "deadline_exceeded")
    assert took < 0.05, "not after waiting"


def test_a_deadline_that_passes_in_the_queue_is_answered_then_and_never_run(
    serve: Serve, make_chaos: MakeChaos
) -> None:
    # Nothing is measured, so the refusal cannot be foreseen.
    server = serve(make_chaos("m", run_ms=600, config=ONE), "--measure-ms", "0")

    async def scenario() -> tuple[Reply, float, Reply]:
        running = asyncio.create_task(post(server, body(1)))
        await until(server, "in_flight_requests", 1)
        began = time.perf_counter()
        late = await post(server, body(2, parameters={"timeout_ms": 150}))
        took = time.perf_counter() - began
        return late, took, await running

    late, took, running = asyncio.run(scenario())
    assert (late.status, code(late)) == (504, "deadline_exceeded")
    assert 0.14 < took < 0.5
    assert running.status == 200
    assert server.metric("dropped_entries_total", reason="deadline") == 1
    assert server.metric("batch_rows_sum", model="m") == 1


def test_a_full_queue_refuses_and_says_when_to_come_back(serve: Serve, make_chaos: MakeChaos) -> None:
    config = ONE + "[batching]\nmax_rows = 1\n[queue]\nmax_rows = 4\n"
    server = serve(make_chaos("m", run_ms=100, config=config))
    replies = gather(*(post(server, body(number)) for number in range(30)))
    refused = [reply for reply in replies if reply.status == 429]
    assert len(refused) >= 20
    assert all(reply.status == 200 for reply in replies if reply not in refused)
    for reply in refused:
        assert code(reply) == "queue_full"
        assert int(reply.headers["retry-after"]) >= 1
        assert 50 < json.loads(reply.body)["retry_after_ms"] < 500
        assert float(reply.headers["server-timing"].rsplit("=", 1)[1]) < 50


def test_bytes_that_wait_are_bounded_too(serve: Serve, make_chaos: MakeChaos) -> None:
    config = ONE + "[batching]\nmax_rows = 1\n[queue]\nmax_bytes = 40\n"
    server = serve(make_chaos("m", run_ms=100, config=config))
    replies = gather(*(post(server, body(number)) for number in range(10)))
    assert {reply.status for reply in replies} == {200, 429}
    assert any("bytes" in json.loads(reply.body)["detail"] for reply in replies if reply.status == 429)


def test_urgent_requests_overtake_and_nobody_starves(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", run_ms=60, config=ONE + "[batching]\nmax_rows = 1\n"))

    async def scenario() -> Sequence[int]:
        done: list[int] = []

        async def one(priority: int) -> None:
            reply = await post(server, body(1, parameters={"priority": priority}))
            assert reply.status == 200
            done.append(priority)

        first = [asyncio.create_task(one(9)) for _ in range(20)]
        await until(server, "queue_rows", 10, model="m")
        await asyncio.gather(*first, *(one(1) for _ in range(20)))
        return done

    order = asyncio.run(scenario())
    last_urgent = max(place for place, priority in enumerate(order) if priority == 1)
    lax = [place for place, priority in enumerate(order) if priority == 9]
    assert lax[-1] > last_urgent, "the urgent went first"
    assert sum(place < last_urgent for place in lax) >= 4, "and one batch in four was led by the oldest"


def test_a_client_that_has_gone_is_never_run_for(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", run_ms=300, config=ONE + "[batching]\nmax_rows = 1\n"))

    async def scenario() -> Reply:
        stays = asyncio.create_task(post(server, body(1)))
        await until(server, "in_flight_requests", 1)
        leavers = [await Client.connect(server.port) for _ in range(5)]
        for client in leavers:
            client.send("/predict/m", body(chaos.RAISE))
        await until(server, "queue_rows", 5, model="m")
        for client in leavers:
            await client.close()
        await until(server, "dropped_entries_total", 5, reason="disconnected")
        return await stays

    assert asyncio.run(scenario()).status == 200
    assert server.metric("queue_rows", model="m") == 0
    assert server.metric("batch_rows_sum", model="m") == 1
    assert server.metric("in_flight_requests") == 0


def test_poison_fails_alone_among_its_batch(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", run_ms=30, config=ONE + "[batching]\nmax_rows = 64\n"))
    marks = [chaos.RAISE if number % 16 == 7 else float(number) for number in range(64)]
    replies = gather(*(post(server, body(mark)) for mark in marks))
    for mark, reply in zip(marks, replies, strict=True):
        if mark == chaos.RAISE:
            assert (reply.status, code(reply)) == (500, "model_failed")
        else:
            assert json.loads(reply.body)["outputs"]["sum"] == sums(mark)


def test_a_model_that_fails_again_and_again_is_not_logged_each_time(
    serve: Serve, make_chaos: MakeChaos
) -> None:
    server = serve(make_chaos("m", config=ONE))
    for number in range(20):
        headers = {"x-request-id": f"the-{number}th"}
        assert server.post("/predict/m", content=body(chaos.RAISE), headers=headers).status_code == 500
    # The log is read to its end when the server has ended.
    assert server.stop() == 0
    lines = [line for line in server.log if " failed on " in line["message"]]
    assert len(lines) == 1
    assert lines[0]["message"].endswith(
        "failed on request the-0th (as on 0 before, unsaid): a marked row among […, …, …, …], which cannot be"
    )
    assert "in run\n" in lines[0]["exception"]
    assert "\nValueError: a marked row" in lines[0]["exception"]


def test_wrong_rows_turn_batching_off_for_the_version(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", run_ms=30, config=ONE))
    replies = gather(*(post(server, body(chaos.WRONG_ROWS)) for _ in range(8)))
    assert {reply.status for reply in replies} <= {200, 500}
    assert any(reply.status == 500 for reply in replies)
    batching = server.get("/models/m/1").json()["batching"]
    assert batching["enabled"] is False
    assert "turned off while serving" in batching["reason"]
    replies = gather(*(post(server, body(number, 1)) for number in range(20)))
    for number, reply in enumerate(replies):
        assert json.loads(reply.body)["outputs"]["sum"] == sums(number, 1)


def test_a_large_request_is_split_and_rejoined(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", config="[batching]\nmax_rows = 16\n"))
    marks = [float(number) for number in range(1000)]
    assert json.loads(gather(post(server, body(*marks)))[0].body)["outputs"]["sum"] == sums(*marks)
    assert server.metric("batch_rows_bucket", model="m", le="16.0") == server.metric(
        "batch_rows_count", model="m"
    )


def test_a_large_request_costs_its_neighbours_one_batch_at_most(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", row_ms=1, config=ONE + "[batching]\nmax_rows = 32\n"))
    times: list[float] = []

    async def scenario() -> None:
        large = asyncio.create_task(post(server, body(*range(3000))))
        await until(server, "queue_rows", 1000, model="m")

        async def small(client: Client, number: int) -> None:
            for _ in range(10):
                began = time.perf_counter()
                reply = await client.post("/predict/m", body(number))
                times.append(time.perf_counter() - began)
                assert reply.status == 200

        await with_clients(server.port, 4, small)
        assert not large.done()
        assert json.loads((await large).body)["outputs"]["sum"] == sums(*range(3000))

    asyncio.run(scenario())
    assert sorted(times)[len(times) // 2] < 0.032 + 0.020, "one piece of 32 rows, its own batch, and noise"


def test_an_instance_that_dies_is_replaced_and_its_batch_runs_again(
    serve: Serve, make_chaos: MakeChaos
) -> None:
    server = serve(make_chaos("m", run_ms=30, config=ONE))
    marks = [chaos.DIE if number == 5 else float(number) for number in range(16)]
    replies = gather(*(post(server, body(mark)) for mark in marks))
    for mark, reply in zip(marks, replies, strict=True):
        if mark == chaos.DIE:
            assert (reply.status, code(reply)) == (500, "model_failed")
        else:
            assert json.loads(reply.body)["outputs"]["sum"] == sums(mark)
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


def test_several_instances_share_a_queue(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", run_ms=100, config="[instances]\ncount = 4\n[batching]\nmax_rows = 1\n"))

    async def scenario() -> tuple[list[Reply], float]:
        began = time.perf_counter()
        replies = await asyncio.gather(*(post(server, body(number)) for number in range(16)))
        return replies, time.perf_counter() - began

    replies, took = asyncio.run(scenario())
    assert [json.loads(reply.body)["outputs"]["sum"] for reply in replies] == [sums(n) for n in range(16)]
    assert took < 0.8, "sixteen runs of 100 ms by four"


def test_a_configured_delay_gathers_a_batch(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", config=ONE + "[batching]\nmax_delay_ms = 300\nmax_rows = 8\n"))

    async def scenario() -> None:
        began = time.perf_counter()
        replies = await asyncio.gather(*(post(server, body(number)) for number in range(8)))
        assert all(reply.status == 200 for reply in replies)
        assert time.perf_counter() - began < 0.25, "a full batch does not wait"
        began = time.perf_counter()
        await post(server, body(1))
        assert 0.29 < time.perf_counter() - began < 1
        began = time.perf_counter()
        reply = await post(server, body(1), x_timeout_ms="100")
        assert reply.status == 200, "a delay never passes a deadline"
        assert time.perf_counter() - began < 0.2

    asyncio.run(scenario())
    assert server.metric("batch_rows_count", model="m") == 3
