"""Measures p99 and CPU time of requests for one model while large ones are loaded, in interleaved rounds.

    python -m benchmarks.load_beside [--serve="--engine process"] [--rounds 5] [--seconds 10] [--one-by-one]

starts a server with a small model on all cores but the first. A client, a process on the first core, sends
requests at a fixed rate. In every second round new versions of a large model are loaded meanwhile. Their
weights differ, so that each is proved and measured anew, and their files are written before the round. It
prints the median of the rounds' p50, p95 and p99, those of each phase of the loads, and the CPU time of the
threads of usual priority, which serve. A time counts from the moment at which the request was due; with
`--one-by-one` from its sending, so that a stall counts once. Requests during which the hypervisor took a core
are left out. At the end stand the p50 and p99 of all rounds together, with a 95 % interval of their ratio.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import http.client
import json
import os
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

from benchmarks.percentiles import percentile, print_pooled

SIDE = 2048
CLASSES = 16
LAYER_BYTES = 4 * SIDE * SIDE
LOOK_S = 0.25
"""Pause between two questions for a job, each of which costs the server about 1 ms."""
MOST_LOADS = 8
"""Versions that are written before a round; when all are loaded, the round goes on without loads."""


class Round(NamedTuple):
    """A round: the moment and the time of each request, and what the server did meanwhile.

    Attributes:
        sent: how many requests were sent.
        times: the moment at which each request was due, and the seconds until its answer; without those
            during which the hypervisor kept a core from the machine.
        usual_s: CPU seconds of the threads of usual priority that live as long as the round.
        load_s: how long each load took.
        phases: the moments at which a phase of a load began, and its name; empty without loads.
    """

    sent: int
    times: list[tuple[float, float]]
    usual_s: float
    load_s: list[float]
    phases: list[tuple[float, str]]


def write_mlp(folder: Path, layers: int, side: int, seed: int) -> None:
    """Write a chain of matrix products with random weights."""
    random = np.random.default_rng(seed)
    nodes, weights, name = [], [], "x"
    for number in range(layers):
        last = number == layers - 1
        shape = (side, CLASSES if last else side)
        matrix = (random.standard_normal(shape, np.float32) / np.sqrt(side)).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{number}"))
        target = "y" if last else f"h{number}"
        nodes.append(helper.make_node("MatMul", [name, f"w{number}"], [target if last else f"{target}m"]))
        if not last:
            nodes.append(helper.make_node("Relu", [f"{target}m"], [target]))
        name = target
    graph = helper.make_graph(
        nodes, "mlp",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["rows", side])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["rows", CLASSES])], weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    folder.mkdir(parents=True)
    onnx.save(model, str(folder / "model.onnx"))


class Versions:
    """Versions of the large model, each of which has weights that no other has."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        """Write a pattern, of which each version is a changed copy, and no version yet."""
        self._served = folder / "models" / "large"
        self._served.mkdir()
        self._written = folder / "written"
        self._pattern = folder / "pattern" / "model.onnx"
        self._last = 0
        write_mlp(self._pattern.parent, max(2, megabytes * 10**6 // LAYER_BYTES), SIDE, 1)

    def publish(self, number: int) -> None:
        """Move a version to the models in place of all others; a load of a model loads all its versions."""
        for folder in self._served.iterdir():
            folder.rename(self._written / f"old-{folder.name}")
        (self._written / str(number)).rename(self._served / str(number))

    def write(self, count: int) -> list[int]:
        """Write new versions, in place of those before; returns their numbers."""
        shutil.rmtree(self._written, ignore_errors=True)
        size = self._pattern.stat().st_size
        numbers = list(range(self._last + 1, self._last + count + 1))
        for number in numbers:
            made = self._written / str(number)
            made.mkdir(parents=True)
            shutil.copyfile(self._pattern, made / "model.onnx")
            with (made / "model.onnx").open("r+b") as file:
                file.seek(size // 2)
                # In the middle of the weights: exponents stay small.
                file.write(np.full(64, number / 1000, np.float32).tobytes())
                file.flush()
                os.fsync(file.fileno())  # what is written later would be written during the round
        self._last += count
        return numbers


def threads_cpu(server: int) -> dict[int, float]:
    """CPU seconds of each thread of usual priority in the server's processes."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(entry.parent.name)] = int(_fields(entry)[1])
    processes = {server}
    for _ in range(4):
        processes |= {child for child, parent in parents.items() if parent in processes}
    usual = int(_fields(Path(f"/proc/{server}/stat"))[16])
    found: dict[int, float] = {}
    for process in processes:
        for entry in Path(f"/proc/{process}/task").glob("*/stat"):
            with contextlib.suppress(OSError):
                fields = _fields(entry)
                if int(fields[16]) <= usual:
                    ticks = int(fields[11]) + int(fields[12])
                    found[int(entry.parent.name)] = ticks / os.sysconf("SC_CLK_TCK")
    return found


