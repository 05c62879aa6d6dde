"""The queue of a version: which entries run next, together with which others.

Pure policy. The queue reads no clock (moments come in as `now`) and has no thread and no lock: the pool holds
its own lock around every call.

The order. Within a priority, entries that fit in a batch come before slices of larger ones and before rows
that cost more than a full batch, then the earliest deadline, then the first to arrive. The first entry in
this order leads the batch. The batch is filled, in order, with entries of the leader's group. If an entry of
the group does not fit, no later one overtakes it. Against starvation, every fourth batch is led by the entry
that has waited longest, whatever its priority or deadline. An entry with n older ones before it therefore
waits for 4 (n + 1) batches at most.

If several tenants use a device of the version, they share it by measured time: see `fair_shares`. Within a
priority, the tenant whose turn it is then has the next entry, and the order above is that of the tenant's own
entries.

An entry with more rows than a batch runs in slices of half a batch. Each slice runs by itself, and then the
remaining rows queue up again behind everything that has arrived meanwhile. A request of 10,000 rows therefore
costs its neighbours no more than the slice that is running, which takes less time than the largest batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from inferpool.pool.admission import Admission, Limits
from inferpool.pool.batch import Batch, RowSlice
from inferpool.pool.device_accounts import NOBODY, DeviceAccount
from inferpool.pool.fair_shares import FairShares
from inferpool.pool.ordered_queue import QueueSlot
from inferpool.pool.ports import LOWEST_PRIORITY, Entry
from inferpool.pool.waiting_entries import WaitingEntries

OLDEST_LEADS_EVERY: Final = 4
"""One batch in this many is led by the entry that has waited longest."""

_NO_TENANT: Final = -1

DEADLINE_SLACK_S: Final = 0.005
"""A delayed batch starts this long before a deadline requires it to, because timers and threads wake late."""


class Drop(NamedTuple):
    """An entry that left the queue before all of its rows have run, and why."""

    entry: Entry
    reason: str


class Take:
    """The decision of `Queue.take`.

    Attributes:
        slices: the batch; empty if nothing is to run now.
        drops: entries whose deadline cannot be met; each is reported once.
        reason: why the batch is no larger: `full`, `drained` (nothing else of its group waits), `deadline`
            (more rows would have made one of its entries late) or `piece` (a slice of a larger entry).
        row_s: seconds that the tenants were charged with for a row; negative unless several share the device.
    """

    __slots__ = ("drops", "reason", "row_s", "slices")

    def __init__(self) -> None:
        self.row_s = -1.0
        self.slices: list[RowSlice] = []
        self.drops: list[Drop] = []
        self.reason = ""

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return sum(each.rows for each in self.slices)


class Queue:
    """Entries of one version that wait for an instance."""

    def __init__(
        self,
        limits: Limits,
        batch_s: Callable[[float], float],
        safety_factor: Callable[[], float] = lambda: 1.0,
    ) -> None:
        """`batch_s(rows)` is the expected seconds of a batch of so many rows, and 0 while nothing is known.

        `safety_factor` is that of `Admission`. If rows have different lengths, `limits` and `batch_s` count
        rows of the measured length.
        """
        self.limits = limits
        self._waiting = WaitingEntries()
        self.admission = Admission(limits, self._waiting, batch_s, safety_factor)
        self._batch_s = batch_s
        self._probe_id = 0
        self._batches = 0
        self._tenant = _NO_TENANT  # of all entries up to now, while there is only one
        self._accounts: list[DeviceAccount] = []

    def join(self, account: DeviceAccount, now: float) -> None:
        """Take note that entries may run on the device of `account`, too."""
        if account in self._accounts:
            return
        self._accounts.append(account)
        if self._waiting.shares is not None:
            self._waiting.shares.join(account, now)

    def __len__(self) -> int:
        """How many entries wait; an entry that runs in slices counts while rows of it wait."""
        return len(self._waiting)

    @property
    def rows(self) -> int:
        """How many rows wait; an entry without rows counts as one."""
        return self._waiting.rows

    @property
    def nbytes(self) -> int:
        """How many bytes of inputs wait."""
        return self._waiting.nbytes

    @property
    def load(self) -> float:
        """Cost of everything that waits, in rows of the measured length."""
        return self._waiting.small_load + self._waiting.large_load

    def offer(self, entry: Entry, now: float, free_at: Sequence[float] = (), *, probe: bool = False) -> None:
        """Let `entry` wait, or raise.

        `free_at` has the moment at which each instance is expected to be free; a moment in the past means
        that it is idle. Raises QueueFull if rows or bytes exceed their bounds. Raises DeadlineExceeded if the
        deadline has passed, or will pass before the entry has run, by the measured rate.

        An entry with parts is admitted or refused as one, and its parts wait in its place.

        With `probe`, an idle instance takes the entry whatever was measured. Otherwise a wrong measurement
        that keeps everything from running could never be corrected.
        """
        waiting = self._waiting
        costly = self.limits.is_costly(entry)
        if entry.tenant != self._tenant:
            self._meet(entry, now)
        if entry.deadline < math.inf:
            if probe and not len(waiting) and min(free_at, default=now) <= now < entry.deadline:
                self._probe_id = entry.parts[0].entry.id if entry.parts else entry.id
            else:
                self.admission.refuse_if_late(entry, now, free_at)
        self.admission.refuse_if_full(
            entry.load,
            entry.nbytes,
            costly,
            len(free_at),
            entry.tenant,
            entry.share,
            entry.priority == LOWEST_PRIORITY,
        )
        if not entry.parts:
            waiting.add(entry, 0, costly and entry.rows > 1, costly)
        for part in entry.parts:
            waiting.add(part.entry, 0, self.limits.is_large(part.entry), costly)

    def refuse_early(self, tenant: int, instances: int) -> None:
        """Raise QueueFull if not even an entry of one row of `tenant` may wait now."""
        shares = self._waiting.shares
        own = None if shares is None else shares.entries_of(tenant)
        if shares is None or own is not None:
            share = 1.0 if own is None else own.share
            self.admission.refuse_if_full(1, 0, False, instances, tenant, share)

    def remove(self, entry_id: int) -> Entry | None:
        """Take an entry that still waits out of the queue; None if no row of it waits any more."""
        slot = self._waiting.find(entry_id)
        return self._waiting.remove(slot) if slot is not None else None

    def sliced(self) -> list[Entry]:
        """Return every request that waits to run in slices; parts of requests are none."""
        return [slot.entry for slot in self._waiting.slots() if slot.is_large and not slot.entry.part_of]

    def remove_all(self) -> list[Entry]:
        """Empty the queue."""
        return [self._waiting.remove(slot) for slot in list(self._waiting.slots())]

    def take(self, now: float, account: DeviceAccount) -> Take:
        """Return the batch that a free instance runs now, if any, and the entries that will never run.

        `account` is that of the instance's device, which has joined.
        """
        taken = Take()
        shares = self._waiting.shares
        if shares is not None:
            if now >= shares.next_review:
                self._review(shares, now)
            taken.row_s = shares.row_s
        elif account.only != self._tenant and len(self._waiting):
            self._meet_device(account, now)
            if self._waiting.shares is not None:
                taken.row_s = self._waiting.shares.row_s
        self._drop_expired(now, taken.drops)
        leader = self._choose_leader(now, account, taken.drops)
        if leader is None:
            return taken
        if leader.is_large:
            self._take_slice(leader, account, taken)
        elif not self._is_delayed(leader, now):
            self._take_group(leader, now, account, taken)
        if taken.slices:
            self._batches += 1
        return taken

    def settle(self, batch: Batch, compute_s: float, account: DeviceAccount) -> None:
        """Charge tenants with the measured time of their rows: `batch` has run for `compute_s`."""
        load = batch.load
        if load <= 0:
            return
        more_s = compute_s / load - batch.row_s
        for row_slice in batch.slices:
            entry = row_slice.entry
            account.charge(entry.tenant, more_s * row_slice.rows * entry.row_load)

    def next_wakeup(self, now: float) -> float | None:
        """Return when `take` will decide differently without an offer; None if it never will."""
        moments = []
        if (urgent := self._waiting.most_urgent()) is not None:
            moments.append(urgent.entry.deadline)
        if self.limits.delay_s > 0 and (leader := self._waiting.first()) is not None:
            moments.append(self._delay_ends(leader))
        return max(now, min(moments)) if moments else None

    def oldest_age_s(self, now: float) -> float:
        """Return the seconds that the oldest entry has waited; 0 if none waits."""
        oldest = self._waiting.oldest()
        return max(0.0, now - oldest.entry.arrived) if oldest is not None else 0.0

    def _choose_leader(self, now: float, account: DeviceAccount, drops: list[Drop]) -> QueueSlot | None:
        waiting = self._waiting
        by_age = self._batches % OLDEST_LEADS_EVERY == OLDEST_LEADS_EVERY - 1
        while True:
            if waiting.shares is not None:
                slot = waiting.shares.first(account, by_age)
            else:
                slot = waiting.oldest() if by_age else waiting.first()
            if slot is None or slot.entry.id == self._probe_id:
                return slot
            load = min(slot.load, self.limits.batch_rows) if slot.is_large else slot.load
            if now + self._batch_s(load) <= slot.entry.deadline:
                return slot
            drops.append(Drop(waiting.remove(slot), "deadline"))

    def _take_group(self, leader: QueueSlot, now: float, account: DeviceAccount, taken: Take) -> None:
        waiting = self._waiting
        shares = waiting.shares
        group = waiting.group_of(leader)
        name = leader.entry.group
        limit = self.limits.batch_rows if shares is None else min(self.limits.batch_rows, shares.batch_rows)
        load, nbytes, deadline = leader.load, leader.entry.nbytes, leader.entry.deadline
        self._take_entry(leader, account, taken)
        taken.reason = "drained"
        while True:
            follower = group.slots.first() if shares is None else shares.first_of(account, name)
            if follower is None:
                break
            grown = load + follower.load
            nbytes += follower.entry.nbytes
            if grown > limit or nbytes > self.limits.batch_bytes:
                taken.reason = "full"
                return
            soonest = min(deadline, follower.entry.deadline)
            if soonest < math.inf and now + self._batch_s(grown) > soonest:
                if now + self._batch_s(follower.load) > follower.entry.deadline:
                    taken.drops.append(Drop(waiting.remove(follower), "deadline"))
                    continue
                taken.reason = "deadline"
                return
            self._take_entry(follower, account, taken)
            load, deadline = grown, soonest
        if load >= limit:
            taken.reason = "full"

    def _take_entry(self, slot: QueueSlot, account: DeviceAccount, taken: Take) -> None:
        if taken.row_s > 0:
            account.charge(slot.entry.tenant, slot.load * taken.row_s)
        entry = self._waiting.remove(slot)
        taken.slices.append(RowSlice(entry, 0, entry.rows))

    def _take_slice(self, slot: QueueSlot, account: DeviceAccount, taken: Take) -> None:
        start = slot.start
        rows = min(slot.rows, max(1, int(self.limits.slice_rows / slot.entry.row_load)))
        if taken.row_s > 0:
            account.charge(slot.entry.tenant, rows * slot.entry.row_load * taken.row_s)
        entry = self._waiting.remove(slot)
        if start + rows < entry.rows:
            self._waiting.add(entry, start + rows, True, True)
        taken.slices.append(RowSlice(entry, start, start + rows))
        taken.reason = "piece"

    def _meet(self, entry: Entry, now: float) -> None:
        """Take note that `entry` is not of the tenant of all entries before."""
        waiting = self._waiting
        if waiting.shares is not None:
            return
        if self._tenant == _NO_TENANT:
            self._tenant = entry.tenant
            return
        shares = self._share(now)
        # The other tenant counts as active even if all of its entries run.
        if shares.entries_of(self._tenant) is None:
            shares.enter(self._tenant, 1.0, now)
        shares.enter(entry.tenant, entry.share, now)

    def _meet_device(self, account: DeviceAccount, now: float) -> None:
        """Take note that another tenant than that of all entries has used the device lately, or nobody."""
        share = next(iter(self._waiting.slots())).entry.share
        account.meet(self._tenant, share, now)
        if account.only != self._tenant:
            self._share(now)

    def _share(self, now: float) -> FairShares:
        """Begin to share the devices."""
        waiting = self._waiting
        shares = FairShares(self.limits.batch_rows, self._accounts)
        for slot in waiting.slots():
            shares.add(slot)
        shares.review(now, self.limits.batch_rows, self._batch_s)
        waiting.shares = shares
        return shares

    def _review(self, shares: FairShares, now: float) -> None:
        """Stop sharing if only one tenant has used the devices lately."""
        shares.review(now, self.limits.batch_rows, self._batch_s)
        numbers = shares.numbers()
        if len(numbers) > 1:
            return
        tenant = numbers[0] if numbers else _NO_TENANT
        if not numbers or all(account.only in (tenant, NOBODY) for account in self._accounts):
            self._tenant = tenant
            shares.end()
            self._waiting.shares = None

    def _is_delayed(self, leader: QueueSlot, now: float) -> bool:
        return (
            self.limits.delay_s > 0
            and self._waiting.group_of(leader).load < self.limits.batch_rows
            and now < self._delay_ends(leader)
        )

    def _delay_ends(self, leader: QueueSlot) -> float:
        oldest = self._waiting.oldest()
        assert oldest is not None  # at least the leader waits
        ends = oldest.entry.arrived + self.limits.delay_s
        if (urgent := self._waiting.most_urgent()) is not None:
            ends = min(ends, urgent.entry.deadline - self._batch_s(self.limits.batch_rows) - DEADLINE_SLACK_S)
        return ends

    def _drop_expired(self, now: float, drops: list[Drop]) -> None:
        while (urgent := self._waiting.most_urgent()) is not None and urgent.entry.deadline <= now:
            drops.append(Drop(self._waiting.remove(urgent), "deadline"))
