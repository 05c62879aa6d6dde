"""What has come on connections that send one small request after the other, read together.

The loop reads from one connection after the other, and takes and gives back the interpreter's lock for each.
Here one call reads from all that have something, while other threads run. That is for what is as simple as a
small request in one piece: where another request, or a part of one, stands behind the one that is answered,
and at its end, a connection is left to the loop again.
"""

from __future__ import annotations

import logging
import os
from typing import Any, Final

from inferpool.http.connection.connection import Connection
from inferpool.http.connection.exchange import try_cached_head

try:
    from select import EPOLLIN, epoll

    from inferpool.http.connection import _socketio
except ImportError:  # there was no compiler where the package was built, or the system has no epoll
    _socketio = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

MOST_MUSTERED_BYTES: Final = 8 * 1024
"""Connections whose requests are larger are left to the loop, and no more is read at a time."""
LEAST_IN_FLIGHT: Final = 4
"""With fewer requests at a time there is nothing to be gained."""
_LOOP_BYTES: Final = 256 * 1024
"""So much uvloop reads at a time."""
_ROOM_BYTES: Final = 64 * MOST_MUSTERED_BYTES
"""Where it is read to, from as many connections as the module takes in one call. The others are next."""


class ReadBatcher:
    """The connections of one loop that it reads for."""

    def __init__(self, least_in_flight: int = LEAST_IN_FLIGHT) -> None:
        """Connections join where so many requests are in flight; one alone, with less than half, leaves."""
        self._least_in_flight = least_in_flight
        self._links: dict[int, Connection] = {}
        self._room = bytearray(_ROOM_BYTES)
        self._poll: epoll | None = None
        # No type of its own: compiled code insists on those of results, and uvloop's are others.
        self._loop: Any = None

    def join(self, link: Connection, request_bytes: int) -> None:
        """Read for `link` from here on, whose last request was of so many bytes, if that is any use."""
        if (
            link.mustered
            or link.predictor.in_flight < self._least_in_flight
            or request_bytes > MOST_MUSTERED_BYTES
        ):
            return
        if link.descriptor < 0 or _socketio is None:
            return
        try:
            if self._poll is None:
                self._begin(link.loop)
            assert self._poll is not None
            self._poll.register(link.descriptor, EPOLLIN)
        except OSError:
            return  # there are no more descriptors, or the system watches as many as it may
        link.transport.pause_reading()
        self._links[link.descriptor] = link
        link.mustered = True

    def leave(self, link: Connection) -> None:
        """Leave it to the loop again to read for `link`, if it did not."""
        if not link.mustered or self._poll is None:
            return
        link.mustered = False
        del self._links[link.descriptor]
        self._poll.unregister(link.descriptor)
        link.resume_reading()

    def close(self) -> None:
        """Read for nobody any more."""
        for link in list(self._links.values()):
            self.leave(link)
        if self._poll is not None and self._loop is not None:
            self._loop.remove_reader(self._poll.fileno())
            self._poll.close()
            self._poll = self._loop = None

    def _begin(self, loop: Any) -> None:
        poll = epoll()
        try:
            loop.add_reader(poll.fileno(), self._read)
        except BaseException:
            poll.close()
            raise
        self._poll, self._loop = poll, loop

    def _read(self) -> None:
        if self._poll is None:
            return
        try:
            arrivals = _socketio.receive(self._poll.fileno(), self._room, MOST_MUSTERED_BYTES)
        except MemoryError:
            # What has been read is lost, and nobody knows whose it was.
            for whose in list(self._links.values()):
                whose.transport.abort()
            return
        now = self._loop.time()
        alone = len(arrivals) == 1
        for descriptor, data in arrivals:
            link = self._links.get(descriptor)
            if link is None:
                continue
            try:
                if data is None or link.transport.is_closing():
                    # The end, or what is wrong, the loop finds out for itself.
                    self.leave(link)
                    continue
                if alone and 2 * link.predictor.in_flight + 2 < self._least_in_flight:
                    self.leave(link)
                if not try_cached_head(link, data, now) and link.owner is not None:
                    link.owner.mustered(_with_rest(descriptor, data))
            except Exception:
                # Those behind it must not pay for it.
                log.exception("a request could not be read")
                link.transport.abort()


def _with_rest(descriptor: int, data: bytes) -> bytes:
    """`data`, and what else there is, as far as the loop would read it.

    A connection that is closed while something lies there unread is reset: its client may lose its answer.
    """
    if len(data) < MOST_MUSTERED_BYTES:
        return data
    try:
        return data + os.read(descriptor, _LOOP_BYTES)
    except OSError:  # there is nothing, or its end, which the loop finds out for itself
        return data
