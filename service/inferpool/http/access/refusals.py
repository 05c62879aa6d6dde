"""Counts the requests that the gate refuses, and logs them once a minute for each client."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Final

from inferpool.observe.metrics import Metrics, Value

log = logging.getLogger(__name__)

REASONS: Final = ("missing", "unknown", "expired", "ambiguous", "token", "scope")
"""Why the gate refuses a request: the values of the metric's label."""
EVERY_S: Final = 60.0
"""Seconds between two lines about one client."""
MOST_PEERS: Final = 256
"""Clients whose lines are told apart. All further clients share one line a minute."""

_OTHERS: Final = "other clients"


class Refusals:
    """The refused requests of one process; for its event loop alone."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        """Count in `metrics`; `clock` returns moments in seconds."""
        self._values: dict[str, Value] = {
            reason: metrics.value("refused_keys_total", reason) for reason in REASONS
        }
        self._clock = clock
        # Of each client: the moment of its last line, and the requests refused since. The oldest comes first.
        self._peers: dict[str, list[float]] = {}

    def count(self, reason: str, peer: str, key_id: str) -> None:
        """Count a refused request of the client `peer`; `key_id` is the key that lacks a scope, else ""."""
        self._values[reason].add()
        now = self._clock()
        seen = self._peers.get(peer)
        if seen is None:
            peer, seen = self._enter(peer, now)
        if now < seen[0] + EVERY_S:
            seen[1] += 1
            return
        which = f'the key "{key_id}" lacks the scope' if key_id else f"reason: {reason}"
        more = f"; {seen[1]:.0f} more since the last line" if seen[1] else ""
        self._peers.pop(peer)
        self._peers[peer] = [now, 0.0]
        log.warning("a request of %s was refused, %s%s", peer or "a local client", which, more)

    def _enter(self, peer: str, now: float) -> tuple[str, list[float]]:
        """Make room for a client; returns the name that it is logged by and its entry."""
        if len(self._peers) >= MOST_PEERS:
            oldest = next(iter(self._peers))
            if now < self._peers[oldest][0] + EVERY_S:
                peer = _OTHERS
                return peer, self._peers.setdefault(peer, [-math.inf, 0.0])
            del self._peers[oldest]
        entry = self._peers[peer] = [-math.inf, 0.0]
        return peer, entry
