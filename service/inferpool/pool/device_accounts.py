"""What tenants use of each device: one account for all versions whose instances run there.

Pure policy; it reads no clock. The queues of the versions, each under the lock of its pool, read and charge
the account of the device for which they choose rows. So a tenant that occupies a device with one model has
less of it left for others, whatever those are.

A process has one account a device. An engine of its own, which a version gets after crashes, has another one.
"""

from __future__ import annotations

import threading
from typing import Final

ACTIVE_S: Final = 3.0
"""A tenant without entries keeps its clock, and its part of a queue, for this long after its last one."""
NOBODY: Final = -1
SEVERAL: Final = -2


class _TenantClock:
    """The clock of one tenant: the seconds that its rows have run, divided by its share."""

    __slots__ = ("clock_s", "last_seen", "share", "waiting")

    def __init__(self, share: float, clock_s: float, last_seen: float) -> None:
        self.share = share
        self.clock_s = clock_s
        self.last_seen = last_seen
        self.waiting = 0


class DeviceAccount:
    """The clocks of the tenants that have used a device lately. Threads may share it.

    Attributes:
        only: the number of the only such tenant; NOBODY, or SEVERAL. Queues compare it without the lock.
    """

    __slots__ = ("_clocks", "_lock", "_now_s", "only")

    def __init__(self) -> None:
        self._clocks: dict[int, _TenantClock] = {}
        self._lock = threading.Lock()
        self._now_s = 0.0  # the clock of the tenant that was served last
        self.only = NOBODY

    def meet(self, number: int, share: float, now: float) -> None:
        """Take note that a tenant uses the device, or is about to."""
        with self._lock:
            self._clock_of(number, share, now)

    def begin_waiting(self, number: int, share: float, now: float) -> None:
        """Take note that an entry of a tenant waits for the device.

        A tenant of which nothing waited has saved nothing: its clock goes on with those of others.
        """
        with self._lock:
            clock = self._clock_of(number, share, now)
            if not clock.waiting and clock.clock_s < self._now_s:
                clock.clock_s = self._now_s
            clock.waiting += 1

    def end_waiting(self, number: int, count: int = 1) -> None:
        """Take note that `count` entries of a tenant wait no longer."""
        with self._lock:
            self._clocks[number].waiting -= count

    def clock_s(self, number: int) -> float:
        """Return the clock of a tenant; the tenant with the lowest one is next."""
        clock = self._clocks.get(number)
        return self._now_s if clock is None else clock.clock_s

    def serve(self, number: int) -> None:
        """Take note that it is the turn of a tenant."""
        with self._lock:
            clock = self._clocks.get(number)
            if clock is not None and self._now_s < clock.clock_s:
                self._now_s = clock.clock_s

    def charge(self, number: int, seconds: float) -> None:
        """Count that rows of a tenant run for so many seconds, or with a negative number, for fewer."""
        with self._lock:
            clock = self._clocks.get(number)
            if clock is not None:
                clock.clock_s += seconds / clock.share

    def review(self, now: float) -> None:
        """Forget the tenants of which nothing waits and that have sent nothing lately."""
        with self._lock:
            for number, clock in list(self._clocks.items()):
                if not clock.waiting and clock.last_seen + ACTIVE_S < now:
                    del self._clocks[number]
            self._count()

    def _clock_of(self, number: int, share: float, now: float) -> _TenantClock:
        clock = self._clocks.get(number)
        if clock is None:
            clock = self._clocks[number] = _TenantClock(share, self._now_s, now)
            self._count()
        clock.share = share  # the keys may have changed
        if clock.last_seen < now:
            clock.last_seen = now
        return clock

    def _count(self) -> None:
        numbers = list(self._clocks)
        self.only = NOBODY if not numbers else numbers[0] if len(numbers) == 1 else SEVERAL


class DeviceAccounts:
    """The accounts of the devices that instances of this process run on."""

    def __init__(self) -> None:
        self._accounts: dict[str, DeviceAccount] = {}
        self._lock = threading.Lock()

    def of(self, device: str) -> DeviceAccount:
        """Return the account of a device such as `cpu` or `cuda:0`."""
        with self._lock:
            account = self._accounts.get(device)
            if account is None:
                account = self._accounts[device] = DeviceAccount()
            return account
