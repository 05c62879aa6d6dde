"""Measures the promises of the batching core: overload, neighbours, added latency, idling.

    python benchmarks/batching.py [--seconds S] [--rounds N]

Each figure is the median over the rounds. Clients in this process take it over loopback, from a real server
in a process of its own. The models are made here: plain matrix products with random weights.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.clients import Client, Reply, with_clients
from tests.server import Server

WIDTH = 64
ROW = json.dumps({"inputs": [[0.5] * WIDTH]}).encode()


def make_model(file: Path, hidden: int, layers: int) -> None:
    """Write a network of `layers` products of `hidden` × `hidden`, on rows of 64 floats, to `file`.

    The products share one matrix, which stays in a core's cache. The speed of a model that is read from
    memory depends on what else uses the memory, and a share of a rate that moves says nothing.
    """
    rng = np.random.default_rng(0)

    def weight(name: str, rows: int, columns: int) -> onnx.TensorProto:
        # He's scale (arXiv 1502.01852), so that the rows neither grow nor fade from layer to layer.
        values = rng.standard_normal((rows, columns)) * np.sqrt(2 / rows)
        return numpy_helper.from_array(values.astype(np.float32), name)

    weights = [weight("first", WIDTH, hidden), weight("shared", hidden, hidden), weight("last", hidden, 10)]
    nodes, last = [], "x"
    for number, name in enumerate(["first", *["shared"] * layers, "last"]):
        nodes.append(helper.make_node("MatMul", [last, name], [f"h{number}"]))
        nodes.append(helper.make_node("Relu", [f"h{number}"], [f"r{number}"]))
        last = f"r{number}"
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["n", 10])],
        weights,
    )
    file.parent.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), file)


def cpu_s(process: int) -> float:
    """Return the CPU seconds that all threads of a process have used."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class AnswerTimes:
    """The seconds that each answer took, by status; `in_window` counts good ones in time under overload."""

    times: dict[int, list[float]] = field(default_factory=dict)
    in_window: int = 0

    def add(self, reply: Reply, seconds: float) -> None:
        self.times.setdefault(reply.status, []).append(seconds)

    def count(self, status: int) -> int:
        return len(self.times.get(status, ()))

    @property
    def refusals(self) -> list[float]:
        return [time for status, times in self.times.items() if status != 200 for time in times]


async def closed_loop(port: int, clients: int, seconds: float) -> float:
    """Return the requests per second of clients that send the next request as soon as they are answered."""
    count = 0
    ends = time.perf_counter() + seconds

    async def work(client: Client, number: int) -> None:
        nonlocal count
        while time.perf_counter() < ends:
            reply = await client.post("/predict/slow", ROW)
            assert reply.status == 200, reply
            count += 1

    began = time.perf_counter()
    await with_clients(port, clients, work)
    return count / (time.perf_counter() - began)


async def open_loop(
    port: int, rate: float, seconds: float, headers: dict[str, str], patience_s: float
) -> AnswerTimes:
    """Send requests at `rate` per second, whether or not earlier ones have been answered.

    Good answers count for `in_window` if they come within `patience_s`, and while requests are still being
    sent. Later ones are not answered under overload.
    """
    answers = AnswerTimes()
    free: list[Client] = []
    tasks: set[asyncio.Task[None]] = set()

    async def one() -> None:
        client = free.pop() if free else await Client.connect(port)
        began = time.perf_counter()
        reply = await client.post("/predict/slow", ROW, headers)
        ended = time.perf_counter()
        answers.add(reply, ended - began)
        answers.in_window += reply.status == 200 and ended < closes and ended - began <= patience_s
        free.append(client)

    opens = time.perf_counter()
    closes = opens + seconds
    for number in range(int(rate * seconds)):
        due = opens + number / rate
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(one())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    for client in free:
        await client.close()
    return answers


def overload(repository: Path, seconds: float, rounds: int) -> None:
    """Send twice what the machine can run: how much is still answered, and how soon the rest is refused."""
    # The model has one core. The server and these clients share the other.
    (repository / "slow/model.toml").write_text(
        "[instances]\ncount = 1\nthreads = 1\n[batching]\nmax_rows = 4\n"
    )
    cases: tuple[tuple[str, dict[str, str], float], ...] = (
        ("refused by the queue's bound", {}, math.inf),
        ("refused by their deadline", {"x-timeout-ms": "300"}, 0.3),
    )
    for name, headers, patience_s in cases:
        shares, capacities, refusal_times, answer_times = [], [], [], []
        for _ in range(rounds):
            server = Server(repository, ("--queue-ms", "200"))
            server.wait_loaded()
            before = asyncio.run(closed_loop(server.port, 24, seconds))
            answers = asyncio.run(open_loop(server.port, 2 * before, seconds, headers, patience_s))
            # Measured before and after, because the machine's speed changes from second to second.
            capacities.append((before + asyncio.run(closed_loop(server.port, 24, seconds))) / 2)
            shares.append(answers.in_window / seconds / capacities[-1])
            refusal_times.append(statistics.median(answers.refusals))
            answer_times.append(statistics.median(answers.times[200]))
            server.kill()
        capacity = statistics.median(capacities)
        row(
            f"twice the capacity ({capacity:.0f}/s), {name}: goodput",
            f"{100 * statistics.median(shares):.1f} % of capacity", "at least 95 %",
        )  # fmt: skip
        row("… refusals, median", f"{1000 * statistics.median(refusal_times):.2f} ms", "under 2 ms")
        row("… answers, median", f"{1000 * statistics.median(answer_times):.0f} ms", "")


