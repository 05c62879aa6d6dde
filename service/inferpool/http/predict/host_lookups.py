"""Asks for the addresses of hosts with a deadline, which `socket.getaddrinfo` lacks.

A lookup cannot be stopped, so it has a thread of its own, which its callers leave at their deadlines. Callers
that ask for the same host at once share one thread.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import Any, Final

MOST_LOOKUPS: Final = 16
"""Threads that look hosts up. More hosts wait until one of these ends."""


class _Lookup:
    __slots__ = ("answers", "ended", "error")

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.error: Exception | None = None
        self.ended = False


class HostLookups:
    """The lookups under way; safe to share between threads."""

    def __init__(self, most: int = MOST_LOOKUPS) -> None:
        """`most` lookups run at once."""
        self._most = most
        self._changed = threading.Condition()
        self._running: dict[tuple[str, int], _Lookup] = {}

    def find(self, host: str, port: int, until: float) -> list[Any]:
        """Return what `socket.getaddrinfo` returns for TCP, at the latest at `until` by `time.monotonic`.

        Raises TimeoutError if there is no answer until then, and what `socket.getaddrinfo` raises.
        """
        key = (host, port)
        with self._changed:
            while (lookup := self._running.get(key)) is None and len(self._running) >= self._most:
                self._wait(until)
            if lookup is None:
                lookup = self._running[key] = _Lookup()
                # A daemon, because the end of the process must not wait for it.
                thread = threading.Thread(target=self._look_up, args=(key, lookup), name="dns", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    del self._running[key]
                    raise OSError("there is no thread for the lookup") from error
            while not lookup.ended:
                self._wait(until)
        if lookup.error is not None:
            # A new one for each caller, because each adds its frames.
            raise type(lookup.error)(*lookup.error.args)
        return lookup.answers

    def _wait(self, until: float) -> None:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the host was not found in time")
        self._changed.wait(left)

    def _look_up(self, key: tuple[str, int], lookup: _Lookup) -> None:
        try:
            lookup.answers = socket.getaddrinfo(*key, type=socket.SOCK_STREAM)
        except Exception as error:  # noqa: BLE001 - the callers raise it
            lookup.error = error
        with self._changed:
            lookup.ended = True
            del self._running[key]
            self._changed.notify_all()
