"""Measures one server under one workload: start, check, load, count, stop."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from inferpool import __version__

from benchmarks.peers.environments import CACHE, clean_environ
from benchmarks.peers.load import LoadError, Request, closed_loop, open_loop
from benchmarks.peers.peers import ADAPTERS, Peer
from benchmarks.peers.processes import Server, ServerError, free_port
from benchmarks.peers.workloads import ROOT, Sample, Workload, is_right, model_file, samples

ANSWER_S = 60
WARM_S = 1
CAPACITY_S = 4
"""Shortest time to find a capacity in seconds: some servers answer in bursts."""

LIMIT_S = 1.0
"""Seconds after which an answer under overload no longer counts."""

Record = dict[str, Any]


def measure(peer: Peer, python: Path, workload: Workload, seconds: float) -> list[Record]:
    """Return one record for each level of concurrency, or one record with a `problem`."""
    port = free_port()
    requests = [(sample, at_model(peer, workload, sample)) for sample in samples(workload)]
    typical = requests[len(requests) // 2]  # sentences come by length
    queue = workload.queue
    command = peer.command(
        python, model_file(workload), workload.kind, port, workload.rows, workload.workers, queue
    )
    # A short prefix, because the path of a socket may have at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="peer-", ignore_cleanup_errors=True) as folder:
        server = Server(command, environ(python), Path(folder))
        records: list[Record] = []
        try:
            server.wait(lambda: answers(port, *typical, ANSWER_S))
            check(port, requests)
            loads = overload if queue else closed_loops
            for record in loads(server, port, typical, workload, seconds):
                records.append(record)
                if not answers(port, *typical, ANSWER_S):
                    raise ServerError(f"no right answer after the load; {server.last_words()}")
            for record in records:
                record["pss_mib"] = server.pss_mib()
        except (ServerError, LoadError) as error:
            records.append({"problem": str(error)})
        finally:
            server.stop()
    return stamped(records)


def closed_loops(
    server: Server, port: int, asked: tuple[Sample, Request], workload: Workload, seconds: float
) -> Iterator[Record]:
    """Load at each level of concurrency."""
    closed_loop(port, asked[1], 16, WARM_S)
    for connections in workload.levels:
        before = server.cpu_s()
        record = closed_loop(port, asked[1], connections, seconds * workload.stretch)
        cpu_s = server.cpu_s() - before
        server.check()
        count = record["requests"] + record["refused"]
        yield {"level": connections, **record, "cpu_us": 1e6 * cpu_s / count if count else None}


def overload(
    server: Server, port: int, asked: tuple[Sample, Request], workload: Workload, seconds: float
) -> Iterator[Record]:
    """Find the capacity in a closed loop, then offer twice that rate in an open loop."""
    [connections] = workload.levels
    closed_loop(port, asked[1], connections, WARM_S)
    capacity = closed_loop(port, asked[1], connections, max(seconds, CAPACITY_S))["requests_per_s"]
    if not capacity:
        raise ServerError("answers nothing under load")
    record = open_loop(port, asked[1], 2 * capacity, seconds + 1, LIMIT_S)
    server.check()
    yield {"level": connections, "capacity_per_s": capacity, **record}


def in_process(workload: Workload, seconds: float, python: Path) -> list[Record]:
    """Return the best rows a second of the model without a server, in a process of its own."""
    cores = len(os.sched_getaffinity(0))
    words = ["--model", str(model_file(workload)), "--cores", str(cores), "--seconds", str(seconds)]
    command = [str(python), str(ADAPTERS / "in_process.py"), *words]
    run = subprocess.run(command, env=environ(python), capture_output=True, text=True, check=False)
    if run.returncode:
        return stamped([{"problem": run.stderr.strip()[-300:]}])
    found = json.loads(run.stdout)
    return stamped([{"level": 0, "requests_per_s": found.pop("rows_per_s"), **found}])


def at_model(peer: Peer, workload: Workload, sample: Sample) -> Request:
    """The peer's request for a sample of a workload."""
    request = peer.requests[workload.kind](sample)
    return request._replace(path=request.path.replace("{model}", workload.model))


def answers(port: int, sample: Sample, request: Request, timeout_s: float) -> bool:
    """Ask once; whether the answer came and is right."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("POST", request.path, request.body, dict(request.headers))
        reply = connection.getresponse()
        headers = {name.lower(): value for name, value in reply.getheaders()}
        return reply.status == 200 and is_right(sample, headers, reply.read())
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def check(port: int, requests: list[tuple[Sample, Request]]) -> None:
    """Ask for different samples at the same time, so that they share batches; raises ServerError."""
    with ThreadPoolExecutor(len(requests)) as pool:
        right = list(pool.map(lambda asked: answers(port, asked[0], asked[1], ANSWER_S), requests))
    if not all(right):
        raise ServerError(f"{right.count(False)} of {len(right)} concurrent answers are missing or wrong")


def environ(python: Path) -> dict[str, str]:
    """The variables of a server."""
    own = {
        "INFERPOOL_CACHE_DIR": str(CACHE / "measured"),
        "ORT_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }
    if python == Path(sys.executable):
        own["PYTHONPATH"] = str(ROOT)
    inherited = clean_environ(python)
    return {name: value for name, value in inherited.items() if not name.startswith("INFERPOOL_")} | own


def stamped(records: list[Record]) -> list[Record]:
    """Records with the time."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return [{"at": now, **record} for record in records]


def own_version() -> str:
    """Return Inferpool's version with a digest of its code, to tell figures of different code apart."""
    digest = hashlib.sha256()
    for file in sorted(file for end in ("py", "c") for file in (ROOT / "service").rglob(f"*.{end}")):
        digest.update(file.read_bytes())
    return f"{__version__} ({digest.hexdigest()[:8]})"
