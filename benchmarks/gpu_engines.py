"""Measures engines in processes of their own: several web processes on one card, and engines that end.

    python benchmarks/gpu_engines.py [--device cuda:0] [--seconds S] [--webs 1,2,4,8] [--out FOLDER]

For each number of web processes, clients send single rows to a small network, whose runs take less time than
the rest of a request. Then engines end under load, while other clients ask for the same network on the CPU,
whose engine must not end:
- `killed`: the engine of the device is killed;
- `one of two`: two engines have the device, and one after the other is killed; the server stays ready;
- `lost card`: a request asks a PyTorch model for a row of a table that is not there. On a card, a kernel's
  assertion fails, and no later call of that process can use the card.
Every request of the clients has to be answered with 200 meanwhile, or this script fails.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.gpu_load import Answered, load, request
from benchmarks.gpu_models import rows, small
from tests.server import Server, wait_until

ENDS = ("killed", "one of two", "lost card")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each measurement")
    parser.add_argument("--webs", default="1,2,4,8", help="numbers of web processes; none: no rates")
    parser.add_argument("--ends", default="", help="which ends of engines; all, if there are none")
    parser.add_argument("--processes", type=int, default=6, help="processes of clients")
    parser.add_argument("--connections", type=int, default=32, help="connections of each of them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    report: dict[str, Any] = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "models"
        make_models(repository)
        if options.webs:
            report["in-process"] = rate(repository, folder, ["--engine", "in-process"], options)
        for webs in filter(None, options.webs.split(",")):
            flags = ["--engine", "process", "--web-processes", webs]
            report[f"{webs} web"] = rate(repository, folder, flags, options)
            save(report, options)
        acts = (kill_engine, kill_each, ask_beyond_table)
        for name, end, engines in zip(ENDS, acts, (1, 2, 1), strict=True):
            if options.ends and name not in options.ends.split(","):
                continue
            if name != "lost card" or options.device != "cpu":
                report[name] = ended(repository, folder, end, engines, options)
                save(report, options)


def save(report: dict[str, Any], options: argparse.Namespace) -> None:
    """Write what has been measured so far: a later step may fail."""
    file = options.out / f"gpu-engines-{options.device.replace(':', '')}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report), flush=True)


def make_models(repository: Path) -> None:
    """Write the small network twice, and a table in which a request can ask for a row that is not there."""
    import torch

    for name in ("small", "on_cpu"):
        file = repository / name / "1" / "model.onnx"
        file.parent.mkdir(parents=True)
        small(file, single=name == "on_cpu")
    (repository / "on_cpu" / "model.toml").write_text('[instances]\ndevices = ["cpu"]\n')

    (repository / "table" / "1").mkdir(parents=True)
    program = torch.jit.trace(torch.nn.Embedding(16, 4).eval(), torch.zeros(2, 3, dtype=torch.int64))
    program.save(str(repository / "table" / "1" / "model.pt"))
    (repository / "table" / "model.toml").write_text(
        '[[inputs]]\nname = "input"\ndatatype = "INT64"\nshape = [-1, 3]\n\n[gpu]\ngraphs = false\n'
    )


def start(repository: Path, folder: str, flags: list[str], device: str) -> Server:
    """A server that has loaded all models."""
    environ = {"INFERPOOL_CACHE_DIR": f"{folder}/cache"}
    server = Server(repository, ["--devices", device, "--trust", "--queue-ms", "60000", *flags], environ)
    server.wait_for(r"\d+ models$", 120)
    return server


def rate(repository: Path, folder: str, flags: list[str], options: argparse.Namespace) -> dict[str, float]:
    """The rate of single rows, and the web processes' share of their cores."""
    server = start(repository, folder, flags, options.device)
    try:
        before = server.metric("web_busy_seconds_total"), server.metric("instance_busy_seconds_total")
        answered = send(server, options.seconds, options)
        busy_s = options.seconds * 1.25
        web_s = server.metric("web_busy_seconds_total") - before[0]
        ran_s = server.metric("instance_busy_seconds_total") - before[1]
        alone = load(server.port, request("small", rows("small", 1)), 1, 1, options.seconds / 2)
        return answered._asdict() | {
            "web_share": web_s / busy_s,
            "web_us_request": 1e6 * web_s / (answered.requests_s * busy_s),
            "instances_share": ran_s / server.metric("instances", state="ready") / busy_s,
            "alone_median_ms": alone.median_ms,
        }
    finally:
        server.kill()


def send(server: Server, seconds: float, options: argparse.Namespace) -> Answered:
    sent = request("small", rows("small", 1))
    return load(server.port, sent, options.processes, options.connections, seconds)


