"""Keeps the process that serves gRPC: starts it, and starts it again when it has ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from inferpool.engine.child_loop import reap
from inferpool.engine.control import Message
from inferpool.engine.spawn import Child, spawn

if TYPE_CHECKING:
    # The supervisor has no event loop, and starts sooner without asyncio.
    import asyncio

log = logging.getLogger(__name__)

MODULE: Final = "inferpool.grpc_process"
OOM_SCORE: Final = 500
"""As that of an engine. The process holds nothing that another one needs."""
FIRST_PAUSE_S: Final = 0.1
MOST_PAUSE_S: Final = 30.0
EARLY_S: Final = 5.0
"""A process that ends so soon after its start pauses longer before the next start."""
END_S: Final = 2.0
"""How long the process may take to end after its own drain timeout."""


class Watcher(Protocol):
    """What waits for children: the supervisor's `ChildLoop`, or `EventLoopWatcher`."""

    def after(self, seconds: float, then: Callable[[], None]) -> None:
        """Call `then` in so many seconds."""

    def watch(self, child: Child, hear: Callable[[Message], None], ended: Callable[[], None]) -> None:
        """Call `hear` with each message of a child, and `ended` once when it has ended."""


class EventLoopWatcher:
    """Waits for children by an event loop of asyncio."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def after(self, seconds: float, then: Callable[[], None]) -> None:
        """Call `then` in so many seconds."""
        self._loop.call_later(seconds, then)

    def watch(self, child: Child, hear: Callable[[Message], None], ended: Callable[[], None]) -> None:
        """Call `hear` with each message of a child, and `ended` once when it has ended."""

        def read() -> None:
            try:
                while (message := child.control.receive()) is not None:
                    hear(message)
                    message.close()
            except EOFError:
                self._loop.remove_reader(child.control.fileno())

        def end() -> None:
            read()
            self._loop.remove_reader(child.control.fileno())
            self._loop.remove_reader(child.pidfd)
            ended()

        self._loop.add_reader(child.control.fileno(), read)
        self._loop.add_reader(child.pidfd, end)


class GrpcKeeper:
    """Keeps the process from `start` until `drain`.

    Attributes:
        child: the process; None while there is none.
    """

    def __init__(
        self,
        watcher: Watcher,
        clock: Callable[[], float],
        settings: Mapping[str, Any],
        address: str,
        restarted: Callable[[], None],
        refused: Callable[[str], None],
        facts: Mapping[str, Any] = {},
        descriptors: Sequence[int] = (),
    ) -> None:
        """The process passes requests on to the Unix socket at `address`.

        `restarted` is called when it has ended and another one starts, `refused` with the reason if the first
        one cannot listen. `facts` and `descriptors` are for the process as well.
        """
        self.child: Child | None = None
        self._watcher = watcher
        self._clock = clock
        self._start_facts = {"settings": dict(settings), "address": address, **facts}
        self._descriptors = descriptors
        self._port: int = settings["grpc_port"]
        self._host: str = settings["host"]
        self._restarted = restarted
        self._refused = refused
        self._announced = False
        self._started = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._ended: Callable[[], None] | None = None

    def start(self) -> None:
        """Start the process."""
        if self._ended is not None:
            return
        self._started = self._clock()
        try:
            self.child = child = spawn(MODULE, OOM_SCORE)
        except OSError as error:
            log.error("the process of gRPC cannot be started: %s", error)
            self._start_later()
            return
        facts = {**self._start_facts, "port": self._port}
        child.control.send("start", facts, self._descriptors, wait=False)
        self._watcher.watch(child, self._hear, self._has_ended)

    def drain(self, settle_s: float, timeout_s: float, ended: Callable[[], None]) -> None:
        """Let the process answer its calls and end; `ended` is called when it has."""
        self._ended = ended
        if self.child is None:
            ended()
            return
        facts = {"settle_s": settle_s, "timeout_s": timeout_s}
        self.child.control.send("drain", facts, wait=False)
        self._watcher.after(settle_s + timeout_s + END_S, self.kill)

    def kill(self) -> None:
        """End the process at once."""
        if self.child is not None:
            self.child.kill()

    def _hear(self, message: Message) -> None:
        if message.kind == "listening":
            # A successor takes the same port, also if that was a free one.
            self._port = message.values["port"]
            if not self._announced:
                self._announced = True
                host = f"[{self._host}]" if ":" in self._host else self._host
                log.info("gRPC listens on %s:%d", host, self._port)
        elif message.kind == "refused":
            if self._announced:
                log.error("%s", message.values["reason"])
            else:
                self._refused(message.values["reason"])

    def _has_ended(self) -> None:
        assert self.child is not None
        how = reap(self.child)
        self.child = None
        if self._ended is not None:
            self._ended()
            return
        log.error("the process of gRPC %s; a new one starts", how)
        self._restarted()
        self._start_later()

    def _start_later(self) -> None:
        early = self._clock() - self._started < EARLY_S
        self._watcher.after(self._pause_s, self.start)
        self._pause_s = min(MOST_PAUSE_S, 2 * self._pause_s) if early else FIRST_PAUSE_S