def run_in_real_time(thread: int) -> None:
    """Let no other program of the machine delay a thread, or delay those that it starts as before.

    Source: sched(7), SCHED_RR and SCHED_RESET_ON_FORK.
    """
    with contextlib.suppress(ProcessLookupError):
        os.sched_setscheduler(thread, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))


def _fields(stat: Path) -> list[str]:
    return stat.read_text().rpartition(")")[2].split()


def ask(port: int, rate: float, seconds: float, one_by_one: bool) -> None:
    """Send `rate` requests a second; a time counts from the moment at which the request was due, or sent."""
    body = json.dumps({"inputs": [[0.5] * 256]}).encode()
    request = b"POST /predict/small HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    times: list[tuple[float, float]] = []
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        due = time.monotonic()
        ends = due + seconds
        stolen = [stolen_ticks()]
        while due < ends:
            due += 1 / rate
            time.sleep(max(0.0, due - time.monotonic()))
            since = time.monotonic() if one_by_one else due
            connection.sendall(request)
            reply = connection.recv(65_536)
            times.append((due, time.monotonic() - since))
            assert reply.startswith(b"HTTP/1.1 200"), reply
            stolen.append(stolen_ticks())
    # The kernel may count a tick a little later, in the next request.
    stolen.append(stolen[-1])
    kept = [time for number, time in enumerate(times) if stolen[number] == stolen[number + 2]]
    json.dump([len(times), kept], sys.stdout)


def stolen_ticks() -> int:
    """How long the hypervisor has kept this machine's cores from it until now. Source: proc_stat(5)."""
    with Path("/proc/stat").open(encoding="ascii") as file:
        return int(file.readline().split()[8])


class Admin:
    """Asks the server what is no prediction, over one connection."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer of a request, as JSON; raises RuntimeError if it is refused."""
        headers = {"Content-Type": "application/json"}
        self._connection.request(method, path, None if body is None else json.dumps(body), headers)
        reply = self._connection.getresponse()
        content = reply.read()
        if reply.status >= 300:
            raise RuntimeError(f"{path}: {reply.status} {content.decode()}")
        return json.loads(content) if content else None

    def await_ready(self, server: subprocess.Popen[bytes]) -> None:
        """Wait until the server is ready."""
        while True:
            if server.poll() is not None:
                raise RuntimeError(f"the server has ended with status {server.returncode}")
            with contextlib.suppress(OSError, http.client.HTTPException, RuntimeError):
                self.ask("GET", "/health/ready")
                return
            self._connection.close()
            time.sleep(0.1)


class Loads(threading.Thread):
    """Loads versions, one after another, until it is told to stop. It takes no core from the client."""

    def __init__(self, port: int, numbers: Sequence[int], publish: Callable[[int], None]) -> None:
        super().__init__()
        self._publish = publish
        self.phases: list[tuple[float, str]] = []
        self.took_s: list[float] = []
        self._admin = Admin(port)
        self._numbers = numbers
        self._over = threading.Event()

    def run(self) -> None:
        """Load the versions."""
        with contextlib.suppress(OSError, AttributeError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        for number in self._numbers:
            if self._over.is_set():
                break
            self._load(number)

    def _load(self, version: int) -> None:
        self._publish(version)
        began = time.monotonic()
        self.phases.append((began, "waiting"))
        job = self._admin.ask("POST", "/models/large/load", {"version": version})
        while job["state"] == "running":
            time.sleep(LOOK_S)
            asked = time.monotonic()
            job = self._admin.ask("GET", f"/jobs/{job['id']}")
            if job["state"] == "running":
                self.phases.append((asked, job["phase"] or "waiting"))
        if job["state"] != "done":
            raise RuntimeError(job["reason"])
        self.took_s.append(time.monotonic() - began)
        self.phases.append((time.monotonic(), "unload"))
        self._admin.ask("POST", "/v2/repository/models/large/unload")
        self.phases.append((time.monotonic(), "none"))

    def stop(self) -> None:
        """Begin no further load, and wait for the one under way."""
        self._over.set()
        self.join()


def run_round(
    server: int,
    port: int,
    options: argparse.Namespace,
    numbers: Sequence[int],
    publish: Callable[[int], None],
) -> Round:
    """Send requests for so long, and load the versions with these `numbers` meanwhile."""
    loads = Loads(port, numbers, publish)
    before = threads_cpu(server)
    client = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.load_beside", "--ask", str(port), "--rate", str(options.rate),
         "--seconds", str(options.seconds), *(["--one-by-one"] if options.one_by_one else [])],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    if options.real_time:
        run_in_real_time(client.pid)
    loads.start()
    try:
        said, _ = client.communicate()
        after = threads_cpu(server)
    finally:
        client.kill()
        loads.stop()
    usual_s = sum(after[thread] - before[thread] for thread in after.keys() & before.keys())
    sent, times = json.loads(said)
    return Round(sent, [(due, took) for due, took in times], usual_s, loads.took_s, loads.phases)