class CpuClient(threading.Thread):
    """Asks the network on the CPU for one row after the other, until `stop`."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.answered = 0
        self.wrong: list[str] = []
        self._server = server
        self._ends = threading.Event()

    def run(self) -> None:
        """Ask."""
        body = {"inputs": [[0.5] * rows("small", 1).shape[1]]}
        while not self._ends.is_set():
            answer = self._server.post("/predict/on_cpu", json=body)
            if answer.status_code == 200:
                self.answered += 1
            else:
                self.wrong.append(answer.text)

    def stop(self) -> int:
        """How many requests were answered; raises RuntimeError if one was not."""
        self._ends.set()
        self.join()
        if self.wrong:
            raise RuntimeError(f"{len(self.wrong)} requests on the CPU failed: {self.wrong[0]}")
        return self.answered


def ended(
    repository: Path,
    folder: str,
    end: Callable[[Server], dict[str, Any]],
    engines: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The clients' figures while `end` ends engines; raises RuntimeError if a request fails."""
    flags = ["--engine", "process", "--web-processes", "2", "--engines-per-device", str(engines)]
    server = start(repository, folder, flags, options.device)
    try:
        found: dict[str, Any] = {}
        faults: list[Exception] = []

        def clients() -> None:
            try:
                found.update(send(server, 10, options)._asdict())
            except Exception as error:  # noqa: BLE001 - raised again below
                faults.append(error)

        wait_until(lambda: len(engines_of(server, "small")) == engines, "all engines have loaded")
        if server.get("/health/ready").status_code != 200:
            raise RuntimeError(f"not all models are ready: {server.get('/models').text}")
        others = {} if options.device == "cpu" else engines_of(server, "on_cpu")
        before = server.metric("engine_restarts_total")
        on_cpu = CpuClient(server)
        on_cpu.start()
        thread = threading.Thread(target=clients)
        thread.start()
        wait_until(lambda: server.metric("requests_total", model="small", code="200") > 2000, "load")
        began = time.perf_counter()
        seen = end(server)
        wait_until(lambda: server.metric("engine_restarts_total") >= before + engines, "a restart")
        wait_until(lambda: server.get("/health").json()["status"] == "ok", "all engines again")
        seen["whole_again_s"] = time.perf_counter() - began
        thread.join()
        seen["answered_on_cpu"] = on_cpu.stop()
        if faults:
            raise faults[0]
        if others and engines_of(server, "on_cpu") != others:
            raise RuntimeError(
                f"the engines of the CPU were {others}, and are {engines_of(server, 'on_cpu')}"
            )
        return found | seen
    finally:
        server.kill()


def engines_of(server: Server, model: str) -> dict[str, int]:
    """The processes of a model's engines, by the names of the engines."""
    [version] = server.get(f"/models/{model}").json()["versions"]
    return {engine["name"]: engine["pid"] for engine in version["engines"]}


def kill_engine(server: Server) -> dict[str, Any]:
    """Kill the engine of the device."""
    for pid in engines_of(server, "small").values():
        os.kill(pid, signal.SIGKILL)
    return {}


def kill_each(server: Server) -> dict[str, Any]:
    """Kill one engine after the other; raises RuntimeError if the server is not ready meanwhile."""
    statuses: list[int] = []
    for name, pid in engines_of(server, "small").items():
        before = server.metric("engine_restarts_total", engine=name)
        os.kill(pid, signal.SIGKILL)
        while server.metric("engine_restarts_total", engine=name) == before:
            statuses.append(server.get("/health/ready").status_code)
        while server.get("/health").json()["status"] != "ok":
            statuses.append(server.get("/health/ready").status_code)
    if set(statuses) - {200}:
        raise RuntimeError(f"/health/ready said {set(statuses)}")
    return {"looks_at_readiness": len(statuses)}


def ask_beyond_table(server: Server) -> dict[str, Any]:
    """Ask for a row that is not there; returns the status of that answer."""
    answer = server.post("/predict/table", json={"inputs": [[1, 2, 1_000_000]]})
    return {"status": answer.status_code, "answer": answer.json()}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "| small network, single rows | requests/s | median ms | p99 ms | web cores | µs a request"
        " | instances busy | alone, median ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, each in report.items():
        if isinstance(each, dict) and "web_share" in each:
            lines.append(
                f"| {name} | {each['requests_s']:.0f} | {each['median_ms']:.2f} | {each['p99_ms']:.1f}"
                f" | {each['web_share']:.2f} | {each['web_us_request']:.0f} | {each['instances_share']:.0%}"
                f" | {each['alone_median_ms']:.3f} |"
            )
    ends = [f"- {name}: {json.dumps(report[name])}" for name in ENDS if name in report]
    return "\n".join([*lines, *ends])


if __name__ == "__main__":
    main()
