"""Connects web processes to engines: gives each pair a socket and shared memory, and tells of ends."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from inferpool.engine.arena import ARENA_PARTS, make_arena
from inferpool.engine.child_loop import ChildLoop
from inferpool.engine.supervised import SupervisedEngine, SupervisedWeb

log = logging.getLogger(__name__)

RETRY_S: Final = 1.0
"""Pause before the next try if the system has no memory or descriptor to give."""
LEAST_ARENA_BYTES: Final = 64 * 2**20
PAGE_BYTES: Final = 4096


class ProcessConnections:
    """The sockets between web processes and engines, and the arenas that they share."""

    def __init__(
        self,
        loop: ChildLoop,
        webs: Mapping[int, SupervisedWeb],
        engines: Mapping[str, SupervisedEngine],
        in_flight_bytes: int,
    ) -> None:
        """Connect nothing yet. `webs` and `engines` are those of the server at each moment."""
        self._loop = loop
        self._webs = webs
        self._engines = engines
        self._arena_bytes = arena_bytes(in_flight_bytes)
        self._closed = False

    def connect_web(self, web: SupervisedWeb) -> None:
        """Connect a web process to all engines."""
        for engine in self._engines.values():
            self._connect(web, engine)

    def connect_engine(self, engine: SupervisedEngine) -> None:
        """Connect an engine to all web processes."""
        for web in self._webs.values():
            self._connect(web, engine)

    def close(self) -> None:
        """Connect nothing any more."""
        self._closed = True

    def web_ended(self, web: SupervisedWeb) -> None:
        """Free what a web process shared with engines, and tell them that it has ended."""
        for descriptor in web.arenas.values():
            os.close(descriptor)
        web.arenas.clear()
        for engine in self._engines.values():
            if web.number in engine.connected and engine.child is not None:
                engine.child.control.send("disconnect", {"web": web.number}, wait=False)
            engine.connected.discard(web.number)

    def engine_ended(self, engine: SupervisedEngine, *, blame: bool) -> None:
        """Tell the web processes of an engine that it has ended.

        With `blame`, a request that was running may have ended it. The engine is reaped, so it writes to no
        arena any more.
        """
        self._tell_down(engine, [self._webs[number] for number in engine.connected], blame=blame, gone=False)

    def forget_engine(self, engine: SupervisedEngine) -> None:
        """Let web processes answer what waits for an engine without a successor, and free its memory."""
        self._tell_down(engine, self._webs.values(), blame=True, gone=True)
        for web in self._webs.values():
            if (arena := web.arenas.pop(engine.name, None)) is not None:
                os.close(arena)

    def arenas(self) -> Iterator[int]:
        """The descriptors of all shared memory."""
        return (arena for web in self._webs.values() for arena in web.arenas.values())

    def _tell_down(
        self, engine: SupervisedEngine, webs: Iterable[SupervisedWeb], *, blame: bool, gone: bool
    ) -> None:
        facts = {"engine": engine.name, "epoch": engine.epoch, "up": False, "blame": blame, "gone": gone}
        for web in webs:
            if web.child is not None:
                web.child.control.send("engine", facts, wait=False)
        engine.connected.clear()

    def _connect(self, web: SupervisedWeb, engine: SupervisedEngine) -> None:
        """Give a web process and an engine a socket to each other, and their shared memory.

        An engine that takes over versions that have been ready is connected once they are ready again. Until
        then requests wait for it.
        """
        try:
            self._try_to_connect(web, engine)
        except OSError as error:
            log.error("web process %d and engine %s cannot be connected: %s", web.number, engine.name, error)
            self._loop.after(RETRY_S, lambda: self._connect(web, engine))

    def _try_to_connect(self, web: SupervisedWeb, engine: SupervisedEngine) -> None:
        if (
            web.child is None
            or self._closed
            or web.number in engine.connected
            or self._engines.get(engine.name) is not engine
        ):
            return
        takes_over = engine.epoch > 1 or engine.parent is not None
        if engine.child is None or (takes_over and not engine.answers):
            arena = self._arena(web, engine)
            web.child.control.send("expect", {"engine": engine.name}, [arena], wait=False)
            return
        arena = self._arena(web, engine)
        web_end, engine_end = socket.socketpair()
        with web_end, engine_end:
            for end in (web_end, engine_end):
                end.setblocking(False)
            facts = {"web": web.number, "engine": engine.name, "epoch": engine.epoch}
            engine.child.control.send("connect", facts, [engine_end.fileno(), arena], wait=False)
            web.child.control.send("engine", {**facts, "up": True}, [web_end.fileno(), arena], wait=False)
        engine.connected.add(web.number)

    def _arena(self, web: SupervisedWeb, engine: SupervisedEngine) -> int:
        """The descriptor of the memory that a web process shares with an engine and its successors."""
        arena = web.arenas.get(engine.name)
        if arena is None:
            arena = web.arenas[engine.name] = make_arena(self._arena_bytes)
        return arena


def arena_bytes(in_flight_bytes: int) -> int:
    """Size of the memory that a web process and an engine share.

    There is room for inputs in flight, for outputs, and for bodies that are announced and received slowly.
    Only pages that are used take memory, so there is room for what cannot be used because of gaps.
    """
    return max(LEAST_ARENA_BYTES, ARENA_PARTS * in_flight_bytes) // PAGE_BYTES * PAGE_BYTES
