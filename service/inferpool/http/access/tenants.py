"""Tenants: to whom keys belong, which share of the server each one has, and how much it may send."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Final, NamedTuple

from inferpool.errors import RateLimited
from inferpool.observe.metrics import Metrics, Value
from inferpool.pool.ports import DEFAULT_PRIORITY, Entry, Result
from inferpool.pool.token_buckets import REQUESTS, ROWS, BucketMemory, TokenBucket

MOST_TENANTS: Final = 1024
"""Tenants that are told apart. An issuer of tokens may name any number; the rest are one tenant together."""
MOST_LABELS: Final = 100
"""Tenants with metrics of their own; these are the first to send a request."""
NO_TENANT: Final = "(none)"
"""The metrics' name for requests without a key. Names of tenants have no parentheses."""
OTHER_TENANTS: Final = "(other)"


class TenantLimits(NamedTuple):
    """What the server gives a tenant.

    Attributes:
        share: its share of the instances while others use them too; only the ratio to other shares matters.
        requests_per_s: requests that it may send a second; infinity if there is no limit.
        rows_per_s: likewise, rows.
        highest_priority: the highest priority that its requests have before those of other tenants.
    """

    share: float = 1.0
    requests_per_s: float = math.inf
    rows_per_s: float = math.inf
    highest_priority: int = DEFAULT_PRIORITY


class TenantTable(NamedTuple):
    """The limits of tenants by their names, and those of all others."""

    limits: Mapping[str, TenantLimits]
    default: TenantLimits


class Tenant:
    """One tenant, as requests use it; for the event loop alone.

    Attributes:
        name: its name; "" for requests without a key.
        number: a number that is the same in all processes.
    """

    __slots__ = (
        "_by_status", "_compute_s", "_highest_priority", "_label", "_metrics", "_requests", "_rows",
        "_rows_total", "_share", "name", "number",
    )  # fmt: skip

    def __init__(
        self, name: str, number: int, limits: TenantLimits, memory: BucketMemory, metrics: Metrics, label: str
    ) -> None:
        """`number` is the same in all processes; `label` is its name in the metrics."""
        self.name = name
        self.number = number
        self._share = limits.share
        self._highest_priority = limits.highest_priority
        self._requests: TokenBucket | None = None
        self._rows: TokenBucket | None = None
        if limits.requests_per_s < math.inf:
            self._requests = memory.bucket(number, REQUESTS, limits.requests_per_s)
        if limits.rows_per_s < math.inf:
            self._rows = memory.bucket(number, ROWS, limits.rows_per_s)
        self._metrics = metrics
        self._label = label
        self._by_status: dict[int, Value] = {}
        self._rows_total = metrics.value("tenant_rows_total", label)
        self._compute_s = metrics.value("tenant_compute_seconds_total", label)

    def admit(self, clock: Callable[[], float]) -> None:
        """Count a request that begins; raises RateLimited if the tenant sends too many."""
        if self._requests is not None:
            wait_s = self._requests.take(1, clock())
            if wait_s > 0:
                raise _too_many("requests", wait_s)

    def take_rows(self, rows: int, now: float) -> None:
        """Count the rows of a request; raises RateLimited if the tenant sends too many."""
        if self._rows is not None:
            wait_s = self._rows.take(rows, now)
            if wait_s > 0:
                raise _too_many("rows", wait_s)

    def give_rows_back(self, rows: int) -> None:
        """Take note that a request whose rows were counted was refused."""
        if self._rows is not None:
            self._rows.give_back(rows)

    def mark(self, entry: Entry) -> None:
        """Make an entry one of this tenant's."""
        entry.tenant = self.number
        entry.share = self._share
        if entry.rank < self._highest_priority:
            entry.rank = self._highest_priority

    def succeeded(self, rows: int, result: Result) -> None:
        """Count a request that was answered with outputs."""
        self.ended(200)
        self.used(rows, result)

    def used(self, rows: int, result: Result) -> None:
        """Count rows that the model ran for a request that is answered later."""
        self._rows_total.add(rows)
        if result.batch_rows:
            self._compute_s.add(result.compute_s * min(1.0, rows / result.batch_rows))

    def ended(self, status: int) -> None:
        """Count a request that ended with `status`."""
        value = self._by_status.get(status)
        if value is None:
            value = self._metrics.value("tenant_requests_total", self._label, str(status))
            self._by_status[status] = value
        value.add(1.0)


class Tenants:
    """The tenants that have sent requests, by their names; for the event loop alone."""

    def __init__(self, table: TenantTable, memory: BucketMemory, metrics: Metrics) -> None:
        """Give tenants the limits in `table`; `memory` is shared with other processes, if there are any."""
        self._table = table
        self._memory = memory
        self._metrics = metrics
        self._tenants: dict[str, Tenant] = {}
        self._labels: set[str] = set()

    def use(self, table: TenantTable) -> None:
        """Give tenants the limits in `table` from now on. Buckets keep what is in them."""
        self._table = table
        self._tenants.clear()

    def of(self, name: str) -> Tenant:
        """Return the tenant of this name."""
        tenant = self._tenants.get(name)
        return self._enter(name) if tenant is None else tenant

    def _enter(self, name: str) -> Tenant:
        if name not in self._table.limits and len(self._tenants) >= MOST_TENANTS:
            name = OTHER_TENANTS
            if name in self._tenants:
                return self._tenants[name]
        limits = self._table.limits.get(name, self._table.default)
        label = name or NO_TENANT
        if label not in self._labels and len(self._labels) >= MOST_LABELS:
            label = OTHER_TENANTS
        self._labels.add(label)
        tenant = Tenant(name, number_of(name), limits, self._memory, self._metrics, label)
        self._tenants[name] = tenant
        return tenant


def number_of(name: str) -> int:
    """Return the number of a tenant, which is the same in every process; 0 for the name ""."""
    return int.from_bytes(blake2b(name.encode(), digest_size=6).digest()) if name else 0


def _too_many(what: str, wait_s: float) -> RateLimited:
    return RateLimited(
        f"this key's tenant has sent too many {what}; try again in {1000 * wait_s:.0f} ms",
        retry_after_s=wait_s,
    )
