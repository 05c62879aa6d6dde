"""Two tenants on one server: one keeps to its share, the other asks for ten times its own.

    python -m benchmarks.fairness models --model digits --body body.json [--serve="--engine process"]

starts a server, measures how many requests it answers at most, and then sends open loads: both tenants at
40 % of that, then one of them at 500 %, and then that one alone. It prints p50 and p99 of each tenant, and
what the server has answered in total.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import httpx
from inferpool.http.access.key_file import append_key, new_key

from benchmarks.percentiles import percentile


class Load(NamedTuple):
    """Requests of a tenant at random moments: `per_s` a second on average.

    A request waits for one of its `connections`, and that wait counts.
    """

    tenant: str
    key: str
    per_s: float
    connections: int = 64


class Outcome:
    """The answers that a tenant received, and their times.

    Attributes:
        statuses: how many answers of each status; 0 for requests that had no free connection in time.
        seconds: how long the answers with status 200 took.
        took_s: seconds until the last answer.
    """

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.seconds: list[float] = []
        self.took_s = 0.0


async def run_loads(
    port: int, body: bytes, loads: Sequence[Load], seconds: float, path: str = "/predict/m"
) -> dict[str, Outcome]:
    """Send all loads at once for so long; returns what each tenant got."""
    outcomes = {load.tenant: Outcome() for load in loads}
    await asyncio.gather(*(_run(port, path, body, load, seconds, outcomes[load.tenant]) for load in loads))
    return outcomes


async def _run(port: int, path: str, body: bytes, load: Load, seconds: float, outcome: Outcome) -> None:
    fields = f"Host: a\r\nAuthorization: Bearer {load.key}\r\nContent-Length: {len(body)}"
    head = f"POST {path} HTTP/1.1\r\n{fields}\r\n\r\n"
    request = head.encode() + body
    free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(load.connections)]
    for connection in opened:
        free.put_nowait(connection)
    choose = random.Random(load.tenant)
    began = due = time.monotonic()
    tasks: set[asyncio.Task[None]] = set()
    while time.monotonic() - began < seconds:
        due += choose.expovariate(load.per_s)
        pause = due - time.monotonic()
        if pause > 0:
            await asyncio.sleep(pause)
        if len(tasks) >= 4 * load.connections:
            outcome.statuses[0] += 1  # not sent: the tenant has no connection left
            await asyncio.sleep(0)
            continue
        task = asyncio.create_task(_ask(free, request, due, outcome))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    outcome.took_s = time.monotonic() - began
    for _, writer in opened:
        writer.close()


async def _ask(
    free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]],
    request: bytes,
    due: float,
    outcome: Outcome,
) -> None:
    reader, writer = connection = await free.get()
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r\n", 1)[0]))
    free.put_nowait(connection)
    status = int(head[9:12])
    outcome.statuses[status] += 1
    if status == 200:
        outcome.seconds.append(time.monotonic() - due)


def _report(name: str, outcomes: dict[str, Outcome]) -> None:
    total = sum(outcome.statuses[200] / outcome.took_s for outcome in outcomes.values())
    print(f"{name:<28} {total:8.0f} answers/s", end="")
    for tenant, outcome in outcomes.items():
        p50, p99 = (1000 * percentile(outcome.seconds, part) for part in (0.5, 0.99))
        refused = outcome.statuses[429]
        print(f"   {tenant}: p50 {p50:6.1f} ms, p99 {p99:6.1f} ms, {refused} refused", end="")
    print(flush=True)


def main() -> None:
    """Run the comparison, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("repository", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--body", type=Path, required=True, help="a file with the body of a request")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--serve", default="", help="more flags of inferpool serve, as one text")
    arguments = parser.parse_args()
    body, path, seconds = arguments.body.read_bytes(), f"/predict/{arguments.model}", arguments.seconds
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.toml"
        keys = {}
        for tenant in ("one", "two"):
            keys[tenant], record = new_key(tenant, ["predict"])
            append_key(file, record)
        command = [sys.executable, "-m", "inferpool", "serve", str(arguments.repository), "--port", "8199"]
        command += [
            "--keys-file",
            str(file),
            "--queue-ms",
            "1000",
            "--log-level",
            "error",
            *shlex.split(arguments.serve),
        ]
        server = subprocess.Popen(command)
        try:
            wait_ready(arguments.model)
            best = asyncio.run(run_loads(8199, body, [Load("one", keys["one"], 1e5)], 5.0, path))["one"]
            most = best.statuses[200] / best.took_s
            print(f"{arguments.model}: {most:.0f} answers/s at most")
            for name, parts in (
                ("both within their share", {"one": 0.4, "two": 0.4}),
                ("two asks for ten times", {"one": 0.4, "two": 5.0}),
                ("two alone, ten times", {"two": 5.0}),
            ):
                loads = [Load(tenant, keys[tenant], part * most) for tenant, part in parts.items()]
                _report(name, asyncio.run(run_loads(8199, body, loads, seconds, path)))
        finally:
            server.terminate()
            server.wait()


def wait_ready(model: str) -> None:
    """Wait until the server that was started can answer."""
    for _ in range(600):
        try:
            if httpx.get("http://127.0.0.1:8199/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"{model} is not ready after a minute")


if __name__ == "__main__":
    main()
