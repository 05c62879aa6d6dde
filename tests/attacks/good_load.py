"""Good requests at a steady rate, and looks at `/health/live`, from a process of their own.

    python -m tests.attacks.good_load PORT SECONDS

prints a `Quality` as JSON. Requests begin by the clock, whether earlier ones are answered or not, so that a
server that stands still is not asked less.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time
from pathlib import Path

from tests.clients import Client

MODELS = Path(__file__).parents[2] / "models"
RATE = 100
"""Good requests a second."""
LOOK_S = 0.05
"""Pause between two looks at `/health/live`."""
CONNECTIONS = 50
IDLE_S = 60.0
"""Longer idle connections are not used: the server closes them after 75 s, perhaps at this moment."""


@dataclasses.dataclass
class Quality:
    """The figures of good clients; times are in milliseconds."""

    requests: int
    failures: list[str]
    p50_ms: float
    p99_ms: float
    slowest_ms: float
    live_slowest_ms: float
    live_p99_ms: float
    late_p99_ms: float
    """How late the client itself began its requests."""


def good_requests() -> list[tuple[str, bytes]]:
    """Return small requests for the models that come with the project: one row each."""
    found = []
    for sample in (
        "digits/samples/held_out.json",
        "diabetes/samples/held_out.json",
        "forecast/samples/last.json",
    ):
        inputs = json.loads((MODELS / sample).read_text())["inputs"]
        body = json.dumps({"inputs": {name: rows[:1] for name, rows in inputs.items()}}).encode()
        found.append((f"/predict/{sample.partition('/')[0]}", body))
    return found


async def measure(port: int, seconds: float) -> Quality:
    """Send good requests to the server at `port` for so long."""
    requests = good_requests()
    idle: asyncio.LifoQueue[tuple[Client, float]] = asyncio.LifoQueue()
    for _ in range(CONNECTIONS):
        idle.put_nowait((await Client.connect(port), time.perf_counter()))
    took: list[float] = []
    live: list[float] = []
    late: list[float] = []
    failures: list[str] = []

    async def one(number: int) -> None:
        began = time.perf_counter()
        path, body = requests[number % len(requests)]
        try:
            client, since = await idle.get()
            if began - since > IDLE_S:
                await client.close()
                client = await Client.connect(port)
            reply = await asyncio.wait_for(client.post(path, body), 30)
            if reply.status != 200:
                failures.append(f"{path}: {reply.status} {reply.body[:200]!r}")
            idle.put_nowait((client, time.perf_counter()))
        except (OSError, EOFError, TimeoutError) as error:
            failures.append(f"{path}: {error!r}")
            idle.put_nowait((await Client.connect(port), time.perf_counter()))
        took.append(time.perf_counter() - began)

    async def look() -> None:
        while True:
            began = time.perf_counter()
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET /health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                answer = await asyncio.wait_for(reader.read(), 30)
                writer.close()
                if not answer.startswith(b"HTTP/1.1 200"):
                    failures.append(f"/health/live: {answer[:100]!r}")
            except (OSError, TimeoutError) as error:
                failures.append(f"/health/live: {error!r}")
            live.append(time.perf_counter() - began)
            await asyncio.sleep(LOOK_S)

    looking = asyncio.create_task(look())
    began = time.perf_counter()
    tasks = []
    for number in range(int(seconds * RATE)):
        due = began + number / RATE
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        late.append(time.perf_counter() - due)
        tasks.append(asyncio.create_task(one(number)))
    await asyncio.gather(*tasks)
    looking.cancel()
    took.sort()
    live.sort()
    late.sort()
    return Quality(
        requests=len(took),
        failures=failures,
        p50_ms=_share(took, 0.5),
        p99_ms=_share(took, 0.99),
        slowest_ms=_share(took, 1),
        live_slowest_ms=_share(live, 1),
        live_p99_ms=_share(live, 0.99),
        late_p99_ms=_share(late, 0.99),
    )


def _share(sorted_s: list[float], share: float) -> float:
    """Return the time, in milliseconds, below which this share of the times is."""
    return round(1000 * sorted_s[int(share * (len(sorted_s) - 1))], 1)


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(asyncio.run(measure(int(sys.argv[1]), float(sys.argv[2]))))))
