"""The laws of batching through the real server, with the backend that misbehaves on demand.

A request with a row marked `WAIT` holds an instance until its gate opens. Requests that are sent meanwhile
wait together.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.chaos import inferpool_chaos as chaos
from tests.clients import Client, Reply, with_clients
from tests.conftest import MakeChaos, Serve, chaos_in
from tests.server import POLL_S, Server

ONE = "[instances]\ncount = 1\n"
ONE_ROW = ONE + "[batching]\nmax_rows = 1\n"

MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "mixing": ("", {"mix": True}),
    "fixed": ("", {"first": 2}),
    "late": (ONE_ROW, {"run_ms": 50}),
    "full": (ONE_ROW + "[queue]\nmax_rows = 4\n", {"run_ms": 100}),
    "heavy": (ONE_ROW + "[queue]\nmax_bytes = 40\n", {}),
    "urgent": (ONE_ROW, {"run_ms": 10}),
    "deserted": (ONE_ROW, {}),
    "poisoned": (ONE + "[batching]\nmax_rows = 64\n", {}),
    "split": ("[batching]\nmax_rows = 8\n", {}),
    "sliced": (ONE + "[batching]\nmax_rows = 32\n", {"row_ms": 1}),
    "mortal": (ONE, {}),
    "four": ("[instances]\ncount = 4\n[batching]\nmax_rows = 1\n", {}),
    "delayed": (ONE + "[batching]\nmax_delay_ms = 600000\nmax_rows = 8\n", {"row_ms": 50}),
}
"""The models of the server that most tests share, each for one test: its `model.toml`, and what it does."""


def body(*marks: float, **rest: object) -> bytes:
    """A request with a row for each mark."""
    return json.dumps({"inputs": [[mark, 0, 0, 0] for mark in marks], **rest}).encode()


def sums(*marks: float) -> list[float]:
    """The right answer to this request."""
    rows = np.zeros((len(marks), 4))
    rows[:, 0] = marks
    answer: list[float] = chaos.expected(rows).tolist()
    return answer


class Model(NamedTuple):
    """A model of a server, and the named pipe at which its marked runs wait."""

    server: Server
    name: str
    gate: Path

    async def post(self, content: bytes, **headers: str) -> Reply:
        """One request on a connection of its own."""
        client = await Client.connect(self.server.port)
        try:
            return await client.post(
                f"/predict/{self.name}", content, {name.replace("_", "-"): of for name, of in headers.items()}
            )
        finally:
            await client.close()

    def post_all(self, *contents: bytes) -> list[Reply]:
        """Run requests at the same time."""

        async def run() -> list[Reply]:
            return list(await asyncio.gather(*map(self.post, contents)))

        return asyncio.run(run())

    def view(self) -> dict[str, Any]:
        """What the server tells of version 1."""
        found: dict[str, Any] = self.server.get(f"/models/{self.name}/1").json()
        return found

    def metric(self, name: str, **labels: str) -> float:
        """A metric of this model."""
        return self.server.metric(name, model=self.name, **labels)

    async def until(self, name: str, at_least: float, **labels: Any) -> None:
        """Wait until a metric of this model has reached a value."""
        await asyncio.to_thread(
            self.server.wait_for_metric, name, at_least=at_least, model=self.name, **labels
        )

    async def until_in_flight(self, count: int) -> None:
        """Wait until the server has so many requests, of this model alone."""
        await asyncio.to_thread(self.server.wait_for_metric, "in_flight_requests", at_least=count)

    @contextlib.asynccontextmanager
    async def held(self, instances: int = 1) -> AsyncIterator[None]:
        """Hold so many instances while the block runs. Then the gate opens, and their answers are checked."""
        waiting = [asyncio.create_task(self.post(body(chaos.WAIT))) for _ in range(instances)]
        await self.until_in_flight(instances)
        await asyncio.to_thread(self.server.wait_for_metric, "queue_rows", at_most=0, model=self.name)
        yield
        while not all(task.done() for task in waiting):
            # A run that comes to the gate later than it opens needs it to be opened again.
            with contextlib.suppress(OSError):  # no run has come to the gate yet
                os.close(os.open(self.gate, os.O_WRONLY | os.O_NONBLOCK))
            await asyncio.sleep(POLL_S)
        for task in waiting:
            assert outputs(task.result()) == sums(chaos.WAIT)

    def while_held(self, *contents: bytes) -> list[Reply]:
        """Send requests that all wait together; returns their replies."""

        async def scenario() -> list[Reply]:
            async with self.held():
                tasks = [asyncio.create_task(self.post(content)) for content in contents]
                await self.until_in_flight(1 + len(contents))
                await self.until("queue_rows", len(contents))
            return list(await asyncio.gather(*tasks))

        return asyncio.run(scenario())


def code(reply: Reply) -> str:
    """The code of a problem."""
    found: str = json.loads(reply.body)["code"]
    return found


def outputs(reply: Reply) -> list[float]:
    """The sums of an answer."""
    assert reply.status == 200, reply
    found: list[float] = json.loads(reply.body)["outputs"]["sum"]
    return found


def make_gate(folder: Path) -> Path:
    """Make a named pipe: the `run_gate` of a model."""
    path = folder / "gate"
    os.mkfifo(path)
    return path


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return make_gate(tmp_path)


@pytest.fixture(scope="module")
def shared(
    module_serve: Serve, module_make_chaos: MakeChaos, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Model]:
    """The models of MODELS, in one server."""
    gates = {name: make_gate(tmp_path_factory.mktemp(name)) for name in MODELS}
    for name, (config, settings) in MODELS.items():
        repository = module_make_chaos(name, config, run_gate=str(gates[name]), **settings)
    server = module_serve(repository)
    return {name: Model(server, name, gate) for name, gate in gates.items()}


def test_a_model_that_mixes_rows_is_served_alone_and_right(shared: dict[str, Model]) -> None:
    model = shared["mixing"]
    batching = model.view()["batching"]
    assert batching["enabled"] is False
    assert "differs" in batching["reason"]
    replies = model.post_all(*(body(1, number) for number in range(32)))
    for number, reply in enumerate(replies):
        alone = np.array(sums(1, number))
        np.testing.assert_allclose(outputs(reply), alone - alone.mean())
    assert model.metric("batch_rows_sum") == model.metric("batch_rows_count")


def test_a_fixed_first_dimension_is_served_alone(shared: dict[str, Model]) -> None:
    model = shared["fixed"]
    assert "fixed at 2" in model.view()["batching"]["reason"]
    assert outputs(model.post_all(body(1, 2))[0]) == sums(1, 2)
    assert code(model.post_all(body(1))[0]) == "invalid_input"


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


def test_a_deadline_that_cannot_be_met_is_refused_at_once(shared: dict[str, Model]) -> None:
    model = shared["late"]

    async def scenario() -> tuple[list[Reply], Reply]:
        async with model.held():
            waiting = [asyncio.create_task(model.post(body(1))) for _ in range(20)]
            await model.until("queue_rows", 20)
            late = await model.post(body(2, parameters={"priority": 9}), x_timeout_ms="500")
        return list(await asyncio.gather(*waiting)), late

    replies, late = asyncio.run(scenario())
    assert all(reply.status == 200 for reply in replies)
    assert (late.status, code(late)) == (504, "deadline_exceeded")
    assert "the deadline would be missed: estimated" in json.loads(late.body)["detail"]
    assert model.metric("dropped_entries_total") == 0, "the request has never waited"


def test_a_deadline_that_passes_in_the_queue_is_answered_then_and_never_run(
    serve: Serve, make_chaos: MakeChaos, gate: Path
) -> None:
    # Nothing is measured, so that the refusal cannot be foreseen.
    server = serve(make_chaos("m", run_gate=str(gate), config=ONE), "--measure-ms", "0")
    model = Model(server, "m", gate)

    async def scenario(timeout_ms: int) -> Reply:
        async with model.held():
            return await model.post(body(2, parameters={"timeout_ms": timeout_ms}))

    runs = 0
    for timeout_ms in (2000, 8000, 32000):
        runs += 1
        late = asyncio.run(scenario(timeout_ms))
        assert (late.status, code(late)) == (504, "deadline_exceeded")
        if "estimated" not in json.loads(late.body)["detail"]:
            break  # else the run before has taken so long, on a busy machine, that it is expected to go on
    # Timers of the event loop count whole milliseconds.
    assert float(late.headers["server-timing"].rsplit("=", 1)[1]) >= timeout_ms - 1
    assert server.metric("dropped_entries_total", reason="deadline") == 1
    assert model.metric("batch_rows_sum") == runs


def test_a_full_queue_refuses_and_says_when_to_come_back(shared: dict[str, Model]) -> None:
    model = shared["full"]

    async def scenario() -> tuple[list[Reply], list[Reply]]:
        async with model.held():
            waiting = [asyncio.create_task(model.post(body(number))) for number in range(4)]
            await model.until("queue_rows", 4)
            refused = await asyncio.gather(*(model.post(body(9)) for _ in range(10)))
        return list(await asyncio.gather(*waiting)), list(refused)

    answered, refused = asyncio.run(scenario())
    assert [outputs(reply) for reply in answered] == [sums(number) for number in range(4)]
    for reply in refused:
        assert (reply.status, code(reply)) == (429, "queue_full")
        assert int(reply.headers["retry-after"]) >= 1
        # A row takes 100 ms, and much longer on a machine that is busy.
        assert 100 <= json.loads(reply.body)["retry_after_ms"] < 5000


def test_bytes_that_wait_are_bounded_too(shared: dict[str, Model]) -> None:
    model = shared["heavy"]

    async def scenario() -> tuple[list[Reply], Reply]:
        async with model.held():
            waiting = [asyncio.create_task(model.post(body(number))) for number in range(2)]
            await model.until("queue_rows", 2)
            refused = await model.post(body(3))
        return list(await asyncio.gather(*waiting)), refused

    answered, refused = asyncio.run(scenario())
    assert [reply.status for reply in answered] == [200, 200], "two rows of 16 bytes"
    assert (refused.status, code(refused)) == (429, "queue_full")
    assert "32 bytes wait and 40 may" in json.loads(refused.body)["detail"]


def test_urgent_requests_overtake_and_no_request_starves(shared: dict[str, Model]) -> None:
    model = shared["urgent"]

    async def scenario() -> list[int]:
        done: list[int] = []

        async def one(priority: int) -> None:
            reply = await model.post(body(1, parameters={"priority": priority}))
            assert reply.status == 200
            done.append(priority)

        async with model.held():
            tasks = [asyncio.create_task(one(9)) for _ in range(20)]
            await model.until("queue_rows", 20)
            tasks += [asyncio.create_task(one(1)) for _ in range(20)]
            await model.until("queue_rows", 40)
        await asyncio.gather(*tasks)
        return done

    order = asyncio.run(scenario())
    last_urgent = max(index for index, priority in enumerate(order) if priority == 1)
    lax = [index for index, priority in enumerate(order) if priority == 9]
    assert lax[-1] > last_urgent, "the urgent ones went first"
    assert sum(index < last_urgent for index in lax) >= 4, "one batch in four was led by the oldest entry"


def test_a_request_whose_client_has_gone_is_never_run(shared: dict[str, Model]) -> None:
    model = shared["deserted"]

    async def scenario() -> None:
        async with model.held():
            leavers = [await Client.connect(model.server.port) for _ in range(5)]
            for client in leavers:
                client.send(f"/predict/{model.name}", body(chaos.RAISE))
            await model.until("queue_rows", 5)
            for client in leavers:
                await client.close()
            await model.until("dropped_entries_total", 5, reason="disconnected")

    asyncio.run(scenario())
    assert model.metric("queue_rows") == 0
    assert model.metric("batch_rows_sum") == 1
    model.server.wait_for_metric("in_flight_requests", at_most=0)


def test_poison_fails_alone_among_its_batch(shared: dict[str, Model]) -> None:
    model = shared["poisoned"]
    marks = [chaos.RAISE if number % 16 == 7 else float(number) for number in range(64)]
    replies = model.while_held(*map(body, marks))
    for mark, reply in zip(marks, replies, strict=True):
        if mark == chaos.RAISE:
            assert (reply.status, code(reply)) == (500, "model_failed")
        else:
            assert outputs(reply) == sums(mark)
    assert model.metric("batch_rows_bucket", le="64.0") == 2, "the held row, and one batch"


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


class Doubted(NamedTuple):
    """Models whose batching is turned off while they serve, and the folder of their plans."""

    wrong: Model
    rare: Model
    cache_dir: Path

    def plans(self) -> set[Path]:
        """The plans in the server's cache."""
        return set(self.cache_dir.glob("*.json"))


