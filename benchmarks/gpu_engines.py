"""Measures engines in processes of their own: several web processes on one card, and engines that end.

    python benchmarks/gpu_engines.py [--device cuda:0] [--seconds S] [--webs 1,2,4,8] [--out FOLDER]

For each number of web processes, clients send single rows to a small network, whose runs take less time than
the rest of a request. Then an engine is killed under load. At last a request asks a PyTorch model for a row
of a table that is not there: on a card, a kernel's assertion fails, and no later call of that process can
use the card. Every request of the clients has to be answered with 200 meanwhile, or this script fails.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each measurement")
    parser.add_argument("--webs", default="1,2,4,8", help="numbers of web processes; none: no rates")
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
        for name, end in (("killed", kill_engine), ("lost card", ask_beyond_table)):
            if name == "killed" or options.device != "cpu":
                report[name] = ended(repository, folder, end, options)
                save(report, options)


def save(report: dict[str, Any], options: argparse.Namespace) -> None:
    """Write what has been measured so far: a later step may fail."""
    file = options.out / f"gpu-engines-{options.device.replace(':', '')}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report), flush=True)


def make_models(repository: Path) -> None:
    """Write the small network, and a table in which a request can ask for a row that is not there."""
    import torch

    file = repository / "small" / "1" / "model.onnx"
    file.parent.mkdir(parents=True)
    small(file)

    (repository / "table" / "1").mkdir(parents=True)
    program = torch.jit.trace(torch.nn.Embedding(16, 4).eval(), torch.zeros(2, 3, dtype=torch.int64))
    program.save(str(repository / "table" / "1" / "model.pt"))
    (repository / "table" / "model.toml").write_text(
        '[[inputs]]\nname = "input"\ndatatype = "INT64"\nshape = [-1, 3]\n\n[gpu]\ngraphs = false\n'
    )


def start(repository: Path, folder: str, flags: list[str], device: str) -> Server:
    """A server that has loaded both models."""
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


def ended(
    repository: Path, folder: str, end: Callable[[Server], dict[str, Any]], options: argparse.Namespace
) -> dict[str, Any]:
    """The clients' figures while `end` ends an engine; raises RuntimeError if a request fails."""
    server = start(repository, folder, ["--engine", "process", "--web-processes", "2"], options.device)
    try:
        found: dict[str, Any] = {}
        faults: list[Exception] = []

        def clients() -> None:
            try:
                found.update(send(server, 10, options)._asdict())
            except Exception as error:  # noqa: BLE001 - raised again below
                faults.append(error)

        if server.get("/health/ready").status_code != 200:
            raise RuntimeError(f"not all models are ready: {server.get('/models').text}")
        before = server.metric("engine_restarts_total")
        thread = threading.Thread(target=clients)
        thread.start()
        wait_until(lambda: server.metric("requests_total", model="small", code="200") > 2000, "load")
        began = time.perf_counter()
        seen = end(server)
        wait_until(lambda: server.metric("engine_restarts_total") > before, "a restart")
        wait_until(lambda: server.get("/health/ready").status_code == 200, "ready again")
        seen["ready_again_s"] = time.perf_counter() - began
        thread.join()
        if faults:
            raise faults[0]
        return found | seen
    finally:
        server.kill()


def kill_engine(server: Server) -> dict[str, Any]:
    """Kill the engine."""
    os.kill(engine_of(server), signal.SIGKILL)
    return {}


def ask_beyond_table(server: Server) -> dict[str, Any]:
    """Ask for a row that is not there; returns the status of that answer."""
    answer = server.post("/predict/table", json={"inputs": [[1, 2, 1_000_000]]})
    return {"status": answer.status_code, "answer": answer.json()}


def engine_of(server: Server) -> int:
    """The process of the engine that has a model."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    named = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    return next(pid for pid, command in named.items() if b"inferpool.engine" in command)


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
    ends = [f"- {name}: {json.dumps(report[name])}" for name in ("killed", "lost card") if name in report]
    return "\n".join([*lines, *ends])


if __name__ == "__main__":
    main()
