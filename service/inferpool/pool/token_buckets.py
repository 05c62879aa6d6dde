"""Token buckets: how many requests or rows a tenant may send a second.

Pure policy, without a clock. A bucket is one number: the moment at which it is full again. All web processes
keep it in the same memory, so that a rate holds for the server and not for each process. Two processes that
take at the very same moment may together take once too often; a lock would cost every request more.
"""

from __future__ import annotations

from typing import Final

BURST_S: Final = 1.0
"""A bucket holds what comes in this many seconds, and at least one request or row."""

_SLOTS: Final = 2048
_CELLS: Final = 3
"""Numbers of a tenant: its own number plus 1, and the moments at which its two buckets are full."""
MEMORY_BYTES: Final = 8 * _SLOTS * _CELLS
"""Bytes of memory for the buckets of all tenants."""
_EPSILON_S: Final = 1e-6
"""A client that comes back exactly when it was told to must not be too early by a rounding error."""

REQUESTS: Final = 1
ROWS: Final = 2
"""Which bucket of a tenant."""


class BucketMemory:
    """The buckets of all tenants."""

    __slots__ = ("_cells",)

    def __init__(self, cells: memoryview[float]) -> None:
        """Keep the buckets in `cells`, `MEMORY_BYTES` bytes of numbers that start at 0."""
        self._cells = cells

    def bucket(self, tenant: int, kind: int, per_s: float) -> TokenBucket:
        """Return the bucket of a tenant into which `per_s` tokens come a second; `kind` is one of two."""
        return TokenBucket(self._cells, self._slot(tenant) + kind, per_s)

    def _slot(self, tenant: int) -> int:
        """Return the index of a tenant's numbers. If all slots are taken, tenants share one."""
        own = float(tenant + 1)
        first = tenant % _SLOTS
        for step in range(_SLOTS):
            at = (first + step) % _SLOTS * _CELLS
            if self._cells[at] == 0.0:
                self._cells[at] = own
            if self._cells[at] == own:
                return at
        return first * _CELLS


class TokenBucket:
    """One bucket. Tokens come all the time, until it is full."""

    __slots__ = ("_at", "_burst_s", "_cells", "_token_s")

    def __init__(self, cells: memoryview[float], at: int, per_s: float) -> None:
        """`per_s` tokens come a second; the number at index `at` of `cells` says when the bucket is full."""
        self._cells = cells
        self._at = at
        self._token_s = 1.0 / per_s
        self._burst_s = max(BURST_S, self._token_s)

    def take(self, tokens: int, now: float) -> float:
        """Take tokens and return 0, or take none and return in how many seconds that is possible.

        A full bucket gives any number of tokens: a large request has to wait for a full bucket, and those
        after it wait until its tokens have come.
        """
        full_at = self._cells[self._at]
        after = max(full_at, now) + tokens * self._token_s
        wait_s = min(after - now - self._burst_s, full_at - now)
        if wait_s > _EPSILON_S:
            return wait_s
        self._cells[self._at] = after
        return 0.0

    def give_back(self, tokens: int) -> None:
        """Give tokens back that were taken for a request that was then refused."""
        self._cells[self._at] -= tokens * self._token_s
