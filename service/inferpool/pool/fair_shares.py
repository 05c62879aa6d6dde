"""How tenants share the devices of a version: by the time that their rows have run, not by requests.

Pure policy, like the queue that uses it. It exists only while several tenants use a device of the version.

Each tenant has a clock for each device: the seconds that its rows have run there, for whatever version,
divided by its share (`device_accounts`). The tenant whose clock shows least is next, for the leader of a
batch and for each entry that joins it, so that a batch mixes tenants in proportion to their shares. Only
entries of a higher rank go first, if a tenant may use such a priority. Rows are charged with their expected
time when they are taken, and with the measured time after the run.

No time is kept for a tenant that has nothing to run: others use it, and its clock goes on with theirs. If it
sends again, it is next at once, but has saved nothing. Each tenant may fill its part of the queue alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Final

from inferpool.pool.background_load import BackgroundLoad
from inferpool.pool.device_accounts import ACTIVE_S, DeviceAccount
from inferpool.pool.ordered_queue import Group, OrderedQueue, QueueSlot
from inferpool.pool.ports import Entry

REVIEW_S: Final = 0.5
"""Pause between two looks at which tenants are still active."""
THROUGHPUT_KEPT: Final = 0.97
"""The part of the best throughput that must remain when batches are kept small for other tenants."""
BATCH_OVERHEAD_S: Final = 1e-4
"""Seconds that a batch takes beside its run, about."""


class TenantEntries:
    """The entries of one tenant that wait.

    Attributes:
        share: its share; only the ratio to the shares of other tenants matters.
        last_arrival: the moment at which its last entry came.
        count: how many entries wait.
        small_load: cost of the small requests that wait, in rows like those that were measured at load.
        large_load: likewise, of the requests that cost more than a full batch.
        background: what of the small requests waits at the lowest priority.
        nbytes: bytes of inputs that wait.
        in_order: the entries in the order in which they are to run.
        groups: likewise, by group; without large requests.
    """

    __slots__ = (
        "_arrivals", "background", "count", "groups", "in_order", "large_count", "large_load", "last_arrival",
        "nbytes", "share", "small_load",
    )  # fmt: skip

    def __init__(self, share: float, last_arrival: float) -> None:
        self.share = share
        self.last_arrival = last_arrival
        self.count = self.large_count = self.nbytes = 0
        self.small_load = self.large_load = 0.0
        self.background = BackgroundLoad()
        self.in_order = OrderedQueue()
        self.groups: dict[Hashable, Group] = {}
        self._arrivals: deque[QueueSlot] = deque()

    def add(self, slot: QueueSlot) -> None:
        """Add a slot of this tenant."""
        entry = slot.entry
        self.count += 1
        self.nbytes += entry.nbytes
        if slot.low_band:
            self.large_count += 1
            self.large_load += slot.load or 1
        else:
            self.small_load += slot.load or 1
        self.background.add(slot)
        self.in_order.push(slot)
        self._arrivals.append(slot)
        if not slot.is_large:
            group = self.groups.get(entry.group)
            if group is None:
                group = self.groups[entry.group] = Group()
            group.slots.push(slot)
            group.count += 1

    def remove(self, slot: QueueSlot) -> None:
        """Take note that a slot leaves the queue."""
        entry = slot.entry
        self.count -= 1
        self.nbytes -= entry.nbytes
        # 0 is set, because sums of fractions keep rounding errors.
        if slot.low_band:
            self.large_count -= 1
            self.large_load = self.large_load - (slot.load or 1) if self.large_count else 0.0
        else:
            self.small_load = self.small_load - (slot.load or 1) if self.count > self.large_count else 0.0
        self.background.remove(slot)
        if not slot.is_large:
            group = self.groups[entry.group]
            group.count -= 1
            if not group.count:
                del self.groups[entry.group]

    @property
    def foreground_load(self) -> float:
        """Cost of the small requests that wait, without those of the lowest priority."""
        small = self.count - self.large_count
        return self.small_load - self.background.load if small > self.background.count else 0.0

    def oldest(self) -> QueueSlot | None:
        """Return the slot that has waited longest; None if none waits."""
        while self._arrivals and not self._arrivals[0].is_live:
            self._arrivals.popleft()
        return self._arrivals[0] if self._arrivals else None

    def sweep(self) -> None:
        """Let go of all dead slots."""
        self._arrivals = deque(slot for slot in self._arrivals if slot.is_live)
        self.in_order.sweep()
        for group in self.groups.values():
            group.slots.sweep()


class FairShares:
    """The tenants whose entries came lately, and whose turn it is.

    Attributes:
        total_share: the sum of their shares.
        batch_rows: rows that a batch may have while several tenants share the instances.
        row_s: seconds that a row is charged with before its batch has run.
        next_review: the moment at which `review` has to be called again.
    """

    __slots__ = ("_accounts", "_tenants", "batch_rows", "next_review", "row_s", "total_share")

    def __init__(self, batch_rows: int, accounts: Sequence[DeviceAccount]) -> None:
        """`accounts` are those of the version's devices; the caller may add to them by `join`."""
        self._accounts = list(accounts)
        self._tenants: dict[int, TenantEntries] = {}
        self.total_share = 0.0
        self.batch_rows = batch_rows
        self.row_s = 0.0
        self.next_review = -math.inf

    def __len__(self) -> int:
        """How many tenants are active."""
        return len(self._tenants)

    def numbers(self) -> list[int]:
        """Return the numbers of the active tenants."""
        return list(self._tenants)

    def enter(self, number: int, share: float, now: float) -> TenantEntries:
        """Return the tenant of this number, which sends an entry, or has sent one lately."""
        tenant = self._tenants.get(number)
        if tenant is None:
            tenant = self._tenants[number] = TenantEntries(share, now)
            self.total_share += share
            for account in self._accounts:
                account.meet(number, share, now)
        elif tenant.share != share:  # the keys were changed
            self.total_share += share - tenant.share
            tenant.share = share
        return tenant

    def join(self, account: DeviceAccount, now: float) -> None:
        """Take note that the entries that wait may run on one more device."""
        self._accounts.append(account)
        for number, tenant in self._tenants.items():
            account.meet(number, tenant.share, now)
            for _ in range(tenant.count):
                account.begin_waiting(number, tenant.share, now)

    def end(self) -> None:
        """Take note that the entries that wait are shared no longer."""
        for number, tenant in self._tenants.items():
            for account in self._accounts if tenant.count else ():
                account.end_waiting(number, tenant.count)

    def add(self, slot: QueueSlot) -> None:
        """Add a slot to those of its tenant."""
        entry = slot.entry
        tenant = self.enter(entry.tenant, entry.share, entry.arrived)
        if tenant.last_arrival < entry.arrived:
            tenant.last_arrival = entry.arrived
        for account in self._accounts:
            account.begin_waiting(entry.tenant, entry.share, entry.arrived)
        tenant.add(slot)

    def remove(self, slot: QueueSlot) -> None:
        """Take note that a slot leaves the queue."""
        number = slot.entry.tenant
        self._tenants[number].remove(slot)
        for account in self._accounts:
            account.end_waiting(number)

    def sweep(self) -> None:
        """Let go of all dead slots."""
        for tenant in self._tenants.values():
            tenant.sweep()

    def first(self, account: DeviceAccount, by_age: bool) -> QueueSlot | None:
        """Return the slot that leads the next batch on the device of `account`; None if none waits.

        `by_age` looks at no priority: the tenant that is next leads with its oldest entry.
        """
        best: QueueSlot | None = None
        least_s = math.inf
        for number, tenant in self._tenants.items():
            if not tenant.count:
                continue
            slot = tenant.oldest() if by_age else tenant.in_order.first()
            if slot is None:
                continue
            clock_s = account.clock_s(number)
            if best is None or _precedes(slot, clock_s, best, least_s, by_age):
                best, least_s = slot, clock_s
        if best is not None:
            account.serve(best.entry.tenant)
        return best

    def first_of(self, account: DeviceAccount, group: Hashable) -> QueueSlot | None:
        """Return the slot of `group` that is next to join a batch on a device; None if none waits."""
        best: QueueSlot | None = None
        least_s = math.inf
        for number, tenant in self._tenants.items():
            own = tenant.groups.get(group)
            if own is None:
                continue
            slot = own.slots.first()
            if slot is None:
                continue
            clock_s = account.clock_s(number)
            if best is None or _precedes(slot, clock_s, best, least_s, False):
                best, least_s = slot, clock_s
        return best

    def entries_of(self, number: int) -> TenantEntries | None:
        """Return what waits of a tenant; None if the tenant is not active."""
        return self._tenants.get(number)

    def part(self, number: int, share: float) -> float:
        """Return which part of the queue and of the instances a tenant has, above 0 and up to 1."""
        known = self._tenants.get(number)
        if known is None:
            return share / (self.total_share + share)
        return share / (self.total_share + share - known.share)

    def ahead(self, entry: Entry, costly: bool, all_load: float) -> float:
        """Return how much runs before a new entry, if `all_load` would without shares."""
        own = self._tenants.get(entry.tenant)
        if own is None:
            return 0.0
        load = own.small_load + own.large_load if costly else own.small_load
        return min(all_load, load / self.part(entry.tenant, entry.share))

    def review(self, now: float, batch_rows: int, batch_s: Callable[[float], float]) -> None:
        """Forget tenants that have sent nothing lately, here and on the devices, and take what was measured.

        `batch_s(rows)` is the expected seconds of a batch of so many rows, of which `batch_rows` are allowed.
        """
        self.next_review = now + REVIEW_S
        for number, tenant in list(self._tenants.items()):
            if not tenant.count and tenant.last_arrival + ACTIVE_S < now:
                del self._tenants[number]
        for account in self._accounts:
            account.review(now)
        self.total_share = sum(tenant.share for tenant in self._tenants.values())
        self.batch_rows = fair_batch_rows(batch_rows, batch_s)
        self.row_s = batch_s(self.batch_rows) / self.batch_rows


def _precedes(slot: QueueSlot, clock_s: float, other: QueueSlot, other_clock_s: float, by_age: bool) -> bool:
    if not by_age and slot.entry.rank != other.entry.rank:
        return slot.entry.rank < other.entry.rank
    return clock_s < other_clock_s


def fair_batch_rows(batch_rows: int, batch_s: Callable[[float], float]) -> int:
    """Return how many rows a batch may have while several tenants share the instances.

    A tenant that floods the queue makes every batch as large as it may be, and whoever comes next waits for
    that batch. Batches beyond a certain size gain little throughput, so they are no larger than that.
    """
    full_s = batch_s(batch_rows)
    if full_s <= 0:
        return batch_rows  # nothing is measured yet
    least = THROUGHPUT_KEPT * batch_rows / (full_s + BATCH_OVERHEAD_S)
    rows = 1
    while rows < batch_rows and rows < least * (batch_s(rows) + BATCH_OVERHEAD_S):
        rows *= 2
    return min(rows, batch_rows)
