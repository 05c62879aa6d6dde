"""Ends processes of a server, one after the other, while clients send requests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

import numpy as np

from tests.clients import Client, Reply
from tests.engine.processes import ENGINE, WEB, find, lives
from tests.kills.census import client_ports
from tests.kills.load import PATIENCE_S, Load, problem
from tests.kills.workload import POISONED, Request, crash, divide, take_memory
from tests.limited import LimitedServer
from tests.server import Server, wait_until

SIGNALS: Final = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE)
MOST_POISON: Final = 2
"""Requests that poison one version; after a few more the version fails, as it should."""
MEMORY_BYTES: Final = 2 * 2**30
"""The memory of the server, in a cgroup."""
ROOM_BYTES: Final = 48 * 2**20
"""What is left of it, beside cached files, for a request that takes `HUNGER_MIB`."""
HUNGER_MIB: Final = 160


class Killer:
    """Ends processes; each kind of end has a name.

    A request that was running at two crashes is taken to be their cause. So requests that were under way
    when something was ended are answered before the next end.

    Attributes:
        ends: how often each kind of end has been tried.
        stopped_s: how long each stopped engine or web process lived on.
    """

    def __init__(self, server: Server, load: Load, seed: int) -> None:
        self.ends: Counter[str] = Counter()
        self.stopped_s: list[float] = []
        self._server = server
        self._load = load
        self._rng = np.random.default_rng((seed, 1))
        self._poison: Counter[int] = Counter()

    async def end_one(self, shares: Mapping[str, float]) -> None:
        """End something, of the kinds of `shares` by their shares, and wait until nobody waits for it."""
        kinds = [kind for kind in shares if self._is_possible(kind)]
        weights = np.array([shares[kind] for kind in kinds])
        kind = str(self._rng.choice(kinds, p=weights / weights.sum()))
        await self._ends[kind](self)
        self.ends[kind] += 1
        await self._load.settle()

    async def end_each(self, kinds: Sequence[str]) -> None:
        """End something of each of the kinds, in their order."""
        for kind in kinds:
            await self.end_one({kind: 1.0})

    def _is_possible(self, kind: str) -> bool:
        if kind == "engine without memory" and not isinstance(self._server, LimitedServer):
            return False
        return not kind.startswith("poison") or self._clean_model() is not None

    def _clean_model(self) -> int | None:
        return next((n for n in range(POISONED) if self._poison[n] < MOST_POISON), None)

    async def _engine(self) -> int:
        """The id of an engine; waits until there is one."""
        await _until(lambda: bool(find(self._server, ENGINE)), "there is an engine")
        return int(self._rng.choice(find(self._server, ENGINE)))

    async def _kill_engine(self) -> None:
        number = self._rng.choice(SIGNALS)
        _send(await self._engine(), number)
        self.ends[signal.Signals(number).name] += 1

    async def _kill_engine_and_its_successor(self) -> None:
        """The second one while it imports, loads or has just begun to answer; nothing has run there twice."""
        before = set(find(self._server, ENGINE))
        await self._kill_engine()
        await _until(lambda: bool(set(find(self._server, ENGINE)) - before), "there is another engine")
        await asyncio.sleep(0.5 * self._rng.random())
        for pid in set(find(self._server, ENGINE)) - before:
            _send(pid, signal.SIGKILL)

    async def _stop_engine(self) -> None:
        """The server must notice that the engine does nothing, and end it."""
        await self._stop(await self._engine())

    async def _stop(self, pid: int) -> None:
        _send(pid, signal.SIGSTOP)
        begun = time.monotonic()
        try:
            await _until(lambda: not lives(pid), "the stopped process is ended")
        except AssertionError as error:
            self._load.blame(str(error))
            _send(pid, signal.SIGCONT)
        else:
            self.stopped_s.append(time.monotonic() - begun)

    async def _kill_web(self) -> None:
        """The process is stopped first, so that it takes no connection after they have been looked up."""
        pids = find(self._server, WEB)
        if len(pids) < 2:
            return  # clients could reach nobody
        pid = int(self._rng.choice(pids))
        _send(pid, signal.SIGSTOP)
        self._load.doom(client_ports(pid))
        _send(pid, signal.SIGKILL)
        await _until(
            lambda: len(set(find(self._server, WEB)) - {pid}) == len(pids), "there is another web process"
        )

    async def _poison_by_fault(self) -> None:
        number = self._clean_model()
        assert number is not None
        self._poison[number] += 1
        await self._send_poison(crash(number))

    async def _take_memory(self) -> None:
        """A request takes all memory: the kernel ends its engine, or the engine refuses it before.

        After the kernel has ended an engine there is enough memory again, so that the request is answered.
        """
        assert isinstance(self._server, LimitedServer)
        kills = self._server.kills
        before = kills()
        request = take_memory(0, HUNGER_MIB)
        with self._server.squeezed(ROOM_BYTES):
            asked = asyncio.create_task(self._ask_once(request))
            await _until(lambda: kills() > before or asked.done(), "memory runs out")
        reply = await asked
        if reply is None:
            return
        if kills() == before and reply.status == 503 and "memory ran out" in problem(reply):
            self.ends["memory refused by the engine"] += 1
        elif kills() == before or reply.status != 200 or request.fault(reply):
            ended = kills() - before
            self._load.blame(f"want of memory, {ended} engines ended: {reply.status} {problem(reply)}")

    async def _poison_by_division(self) -> None:
        await self._send_poison(divide())

    async def _send_poison(self, request: Request) -> None:
        reply = await self._ask_once(request)
        if reply is not None and (reply.status != 500 or "model_crashed" not in problem(reply)):
            self._load.blame(f"poison for {request.path} got {reply.status} {problem(reply)}")

    async def _ask_once(self, request: Request) -> Reply | None:
        client = await Client.connect(self._server.port)
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await client.post(request.path, request.body, request.headers)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError) as error:
            self._load.blame(f"{request.path} got no answer: {type(error).__name__}")
            return None
        finally:
            await client.close()

    _ends: Final[Mapping[str, Callable[[Killer], Awaitable[None]]]] = {
        "engine": _kill_engine,
        "engine and its successor": _kill_engine_and_its_successor,
        "stopped engine": _stop_engine,
        "web process": _kill_web,
        "poison by fault": _poison_by_fault,
        "engine without memory": _take_memory,
        "poison by division": _poison_by_division,
    }


async def _until(condition: Callable[[], bool], what: str) -> None:
    await asyncio.to_thread(wait_until, condition, what, PATIENCE_S)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