@pytest.fixture(scope="module")
def doubted(module_serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Doubted:
    """A server with a cache of its own."""
    folder, cache_dir = tmp_path_factory.mktemp("doubted"), tmp_path_factory.mktemp("plans")
    make, gates = chaos_in(folder), {}
    for name, reads in (("wrong", True), ("rare", False)):
        gates[name] = make_gate(tmp_path_factory.mktemp(name))
        make(name, ONE, run_gate=str(gates[name]), **({} if reads else {"reads": False}))
    server = module_serve(folder, INFERPOOL_CACHE_DIR=str(cache_dir))
    wrong, rare = (Model(server, name, gate) for name, gate in gates.items())
    return Doubted(wrong, rare, cache_dir)


def test_wrong_rows_turn_batching_off_and_every_answer_is_right(doubted: Doubted) -> None:
    model, plans = doubted.wrong, doubted.plans()
    marks = [chaos.WRONG_ROWS, *map(float, range(7))]
    replies = model.while_held(*map(body, marks))
    assert [outputs(reply) for reply in replies] == [sums(mark) for mark in marks]
    batching = model.view()["batching"]
    assert (batching["enabled"], batching["evidence"], batching["max_rows"]) == (False, None, 1)
    assert batching["reason"] == 'turned off while serving: output "sum" has shape [9] for 8 rows'
    assert model.metric("batching_stopped_total", reason="rows") == 1
    assert len(plans - doubted.plans()) == 1, "its plan is deleted"
    replies = model.post_all(*(body(number, 1) for number in range(20)))
    assert [outputs(reply) for reply in replies] == [sums(number, 1) for number in range(20)]


def test_a_model_that_mixes_rarely_is_found_out_while_it_serves(doubted: Doubted) -> None:
    """No made-up row makes this model mix, so that runs at load prove it; a batch of real rows refutes it."""
    model, plans = doubted.rare, doubted.plans()
    batching = model.view()["batching"]
    assert (batching["enabled"], batching["evidence"]) == (True, "runs")
    assert model.metric("batching_stopped_total") == 0
    marks = [chaos.MIX, *map(float, range(7))]
    replies = model.while_held(*map(body, marks))
    assert [outputs(reply)[0] - sums(mark)[0] for mark, reply in zip(marks, replies, strict=True)] == [7] * 8
    model.server.wait_for_metric("batching_stopped_total", at_least=1, model=model.name, reason="answer")
    batching = model.view()["batching"]
    assert batching["enabled"] is False
    assert batching["reason"].startswith('turned off while serving: output "sum" differs by ')
    assert batching["reason"].endswith(" in a batch of 8 rows")
    assert len(plans - doubted.plans()) == 1, "its plan is deleted"
    off = [line["message"] for line in model.server.log if "batching is off from here on" in line["message"]]
    assert any("rare/1" in message for message in off)
    replies = model.post_all(*(body(mark) for mark in marks * 4))
    assert [outputs(reply) for reply in replies] == [sums(mark) for mark in marks * 4]


def test_a_large_request_is_split_and_joined(shared: dict[str, Model]) -> None:
    model = shared["split"]
    marks = [float(number) for number in range(1000)]
    assert outputs(model.post_all(body(*marks))[0]) == sums(*marks)
    assert model.metric("batch_rows_bucket", le="8.0") == model.metric("batch_rows_count")


def test_small_requests_are_answered_between_the_slices_of_a_large_one(shared: dict[str, Model]) -> None:
    """The large request takes 3 s at least, its slices 16 ms each."""
    model = shared["sliced"]

    async def scenario() -> None:
        large = asyncio.create_task(model.post(body(*range(3000))))
        await model.until("queue_rows", 1000)

        async def small(client: Client, number: int) -> None:
            for _ in range(5):
                reply = await client.post(f"/predict/{model.name}", body(number))
                assert outputs(reply) == sums(number)

        await with_clients(model.server.port, 4, small)
        assert not large.done()
        assert outputs(await large) == sums(*range(3000))

    asyncio.run(scenario())


def test_an_instance_that_dies_is_replaced_and_its_batch_runs_again(shared: dict[str, Model]) -> None:
    model = shared["mortal"]
    marks = [chaos.DIE if number == 5 else float(number) for number in range(16)]
    replies = model.while_held(*map(body, marks))
    for mark, reply in zip(marks, replies, strict=True):
        if mark == chaos.DIE:
            assert (reply.status, code(reply)) == (500, "model_failed")
        else:
            assert outputs(reply) == sums(mark)
    assert model.server.get("/health/ready").status_code == 200
    assert model.view()["instances"] == [{"device": "cpu", "state": "ready"}]


def test_readiness_knows_when_every_instance_is_lost(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", config=ONE))
    for _ in range(10):
        server.post("/predict/m", content=body(chaos.DIE))
    assert server.get("/health/ready").status_code == 503
    health = server.get("/health").json()
    assert "instances are lost" in health["problems"]["m/1"]
    reply = server.post("/predict/m", content=body(1))
    assert (reply.status_code, reply.json()["code"]) == (503, "not_ready")
    assert server.get("/health/live").status_code == 200
    assert server.metric("instances", model="m", state="lost") == 1


def test_several_instances_run_at_once_from_one_queue(shared: dict[str, Model]) -> None:
    model = shared["four"]

    async def scenario() -> list[Reply]:
        async with model.held(instances=4):
            tasks = [asyncio.create_task(model.post(body(number))) for number in range(16)]
            await model.until("queue_rows", 16)
        return list(await asyncio.gather(*tasks))

    assert [outputs(reply) for reply in asyncio.run(scenario())] == [sums(number) for number in range(16)]


def test_a_configured_delay_gathers_a_batch_and_never_passes_a_deadline(shared: dict[str, Model]) -> None:
    """The delay is longer than a test may take."""
    model = shared["delayed"]

    async def scenario() -> None:
        tasks = [asyncio.create_task(model.post(body(number))) for number in range(7)]
        await model.until("queue_rows", 7)
        assert model.metric("batch_rows_count") == 0
        tasks.append(asyncio.create_task(model.post(body(7))))
        assert [outputs(reply) for reply in await asyncio.gather(*tasks)] == [sums(n) for n in range(8)]
        assert model.metric("batch_rows_count") == 1, "a full batch does not wait"
        # A full batch takes 400 ms and this one 50 ms, so that the instance may wake up 350 ms late.
        reply = await model.post(body(1), x_timeout_ms="3000")
        assert outputs(reply) == sums(1)

    asyncio.run(scenario())
