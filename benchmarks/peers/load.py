"""Load: a closed loop by wrk, and an open loop that sends at a fixed rate without waiting for answers."""

from __future__ import annotations

import asyncio
import json
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httptools

SCRIPT = Path(__file__).with_name("wrk.lua")
PATIENCE_S = 30
"""Seconds after which an answer counts as lost, and after which a late wrk is killed."""

SETTLE_S = 1.0
"""Seconds at the start of an open loop that are not counted, because queues fill."""


class LoadError(Exception):
    """The load generator did not do its work."""


class Request(NamedTuple):
    """One request to repeat; always a POST."""

    path: str
    body: bytes
    headers: Mapping[str, str]


def need_wrk() -> str:
    """The command, and its version as Debian names it."""
    if shutil.which("wrk") is None:
        raise LoadError("wrk is missing; on Debian: apt-get install wrk")
    told = subprocess.run(["wrk", "-v"], capture_output=True, text=True, check=False).stdout
    return " ".join(told.split()[:2])


def closed_loop(port: int, request: Request, connections: int, seconds: float) -> dict[str, float]:
    """Run wrk with one thread: each connection sends the next request after each answer.

    Returns requests a second, latencies in ms, and how many were refused (not 2xx) or lost.
    """
    with tempfile.TemporaryDirectory() as folder:
        body, headers = Path(folder, "body"), Path(folder, "headers")
        body.write_bytes(request.body)
        headers.write_text("".join(f"{name}: {value}\n" for name, value in request.headers.items()))
        command = [
            "wrk", f"--connections={connections}", "--threads=1", f"--duration={max(1, round(seconds))}s",
            f"--timeout={PATIENCE_S}s", f"--script={SCRIPT}", f"http://127.0.0.1:{port}{request.path}",
            "--", str(body), str(headers),
        ]  # fmt: skip
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds + PATIENCE_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise LoadError(f"wrk did not end within {PATIENCE_S} s of its time") from error
    lines = [line.removeprefix("RESULT ") for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise LoadError(f"wrk: {(run.stderr or run.stdout).strip()[-300:]}")
    told = json.loads(lines[0])
    good = told["requests"] - told["refused"]
    return {
        "requests": good,
        "requests_per_s": good / (told["duration_us"] / 1e6),
        **{f"{name}_ms": told[f"{name}_us"] / 1000 for name in ("p50", "p90", "p99", "max")},
        "refused": told["refused"],
        "lost": told["lost"],
    }


@dataclass
class RequestStats:
    """The results of an open loop; times are seconds since its start."""

    good: list[tuple[float, float]] = field(default_factory=list)
    """For each answer with status 200: when it came, and how long it took."""
    refusals: list[float] = field(default_factory=list)
    """How long each other answer took."""
    delays: list[float] = field(default_factory=list)
    """How late each request was sent, which is the fault of the load generator."""
    lost: int = 0


def open_loop(
    port: int, request: Request, rate_per_s: float, seconds: float, limit_s: float
) -> dict[str, float]:
    """Send at a fixed rate; goodput is answers within `limit_s` of when their request was due.

    Counted are the answers that come after the first second, while the load lasts.
    """
    stats = asyncio.run(_open_loop(port, request, rate_per_s, seconds))
    counted = [took for at, took in stats.good if SETTLE_S <= at < seconds]
    in_time = [took for took in counted if took <= limit_s]
    median = statistics.median
    return {
        "offered_per_s": rate_per_s,
        "goodput_per_s": len(in_time) / (seconds - SETTLE_S),
        "late_per_s": (len(counted) - len(in_time)) / (seconds - SETTLE_S),
        "good_p50_ms": 1000 * median(in_time) if in_time else 0.0,
        "refused": len(stats.refusals),
        "refusal_p50_ms": 1000 * median(stats.refusals) if stats.refusals else 0.0,
        "lost": stats.lost,
        "sent_late_p99_ms": 1000 * sorted(stats.delays)[int(0.99 * len(stats.delays))],
    }


async def _open_loop(port: int, request: Request, rate_per_s: float, seconds: float) -> RequestStats:
    loop = asyncio.get_running_loop()
    stats = RequestStats()
    idle: list[Connection] = []
    all_tasks: set[asyncio.Task[None]] = set()
    fields = {"Host": "localhost", "Content-Length": str(len(request.body)), **request.headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    message = f"POST {request.path} HTTP/1.1\r\n{head}\r\n".encode() + request.body
    began = loop.time()

    async def one(due: float) -> None:
        stats.delays.append(loop.time() - due)
        connection: Connection | None = idle.pop() if idle else None
        try:
            async with asyncio.timeout(PATIENCE_S):
                if connection is None:
                    _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
                status = await connection.ask(message)
        except OSError:  # TimeoutError is one
            stats.lost += 1
            if connection is not None:
                connection.close()
            return
        took = loop.time() - due
        if status == 200:
            stats.good.append((loop.time() - began, took))
        else:
            stats.refusals.append(took)
        if connection.keeps:
            idle.append(connection)

    for number in range(int(rate_per_s * seconds)):
        due = began + number / rate_per_s
        # Sleeps even if it is late, so that answers are read.
        await asyncio.sleep(max(0.0, due - loop.time()))
        task = asyncio.create_task(one(due))
        all_tasks.add(task)
        task.add_done_callback(all_tasks.discard)
    await asyncio.gather(*all_tasks)
    for connection in idle:
        connection.close()
    return stats


class Connection(asyncio.Protocol):
    """A keep-alive connection: one request at a time, of whose answer only the status counts."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._parser: Any = None
        self._answer: asyncio.Future[int] | None = None
        self.keeps = True

    def ask(self, message: bytes) -> asyncio.Future[int]:
        """Send a request; the future is its answer's status, or ConnectionError."""
        self._answer = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        if self._transport.is_closing():
            self._answer.set_exception(ConnectionResetError())
        self._transport.write(message)
        return self._answer

    def close(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()

    def on_message_complete(self) -> None:
        self.keeps = self._parser.should_keep_alive()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(self._parser.get_status_code())
        if not self.keeps:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.keeps = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc if isinstance(exc, OSError) else ConnectionResetError())
