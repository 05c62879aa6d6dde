"""Accepts connections so that several processes with one listening socket get equal shares of them.

The kernel wakes all processes that wait for a connection, and the first one takes it. A process that accepts
all it can get then has most connections: with four processes up to 63 of 64, and with SO_REUSEPORT up to 27.
So each process accepts one connection at a time, and leaves it to the others for a moment if it has more than
one of them. Connections that wait belong to nobody: they survive the death of a process.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import mmap
import socket
from collections.abc import Callable
from typing import Any, Final

log = logging.getLogger(__name__)

LEAVE_S: Final = 0.001
"""How long a connection is left to a process that has one connection fewer."""
MOST_LEAVE_S: Final = 0.01
"""How long a connection is left to other processes at most. They may be busy, or stopped."""
PAUSE_S: Final = 1.0
"""Pause after the process has run out of descriptors or memory."""
_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class ConnectionCounts:
    """How many connections each process has, in memory that all share: 4 bytes a process.

    The supervisor sets the largest number for a process that does not accept, so that nobody waits for it.
    """

    def __init__(self, file: int, number: int, processes: int) -> None:
        """`number` from 0 is that of this process; `file` is the descriptor of the memory."""
        self._map = mmap.mmap(file, 4 * processes)
        self._counts = memoryview(self._map).cast("I")
        self._number = number

    def set(self, count: int) -> None:
        """Tell the others how many connections this process has."""
        self._counts[self._number] = count

    def lead(self) -> int:
        """How many connections this process has more than another one, apart from a few per cent."""
        count = self._counts[self._number]
        return max(0, count - min(self._counts) - (count >> 4))


class Acceptor:
    """Accepts the connections of a listening socket, in place of an `asyncio.Server`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listener: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        count: Callable[[], int],
        counts: ConnectionCounts,
    ) -> None:
        """Begin to accept. `count` tells how many connections there are in this process."""
        listener.setblocking(False)
        self._loop = loop
        self._listener = listener
        self._file = listener.fileno()
        self._make_protocol = make_protocol
        self._count = count
        self._counts = counts
        self._starting: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.update()
        loop.add_reader(self._file, self._ready)

    def close(self) -> None:
        """Accept no more; connections that wait are left to other processes."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._file)
            if self._timer is not None:
                self._timer.cancel()

    async def wait_closed(self) -> None:
        """Do nothing: `close` does not wait for anything."""

    def update(self) -> None:
        """Tell the other processes how many connections there are here."""
        self._counts.set(self._count() + len(self._starting))

    def _ready(self) -> None:
        self.update()
        if lead := self._counts.lead():
            self._leave(min(MOST_LEAVE_S, LEAVE_S * lead))
        else:
            self._accept()

    def _leave(self, seconds: float) -> None:
        """Leave connections to other processes for `seconds`; then take one that still waits."""
        self._loop.remove_reader(self._file)
        self._timer = self._loop.call_later(seconds, self._return)

    def _return(self) -> None:
        self._loop.add_reader(self._file, self._ready)
        self._accept()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # another process was faster, or the client is gone
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            log.error("no connection can be accepted for %g s: %s", PAUSE_S, error.strerror)
            self._leave(PAUSE_S)
            return
        connection.setblocking(False)
        starting = self._loop.create_task(self._start(connection))
        self._starting.add(starting)
        starting.add_done_callback(self._starting.discard)
        self.update()

    async def _start(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, connection)
        except OSError:
            connection.close()  # the client is gone
