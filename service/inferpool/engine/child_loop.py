"""The supervisor's loop: it hears children, sees them end, keeps timers and answers signals."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import selectors
import signal
import socket
from collections.abc import Callable, Iterable
from typing import Final

from inferpool.engine.control import Message
from inferpool.engine.spawn import SUPERVISED, Child

log = logging.getLogger(__name__)

FLUSH_S: Final = 0.02
"""Pause until a message is sent again to a child whose socket is full."""


class ChildLoop:
    """Calls back when something happens. It never waits for a child. For one thread, the main thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_ids = itertools.count()
        self._signals: list[int] = []

    def after(self, seconds: float, then: Callable[[], None]) -> None:
        """Call `then` in so many seconds."""
        heapq.heappush(self._timers, (self._clock() + seconds, next(self._timer_ids), then))

    def watch(self, child: Child, hear: Callable[[Message], None], ended: Callable[[], None]) -> None:
        """Call `hear` with each message of a child, and `ended` once when it has ended, after the last one.

        The loop closes the descriptors of a message after `hear`.
        """

        def read() -> None:
            with contextlib.suppress(EOFError):
                while (message := child.control.receive()) is not None:
                    try:
                        hear(message)
                    except Exception:
                        # Nothing that a child says may end the server.
                        log.exception("a message of process %d: %s", child.pid, message.kind)
                    finally:
                        message.close()
                return
            self._selector.unregister(child.control)

        def end() -> None:
            with contextlib.suppress(KeyError):
                read()  # its last words
            self.unwatch(child)
            ended()

        self._selector.register(child.control, selectors.EVENT_READ, read)
        self._selector.register(child.pidfd, selectors.EVENT_READ, end)

    def unwatch(self, child: Child) -> None:
        """Call back for a child no more."""
        for fileobj in (child.control, child.pidfd):
            with contextlib.suppress(KeyError):
                self._selector.unregister(fileobj)

    def watch_signals(self, answer: Callable[[signal.Signals], None]) -> None:
        """Call `answer` for each signal that a supervised server answers."""
        reader, writer = socket.socketpair()
        for end in (reader, writer):
            end.setblocking(False)
        for number in SUPERVISED:
            if signal.getsignal(number) is not signal.SIG_IGN or number != signal.SIGHUP:
                signal.signal(number, lambda number, frame: self._signals.append(number))
        signal.set_wakeup_fd(writer.fileno())
        self._wakeup = (reader, writer)

        def read() -> None:
            with contextlib.suppress(BlockingIOError):
                reader.recv(4096)
            while self._signals:
                answer(signal.Signals(self._signals.pop(0)))

        self._selector.register(reader, selectors.EVENT_READ, read)
        # Signals have waited since the server listens.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SUPERVISED)

    def turn(self, children: Iterable[Child]) -> None:
        """Wait until something happens, and call back. Sends what waits to be sent to `children`."""
        timeout = max(0.0, self._timers[0][0] - self._clock()) if self._timers else None
        # A child that reads nothing keeps its messages waiting; all others go on.
        waiting = [child for child in children if not child.control.flush()]
        if waiting:
            timeout = FLUSH_S if timeout is None else min(timeout, FLUSH_S)
        for key, _ in self._selector.select(timeout):
            # An earlier callback may have closed the descriptor.
            if self._selector.get_map().get(key.fileobj) is key:
                key.data()
        now = self._clock()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()


def reap(child: Child) -> str:
    """Wait for a process that has ended; returns how it did."""
    status = child.process.wait()
    child.close()
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