def neighbours(repository: Path, rounds: int) -> None:
    """Measure how a request of 10,000 rows, and a slow client, delay the small requests of four others."""
    (repository / "slow/model.toml").write_text("[instances]\ncount = 1\nthreads = 1\n")
    large = json.dumps({"inputs": [[0.5] * WIDTH] * 10_000}).encode()
    quiet, beside_large, beside_slow, largest = [], [], [], []
    for _ in range(rounds):
        server = Server(repository)
        server.wait_loaded()

        async def small(port: int = server.port) -> float:
            times: list[float] = []

            async def work(client: Client, number: int) -> None:
                for _ in range(25):
                    began = time.perf_counter()
                    reply = await client.post("/predict/slow", ROW)
                    times.append(time.perf_counter() - began)
                    assert reply.status == 200

            await with_clients(port, 4, work)
            return statistics.median(times)

        async def with_large(server: Server = server) -> float:
            port = server.port
            client = await Client.connect(port)
            under_way = asyncio.create_task(client.post("/predict/slow", large))
            await asyncio.to_thread(server.wait_for_metric, "queue_rows", at_least=1000, model="slow")
            median = await small(port)
            assert not under_way.done(), "the large request is to be there all the time"
            assert (await under_way).status == 200
            await client.close()
            return median

        async def with_slow(port: int = server.port) -> float:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /predict/slow HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")

            async def drip() -> None:
                while True:
                    writer.write(b" ")
                    await writer.drain()
                    await asyncio.sleep(0.01)

            dripping = asyncio.create_task(drip())
            median = await small(port)
            dripping.cancel()
            writer.transport.abort()
            return median

        quiet.append(asyncio.run(small()))
        beside_slow.append(asyncio.run(with_slow()))
        beside_large.append(asyncio.run(with_large()))
        latency = server.get("/models/slow/1").json()["latency"]
        largest.append(latency[-1]["compute_ms"] / 1000)
        server.kill()
    batch = statistics.median(largest)
    alone = statistics.median(quiet)
    row("four clients' small requests, median", f"{1000 * alone:.1f} ms", "")
    row(
        "… raised by a client that sends its body byte by byte",
        f"{1000 * (statistics.median(beside_slow) - alone):+.1f} ms",
        f"at most one largest batch, {1000 * batch:.1f} ms",
    )
    row(
        "… raised by a request of 10,000 rows",
        f"{1000 * (statistics.median(beside_large) - alone):+.1f} ms",
        f"at most one largest batch, {1000 * batch:.1f} ms",
    )


def ask_in_turn(port: int, count: int) -> list[float]:
    """Return the seconds of each of `count` requests, sent one after the other on one bare socket."""
    head = f"POST /predict/fast HTTP/1.1\r\nhost: x\r\ncontent-length: {len(ROW)}\r\n\r\n"
    request = head.encode() + ROW
    times = []
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            began = time.perf_counter()
            connection.sendall(request)
            answer = connection.recv(65536)
            while not answer.endswith(b"}"):
                answer += connection.recv(65536)
            times.append(time.perf_counter() - began)
            assert answer.startswith(b"HTTP/1.1 200"), answer
    return times[count // 4 :]


def added(repository: Path, rounds: int) -> None:
    """Measure how much longer one request at a time takes than a bare run of the session."""
    session = onnxruntime.InferenceSession(repository / "fast/1/model.onnx")
    rows = np.full((1, WIDTH), 0.5, np.float32)
    differences, medians = [], []
    for _ in range(rounds):
        server = Server(repository)
        server.wait_loaded()

        bare = []
        for _ in range(2000):
            began = time.perf_counter()
            session.run(None, {"x": rows})
            bare.append(time.perf_counter() - began)
        served = statistics.median(ask_in_turn(server.port, 2000))
        medians.append(served)
        differences.append(served - statistics.median(bare))
        server.kill()
    row("one request at a time, median", f"{1000 * statistics.median(medians):.3f} ms", "")
    row(
        "… beyond a bare session.run",
        f"{1000 * statistics.median(differences):.3f} ms",
        "at most 0.35 ms",
    )


def idle(repository: Path, seconds: float) -> None:
    """Measure the CPU of a server with loaded models and no requests."""
    server = Server(repository)
    server.wait_loaded()
    server.post("/predict/fast", content=ROW)
    before = cpu_s(server.process.pid)
    time.sleep(seconds)
    share = (cpu_s(server.process.pid) - before) / seconds
    server.kill()
    row(f"an idle server, over {seconds:.0f} s", f"{100 * share:.2f} % of a core", "under 0.5 %")


def row(what: str, measured: str, wanted: str) -> None:
    """Print a line of the table."""
    print(f"| {what} | {measured} | {wanted} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each load")
    parser.add_argument("--rounds", type=int, default=5, help="servers started for each figure")
    parser.add_argument("--only", choices=("overload", "neighbours", "added", "idle"), help="one part")
    arguments = parser.parse_args()
    print("| what | measured | wanted |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder)
        os.environ["INFERPOOL_CACHE_DIR"] = str(repository / ".cache")
        make_model(repository / "slow/1/model.onnx", hidden=384, layers=512)
        make_model(repository / "fast/1/model.onnx", hidden=128, layers=1)
        parts: dict[str, Callable[[], None]] = {
            "added": lambda: added(repository, arguments.rounds),
            "idle": lambda: idle(repository, 4 * arguments.seconds),
            "neighbours": lambda: neighbours(repository, arguments.rounds),
            "overload": lambda: overload(repository, arguments.seconds, arguments.rounds),
        }
        for name, part in parts.items():
            if arguments.only in (None, name):
                part()


if __name__ == "__main__":
    main()
