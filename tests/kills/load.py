"""Clients that send known requests, check every row of every answer, and never let go of a fault."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from typing import Final

import numpy as np

from tests.clients import Client, Reply
from tests.kills.workload import Request, Workload
from tests.server import wait_until

PATIENCE_S: Final = 120.0
"""A request that has no answer by then has none."""
SHORT_SHARE: Final = 0.05
"""Share of the requests with a deadline that a reload may miss."""
LONG_SHARE: Final = 0.1
"""Share of the requests with a deadline that a reload meets."""
LONG_MS: Final = 90_000
HANG_UP_SHARE: Final = 0.02
"""Share of the requests of which the client leaves before the answer."""
_MOST_FAULTS: Final = 50


class Load:
    """Keep-alive clients, each with one request at a time.

    Attributes:
        answers: how many requests have been answered, by status; 504 only of those with a short deadline.
        rows: how many rows were compared.
        hung_up: how many requests were left by their clients.
        lost: how many requests had their connection closed because their web process was ended.
        latest_s: the longest time that a 504 came after its deadline.
        slowest_s: the longest time that a request took.
        faults: what should not have happened.
    """

    def __init__(self, port: int, workload: Workload, clients: int, seed: int) -> None:
        self.answers: Counter[int] = Counter()
        self.rows = 0
        self.hung_up = 0
        self.lost = 0
        self.latest_s = 0.0
        self.slowest_s = 0.0
        self.faults: list[str] = []
        self._port = port
        self._workload = workload
        self._clients = clients
        self._seed = seed
        self._ids = itertools.count(1)
        self._outstanding: dict[int, asyncio.Event] = {}
        self._doomed: set[int] = set()
        self._go = asyncio.Event()
        self._go.set()
        self._over = False
        self._tasks: list[asyncio.Task[None]] = []
        self.is_abandoned = False

    @property
    def requests(self) -> int:
        """How many requests have ended."""
        return self.answers.total() + self.hung_up + self.lost

    def start(self) -> None:
        """Begin to send."""
        self._tasks = [asyncio.create_task(self._run(number)) for number in range(self._clients)]

    async def settle(self) -> None:
        """Wait until every request that is under way now has ended."""
        for event in list(self._outstanding.values()):
            await event.wait()

    async def pause(self) -> None:
        """Send nothing more, and wait until every request has ended."""
        self._go.clear()
        await self.settle()

    def resume(self) -> None:
        """Send again."""
        self._go.set()

    async def reach(self, requests: int) -> None:
        """Wait until so many requests have ended."""
        await asyncio.to_thread(
            wait_until, lambda: self.requests >= requests or self._all_ended(), f"{requests} requests end"
        )

    def doom(self, ports: set[int]) -> None:
        """Take note that the connections from these ports will be closed, because their server is ended."""
        self._doomed |= ports

    def abandon(self) -> None:
        """Take note that the server is about to end: from now on a lost connection is no fault."""
        self.is_abandoned = True
        self._over = True

    async def finish(self) -> None:
        """Send nothing more; wait for what is under way, and for the ends of all connections."""
        self._over = True
        self._go.set()
        await asyncio.gather(*self._tasks)

    def blame(self, fault: str) -> None:
        """Take note of a fault."""
        if len(self.faults) < _MOST_FAULTS:
            self.faults.append(fault)

    def _all_ended(self) -> bool:
        return all(task.done() for task in self._tasks)

    async def _run(self, number: int) -> None:
        rng = np.random.default_rng((self._seed, number))
        client: Client | None = None
        while not self._over:
            await self._go.wait()
            try:
                if client is None:
                    client = await Client.connect(self._port)
                if not await self._ask(client, rng):
                    await client.close()
                    client = None
            except (asyncio.IncompleteReadError, ConnectionError):
                await self._lose(client)
                client = None
            except TimeoutError:
                self.blame(f"a request has no answer after {PATIENCE_S:g} s")
                return
        if client is not None and not self.is_abandoned:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    more = await client.finish()
                if more:
                    self.blame(f"{len(more)} bytes came after the last answer: {more[:80]!r}")
            except (asyncio.IncompleteReadError, ConnectionError):
                await self._lose(client)
                client = None
        if client is not None:
            await client.close()

    async def _lose(self, client: Client | None) -> None:
        if self.is_abandoned:
            self._over = True
        elif client is None:
            self.blame("the server refused a connection")
        elif client.port not in self._doomed:
            self.blame("a connection was closed, though its web process lives")
        else:
            self._doomed.discard(client.port)
            self.lost += 1
        if client is not None:
            await client.close()

    async def _ask(self, client: Client, rng: np.random.Generator) -> bool:
        """Send one request and check its answer; False if the connection is left."""
        request = self._workload.make(rng)
        number = next(self._ids)
        request_id = f"kills-{number}"
        headers = {**request.headers, "x-request-id": request_id}
        timeout_ms = 0
        drawn = rng.random()
        if drawn < SHORT_SHARE:
            timeout_ms = int(rng.integers(20, 500))
        elif drawn < SHORT_SHARE + LONG_SHARE:
            timeout_ms = LONG_MS
        if timeout_ms:
            headers["x-timeout-ms"] = str(timeout_ms)
        ended = self._outstanding[number] = asyncio.Event()
        try:
            if rng.random() < HANG_UP_SHARE:
                if rng.random() < 0.5:
                    client.send_part(
                        request.path, request.body, headers, int(len(request.body) * rng.random())
                    )
                else:
                    client.send(request.path, request.body, headers)
                await asyncio.sleep(0.02 * rng.random())
                self.hung_up += 1
                return False
            begun = time.monotonic()
            async with asyncio.timeout(PATIENCE_S):
                reply = await client.post(request.path, request.body, headers)
            took_s = time.monotonic() - begun
            self.slowest_s = max(self.slowest_s, took_s)
            self._check(request, request_id, reply, 0 if timeout_ms == LONG_MS else timeout_ms, took_s)
        finally:
            del self._outstanding[number]
            ended.set()
        return True

    def _check(self, request: Request, request_id: str, reply: Reply, timeout_ms: int, took_s: float) -> None:
        self.answers[reply.status] += 1
        found = reply.headers.get("x-request-id", "")
        if found != request_id:
            self.blame(f"{request.path}: the answer of {found} came to {request_id}")
        elif reply.status == 504 and timeout_ms:
            self.latest_s = max(self.latest_s, took_s - timeout_ms / 1000)
        elif reply.status != 200:
            if not (self.is_abandoned and reply.status == 503):
                self.blame(f"{request.path}: {reply.status} {problem(reply)} after {took_s:.2f} s")
        else:
            self.rows += len(next(iter(request.expected.values())))
            if fault := request.fault(reply):
                self.blame(f"{request.path}: {fault}")


def problem(reply: Reply) -> str:
    """The code and the text of a refusal."""
    try:
        body = json.loads(reply.body)
    except ValueError:
        return repr(reply.body[:200])
    return f"{body.get('code')}: {body.get('detail') or body.get('error')}"
