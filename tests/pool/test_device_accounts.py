"""Tenants share a device by measured time, whichever versions their requests are for."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inferpool.pool.admission import Limits
from inferpool.pool.batch import Batch
from inferpool.pool.device_accounts import ACTIVE_S, NOBODY, SEVERAL, DeviceAccount, DeviceAccounts
from inferpool.pool.entry_queue import Queue
from inferpool.pool.ports import Entry, VersionKey

LIMIT = 8
ONE, TWO, THREE = 1, 2, 3


def batch_s(rows: float) -> float:
    return 0.010 + 0.001 * rows if rows else 0.0


class Machine:
    """Versions with one instance on each of their devices; the instances take turns."""

    def __init__(self, devices: dict[str, Iterable[str]]) -> None:
        self.now = 0.0
        self.accounts = DeviceAccounts()
        self.queues: dict[str, Queue] = {}
        self.devices = {name: list(own) for name, own in devices.items()}
        for name, own in self.devices.items():
            queue = self.queues[name] = Queue(Limits(LIMIT, 10**6, 10**9), batch_s)
            for device in own:
                queue.join(self.accounts.of(device), self.now)
        self.serial = 0
        self.used_s: dict[tuple[str, int], float] = {}
        self.ran: dict[tuple[str, int], int] = {}
        self.charged = False

    def offer(self, version: str, tenant: int, share: float = 1.0) -> None:
        self.serial += 1
        key = VersionKey(version, 1)
        entry = Entry(self.serial, key, {"x": np.zeros((1, 1))}, 1, "a", 4, self.now)
        entry.tenant, entry.share = tenant, share
        self.queues[version].offer(entry, self.now, [0.0])

    def fill(self, backlog: Mapping[int, Iterable[str]], shares: dict[int, float] | None = None) -> None:
        """Let each tenant have entries of two batches waiting for each of its versions."""
        for tenant, versions in backlog.items():
            for version in versions:
                queue = self.queues[version]
                waiting = sum(slot.entry.tenant == tenant for slot in queue._waiting.slots())
                for _ in range(2 * LIMIT - waiting):
                    self.offer(version, tenant, (shares or {}).get(tenant, 1.0))

    def run(self, version: str, device: str, actual_s: Callable[[float], float] = batch_s) -> list[int]:
        """Run a batch of a version; returns the tenants of its entries."""
        queue, account = self.queues[version], self.accounts.of(device)
        taken = queue.take(self.now, account)
        if not taken.slices:
            return []
        batch = Batch(taken.slices, True, taken.reason, self.now)
        batch.row_s = taken.row_s
        took_s = actual_s(batch.load)
        self.now += took_s
        tenants = [each.entry.tenant for each in taken.slices]
        for tenant in tenants:
            self.used_s[device, tenant] = self.used_s.get((device, tenant), 0.0) + took_s / batch.rows
            self.ran[version, tenant] = self.ran.get((version, tenant), 0) + 1
        if batch.row_s >= 0:
            self.charged = True
            queue.settle(batch, took_s, account)
        return tenants

    def run_all(self) -> None:
        """Let every instance run once."""
        for version, devices in self.devices.items():
            for device in devices:
                self.run(version, device)


def test_whoever_uses_the_device_with_one_model_has_less_of_it_for_another() -> None:
    machine = Machine({"a": ["gpu"], "b": ["gpu"]})
    for _ in range(100):
        machine.fill({ONE: "ab", TWO: "b"})
        machine.run_all()
    assert machine.used_s["gpu", ONE] == pytest.approx(machine.used_s["gpu", TWO], abs=4 * batch_s(LIMIT))
    assert machine.ran["b", TWO] > 10 * machine.ran.get(("b", ONE), 0)


def test_time_that_one_tenant_does_not_use_is_free_for_the_other() -> None:
    machine = Machine({"a": ["gpu"], "b": ["gpu"]})
    for _ in range(100):
        machine.fill({ONE: "ab"})
        machine.offer("b", TWO)  # far less than its share
        before = machine.ran.get(("b", TWO), 0)
        for version in "ab":
            assert len(machine.run(version, "gpu")) >= LIMIT // 2, "batches stay as full as they were"
        assert machine.ran["b", TWO] == before + 1, "in the next batch, whatever waits"


def test_one_tenant_or_none_is_never_charged() -> None:
    machine = Machine({"a": ["gpu"], "b": ["gpu", "cpu"]})
    for _ in range(20):
        machine.fill({ONE: "ab"})
        machine.run_all()
    assert not machine.charged
    assert machine.accounts.of("gpu").only == machine.accounts.of("cpu").only == ONE


def test_each_device_has_an_account_of_its_own() -> None:
    # ONE occupies a GPU with version a. Version b runs on this GPU and on another one.
    machine = Machine({"a": ["gpu0"], "b": ["gpu0", "gpu1"]})
    mixed: dict[str, list[int]] = {"gpu0": [], "gpu1": []}
    for _ in range(100):
        machine.fill({ONE: "ab", TWO: "b"})
        machine.run("a", "gpu0")
        for device, tenants in mixed.items():
            tenants += machine.run("b", device)
    assert mixed["gpu0"].count(ONE) < 0.1 * mixed["gpu0"].count(TWO)
    assert mixed["gpu1"].count(ONE) == pytest.approx(mixed["gpu1"].count(TWO), abs=2 * LIMIT)


def test_a_device_that_joins_later_counts_what_waits() -> None:
    machine = Machine({"a": ["gpu0"]})
    machine.fill({ONE: "a", TWO: "a"})
    machine.run("a", "gpu0")
    account = machine.accounts.of("gpu1")
    machine.queues["a"].join(account, machine.now)
    machine.queues["a"].join(account, machine.now)
    assert account.only == SEVERAL
    while machine.run("a", "gpu1"):
        pass
    machine.now += 2 * ACTIVE_S
    machine.offer("a", TWO)
    machine.run("a", "gpu1")
    assert account.only == TWO, "nothing of ONE waits any more"


def test_a_version_stops_counting_when_the_others_are_gone() -> None:
    machine = Machine({"a": ["gpu"], "b": ["gpu"]})
    for _ in range(10):
        machine.fill({ONE: "a", TWO: "b"})
        machine.run_all()
    assert machine.charged, "two tenants share the device, though no version"
    while machine.run("b", "gpu"):
        pass
    for _ in range(3):
        machine.now += 2 * ACTIVE_S
        machine.fill({ONE: "a"})
        machine.run("a", "gpu")
    assert machine.accounts.of("gpu").only == ONE
    machine.charged = False
    machine.run("a", "gpu")
    assert not machine.charged
    machine.offer("b", TWO)
    assert machine.run("b", "gpu") == [TWO]


@settings(max_examples=30)
@given(st.integers(0, 2**32))
def test_nobody_is_served_before_a_tenant_that_has_had_less_of_the_device(seed: int) -> None:
    choose = random.Random(seed)
    versions = "abc"[: choose.randint(1, 3)]
    machine = Machine({version: ["gpu"] for version in versions})
    shares = {tenant: choose.choice([0.5, 1.0, 2.0, 5.0]) for tenant in range(choose.randint(2, 4))}
    backlog = {tenant: choose.sample(versions, choose.randint(1, len(versions))) for tenant in shares}
    rounds = 80
    late: set[tuple[str, int]] = set()
    for number in range(rounds):
        machine.fill(backlog, shares)
        for version in versions:
            tenants = machine.run(version, "gpu")
            assert tenants or not any(version in own for own in backlog.values()), "nobody is idle in vain"
            if number >= rounds // 2:
                late.update((version, tenant) for tenant in tenants)
    clocks = {tenant: machine.used_s.get(("gpu", tenant), 0.0) / share for tenant, share in shares.items()}
    slack = 4 * 2 * batch_s(LIMIT) / min(shares.values())
    for version, served in late:
        for tenant, own in backlog.items():
            if version in own:
                assert clocks[served] <= clocks[tenant] + slack, (version, served, tenant, clocks)


def test_a_tenant_without_entries_saves_nothing() -> None:
    account = DeviceAccount()
    account.begin_waiting(ONE, 1.0, 0.0)
    account.charge(ONE, 5.0)
    account.serve(ONE)
    account.meet(TWO, 1.0, 0.0)
    account.begin_waiting(THREE, 1.0, 0.0)
    assert account.clock_s(TWO) == account.clock_s(THREE) == 5.0


def test_tenants_are_forgotten_when_nothing_of_them_waits() -> None:
    account = DeviceAccount()
    assert account.only == NOBODY
    account.begin_waiting(ONE, 1.0, 0.0)
    account.meet(TWO, 1.0, 1.0)
    account.review(ACTIVE_S + 0.5)
    assert account.only == SEVERAL
    account.review(ACTIVE_S + 1.5)
    assert account.only == ONE
    account.end_waiting(ONE)
    account.review(ACTIVE_S + 2.0)
    assert account.only == NOBODY
    account.charge(ONE, 1.0)  # what still ran
    assert account.clock_s(ONE) == 0.0


def test_threads_may_charge_at_once() -> None:
    account = DeviceAccount()
    account.meet(ONE, 2.0, 0.0)

    def charge() -> None:
        for _ in range(2000):
            account.charge(ONE, 1.0)

    threads = [threading.Thread(target=charge) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert account.clock_s(ONE) == 4 * 2000 / 2.0