def share_cores(options: argparse.Namespace) -> tuple[set[int], set[int]]:
    """The cores of the client and of the server."""
    cores = sorted(os.sched_getaffinity(0))
    if options.one_core or len(cores) == 1:
        return set(cores), set(cores)
    return {cores[0]}, set(cores[1:])


def main() -> int:
    """Run the rounds and print what they give."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", default="--engine process", help="further flags of the server")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that runs the server")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--small-layers", type=int, default=4)
    parser.add_argument("--one-core", action="store_true", help="let the client share the server's cores")
    parser.add_argument(
        "--real-time",
        action="store_true",
        help="run the client and the threads that serve in"
        " real time, which other programs of the machine delay less; needs privileges",
    )
    parser.add_argument("--one-by-one", action="store_true", help="time requests from their sending")
    parser.add_argument("--ask", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask is not None:
        ask(options.ask, options.rate, options.seconds, options.one_by_one)
        return 0
    with tempfile.TemporaryDirectory() as name, started(options, Path(name)) as (process, port):
        server = process.pid
        Admin(port).await_ready(process)
        versions = Versions(Path(name), options.megabytes)
        run_round(server, port, argparse.Namespace(**{**vars(options), "seconds": 1.0}), (), versions.publish)
        if options.real_time:
            for thread in threads_cpu(server):
                run_in_real_time(thread)
        rounds: dict[bool, list[Round]] = {False: [], True: []}
        for _ in range(options.rounds):
            numbers = versions.write(MOST_LOADS)
            for is_beside in (False, True):
                rounds[is_beside].append(
                    run_round(server, port, options, numbers if is_beside else (), versions.publish)
                )
    for is_beside, found in rounds.items():
        show("beside loads" if is_beside else "alone", found)
    for part in (0.5, 0.95, 0.99):
        alone, beside = (statistics.median(percentiles(rounds[which], part)) for which in (False, True))
        print(f"p{100 * part:.0f}: {1000 * alone:.2f} ms alone, {1000 * beside:.2f} ms beside loads,"
              f" {100 * (beside / alone - 1):+.0f} %")  # fmt: skip
    print_pooled(*([[took for _, took in each.times] for each in rounds[which]] for which in (False, True)))
    return 0


@contextlib.contextmanager
def started(options: argparse.Namespace, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A server with the small model on its cores, and this process on those of the client."""
    write_mlp(folder / "models" / "small" / "1", options.small_layers, 256, 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        options.python, "-m", "inferpool", "serve", str(folder / "models"), "--port", str(port),
        "--admin-routes", "on", "--cache-dir", str(folder / "cache"), *shlex.split(options.serve),
    ]  # fmt: skip
    client_cores, server_cores = share_cores(options)
    os.sched_setaffinity(0, server_cores)
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
        os.sched_setaffinity(0, client_cores)
        try:
            yield process, port
        finally:
            process.terminate()


def percentiles(rounds: Sequence[Round], part: float) -> list[float]:
    """A percentile of each round."""
    return [percentile([took for _, took in each.times], part) for each in rounds]


def show(title: str, rounds: Sequence[Round]) -> None:
    """Print the percentiles of the rounds, and those of each phase of the loads."""
    sent, counted = sum(each.sent for each in rounds), sum(len(each.times) for each in rounds)
    usual_ms = 1000 * sum(each.usual_s for each in rounds) / sent
    print(
        f"{title}: CPU of serving threads {usual_ms:.3f} ms a request; {sent} requests,"
        f" of which {sent - counted} met stolen time and are left out"
    )
    for part in (0.5, 0.95, 0.99):
        shown = ", ".join(f"{1000 * each:.2f}" for each in percentiles(rounds, part))
        print(f"  p{100 * part:.0f} of each round in ms: {shown}")
    by_phase: dict[str, list[float]] = {}
    for each in rounds:
        for due, took in each.times:
            phase = each.phases[bisect.bisect(each.phases, (due, "~")) - 1][1] if each.phases else "all"
            by_phase.setdefault(phase, []).append(took)
    for phase, values in by_phase.items():
        print(
            f"  {phase:<14} {len(values):6d} requests  p50 {1000 * percentile(values, 0.5):8.2f} ms"
            f"  p99 {1000 * percentile(values, 0.99):8.2f} ms  longest {1000 * max(values):8.2f} ms"
        )
    load_s = [took for each in rounds for took in each.load_s]
    if load_s:
        print(f"  {len(load_s)} loads, {sum(load_s) / len(load_s):.1f} s each")


if __name__ == "__main__":
    sys.exit(main())
