"""Several tenants share the instances: by measured time, and nobody is idle or waits for ever."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inferpool.errors import DeadlineExceeded, QueueFull
from inferpool.pool.admission import Limits
from inferpool.pool.batch import Batch
from inferpool.pool.device_accounts import ACTIVE_S, DeviceAccount
from inferpool.pool.entry_queue import OLDEST_LEADS_EVERY, Queue
from inferpool.pool.fair_shares import fair_batch_rows
from inferpool.pool.ports import Entry, VersionKey

KEY = VersionKey("m", 1)
LIMIT = 8
ONE, TWO, THREE = 1, 2, 3


def batch_s(rows: float) -> float:
    return 0.010 + 0.001 * rows if rows else 0.0


def flat_s(rows: float) -> float:
    """A run that takes as long whatever its rows, so that batches are best full."""
    return 0.010


class Made:
    """A queue, and what runs of it: one instance, whose runs take as long as `actual_s` says."""

    def __init__(
        self,
        expected_s: Callable[[float], float] = flat_s,
        actual_s: Callable[[Batch], float] | None = None,
        limit: int = LIMIT,
        queue_rows: int = 10**6,
    ) -> None:
        self.device = DeviceAccount()
        self.queue = Queue(Limits(limit, queue_rows, 10**9), expected_s)
        self.queue.join(self.device, 0.0)
        self.actual_s = actual_s or (lambda batch: expected_s(batch.load))
        self.now = 0.0
        self.serial = 0
        self.used_s: dict[int, float] = {}
        self.waits_s: dict[int, list[float]] = {}
        self.rows_run = 0

    def offer(
        self, tenant: int, rows: int = 1, share: float = 1.0, at: float | None = None, **rest: object
    ) -> int:
        self.serial += 1
        now = self.now if at is None else at
        fields = {"group": "a", "nbytes": 4 * rows, "arrived": now} | rest
        entry = Entry(self.serial, KEY, {"x": np.zeros((rows, 1))}, rows, **fields)  # type: ignore[arg-type]
        entry.tenant, entry.share = tenant, share
        self.queue.offer(entry, now, [0.0])
        return self.serial

    def run(self) -> list[Entry]:
        """Run one batch to its end; returns its entries."""
        taken = self.queue.take(self.now, self.device)
        if not taken.slices:
            return []
        batch = Batch(taken.slices, True, taken.reason, self.now)
        batch.row_s = taken.row_s
        took_s = self.actual_s(batch)
        self.now += took_s
        for each in taken.slices:
            tenant = each.entry.tenant
            self.used_s[tenant] = self.used_s.get(tenant, 0.0) + took_s * each.rows / batch.rows
            self.waits_s.setdefault(tenant, []).append(self.now - each.entry.arrived)
        self.rows_run += batch.rows
        if batch.row_s >= 0:
            self.queue.settle(batch, took_s, self.device)
        return [each.entry for each in taken.slices]


def tenants_of(entries: list[Entry]) -> list[int]:
    return [entry.tenant for entry in entries]


def test_a_batch_mixes_tenants_by_their_shares() -> None:
    made = Made()
    for _ in range(100):
        made.offer(ONE, share=3.0)
    for _ in range(100):
        made.offer(TWO, share=1.0)
    counts = [tenants_of(made.run()).count(ONE) for _ in range(8)]
    assert sum(counts) == pytest.approx(8 * 6, abs=2)
    assert min(counts) >= 5


def test_a_single_tenant_costs_nothing_and_keeps_the_order() -> None:
    made = Made()
    ids = [made.offer(ONE) for _ in range(20)]
    assert made.queue.take(0.0, made.device).row_s < 0, "nobody is charged"
    assert [entry.id for entry in made.run()] == ids[LIMIT : 2 * LIMIT]


def test_an_entry_of_another_tenant_is_in_the_next_batch_whatever_waits() -> None:
    made = Made()
    for _ in range(1000):
        made.offer(ONE)
    for _ in range(10):
        made.run()
        made.offer(TWO)
        assert TWO in tenants_of(made.run())


def test_time_that_a_tenant_did_not_use_is_not_saved() -> None:
    made = Made()
    made.offer(TWO)
    for _ in range(2000):
        made.offer(ONE)
    for _ in range(100):
        made.run()
    for _ in range(200):
        made.offer(TWO)
    mixed = [tenants_of(made.run()).count(TWO) for _ in range(10)]
    assert sum(mixed) == pytest.approx(10 * LIMIT / 2, abs=LIMIT / 2)


def test_time_counts_and_not_requests() -> None:
    # A row of tenant TWO costs four times as much, as a longer text does.
    made = Made(batch_s)
    for _ in range(400):
        made.offer(ONE, row_load=1.0)
        made.offer(TWO, row_load=4.0)
    ran = [tenant for _ in range(40) for tenant in tenants_of(made.run())]
    assert ran.count(ONE) == pytest.approx(4 * ran.count(TWO), rel=0.1)


def test_measured_time_replaces_the_expected_one() -> None:
    # Rows of different groups run apart, and those of TWO take ten times as long as expected.
    made = Made(actual_s=lambda batch: 0.100 if batch.slices[0].entry.tenant == TWO else 0.010)
    for _ in range(800):
        made.offer(ONE, group="fast")
        made.offer(TWO, group="slow")
    for _ in range(80):
        made.run()
    assert made.used_s[ONE] == pytest.approx(made.used_s[TWO], abs=0.1)


def test_a_priority_comes_first_and_does_not_starve_the_others() -> None:
    made = Made()
    for _ in range(200):
        made.offer(ONE, priority=1)
    made.offer(TWO, priority=9)
    runs = [TWO in tenants_of(made.run()) for _ in range(OLDEST_LEADS_EVERY)]
    assert runs.index(True) > 0
    assert any(runs)


def test_sharing_ends_when_one_tenant_is_left() -> None:
    made = Made()
    made.offer(ONE)
    made.offer(TWO)
    while made.run():
        pass
    made.now += 2 * ACTIVE_S
    for _ in range(3):
        made.offer(ONE)
    made.run()
    assert made.queue._waiting.shares is None
    made.offer(TWO)
    assert tenants_of(made.run()) == [TWO]


def test_a_flood_fills_its_own_part_of_the_queue_alone() -> None:
    made = Made(queue_rows=100)
    made.offer(TWO)
    made.run()
    for _ in range(50):
        made.offer(ONE)
    with pytest.raises(QueueFull, match="the part of the queue that is for your key is full: 50 rows wait"):
        made.offer(ONE)
    with pytest.raises(QueueFull) as refused:
        made.queue.refuse_early(ONE, 1)
    # In full batches, of which half are for this tenant.
    assert refused.value.retry_after_s == pytest.approx(2 * flat_s(8) / LIMIT)
    for _ in range(50):
        made.queue.refuse_early(TWO, 1)
        made.offer(TWO)
    made.queue.refuse_early(THREE, 1)
    made.offer(THREE, rows=8)


def test_bytes_are_bounded_by_tenant_too() -> None:
    made = Made()
    made.queue.limits.queue_bytes = 1000
    made.offer(TWO)
    made.offer(ONE, nbytes=400)
    with pytest.raises(QueueFull, match="400 bytes wait and 500 may"):
        made.offer(ONE, nbytes=200)
    made.offer(TWO, nbytes=400)


def test_a_deadline_is_judged_by_what_runs_before_it_and_not_by_the_flood() -> None:
    made = Made()
    made.offer(TWO)
    made.run()
    for _ in range(1000):
        made.offer(ONE, priority=1)
    made.offer(TWO, priority=1, deadline=made.now + 0.030)
    with pytest.raises(DeadlineExceeded):
        made.offer(ONE, priority=2, deadline=made.now + 0.030)
    assert TWO in tenants_of(made.run())


@given(st.integers(0, 2**32))
def test_tenants_that_always_have_work_get_their_shares_of_the_time(seed: int) -> None:
    choose = random.Random(seed)
    shares = {tenant: choose.choice([0.5, 1.0, 2.0, 5.0]) for tenant in range(choose.randint(2, 5))}
    noise = choose.random()
    made = Made(batch_s, lambda batch: batch_s(batch.load) * (1 + noise * choose.random()))
    rows = {tenant: choose.randint(1, 12) for tenant in shares}
    pending = dict.fromkeys(shares, 0)
    for _ in range(200):
        for tenant, share in shares.items():
            while pending[tenant] < 3 * LIMIT:
                made.offer(tenant, rows[tenant], share, group=choose.choice("ab"))
                pending[tenant] += rows[tenant]
        for entry in made.run():
            pending[entry.tenant] -= rows[entry.tenant]
    clocks = [made.used_s.get(tenant, 0.0) / share for tenant, share in shares.items()]
    # Nobody is ahead by more than a few batches.
    assert max(clocks) - min(clocks) <= 4 * 2 * batch_s(LIMIT) / min(shares.values()), (shares, rows)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 20), st.sampled_from("ab"), st.booleans()), max_size=60
    )
)
def test_an_instance_is_idle_only_if_nothing_waits_and_everything_ends_once(
    offers: list[tuple[int, int, str, bool]],
) -> None:
    made = Made()
    offered: dict[int, int] = {}
    ran: dict[int, int] = {}

    def run() -> None:
        before = made.queue.rows
        taken = made.queue.take(made.now, made.device)
        assert bool(taken.slices) == (before > 0)
        assert not taken.drops
        for each in taken.slices:
            ran[each.entry.id] = ran.get(each.entry.id, 0) + each.rows
        assert sum(each.rows for each in taken.slices) <= LIMIT or len(taken.slices) == 1
        made.now += 0.3

    for tenant, rows, group, runs in offers:
        offered[made.offer(tenant, rows, group=group, priority=1 + tenant % 2)] = rows
        if runs:
            run()
    for _ in range(100 * len(offers)):
        if not made.queue.rows:
            break
        run()
    assert ran == offered
    assert made.queue.load == 0
    shares = made.queue._waiting.shares
    for number in shares.numbers() if shares is not None else ():
        own = shares.entries_of(number) if shares is not None else None
        assert own is not None
        assert (own.count, own.small_load, own.large_load, own.nbytes, own.groups) == (0, 0.0, 0.0, 0, {})


@settings(max_examples=30)
@given(st.integers(2, 6), st.integers(0, 2**32))
def test_nobody_starves(tenants: int, seed: int) -> None:
    choose = random.Random(seed)
    made = Made()
    for tenant in range(tenants):
        for _ in range(200):
            made.offer(tenant, priority=choose.randint(1, 9))
    marked = made.offer(tenants, priority=9, share=1.0)
    for _ in range(OLDEST_LEADS_EVERY * (tenants + 1)):
        if marked in [entry.id for entry in made.run()]:
            return
        for tenant in range(tenants):
            for _ in range(LIMIT):
                made.offer(tenant, priority=1)
    pytest.fail("the entry still waits")


def simulate(loads: dict[int, float], *, batch_time: Callable[[float], float], limit: int) -> Made:
    """Run tenants that send single rows at random, each at so many times half of what the instance runs."""
    choose = random.Random(1)
    made = Made(batch_time, limit=limit, queue_rows=int(limit * 5 / batch_time(limit)))
    best = limit / batch_time(limit)
    seconds = 1500 / (0.4 * best)
    arrivals: list[tuple[float, int]] = []
    for tenant, times in loads.items():
        moment = 0.0
        while moment < seconds:
            moment += choose.expovariate(times * best / 2)
            arrivals.append((moment, tenant))
    arrivals.sort()
    at = 0
    while at < len(arrivals):
        while at < len(arrivals) and arrivals[at][0] <= made.now:
            moment, tenant = arrivals[at]
            at += 1
            try:
                made.offer(tenant, at=moment)
            except QueueFull:
                assert loads[tenant] > 1, "only who asks for more than its share is refused"
        if not made.run() and at < len(arrivals):
            made.now = max(made.now, arrivals[at][0])
    return made


def p99(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


@pytest.mark.parametrize(
    ("batch_time", "limit"),
    [(batch_s, 32), (flat_s, 32), (lambda rows: 0.0005 + 0.002 * rows, 32)],
    ids=["sloped", "flat", "steep"],
)
def test_ten_times_its_share_costs_the_others_half_more_at_most(
    batch_time: Callable[[float], float], limit: int
) -> None:
    usual = simulate({ONE: 0.9, TWO: 0.8}, batch_time=batch_time, limit=limit)
    flooded = simulate({ONE: 10.0, TWO: 0.8}, batch_time=batch_time, limit=limit)
    alone = simulate({ONE: 10.0}, batch_time=batch_time, limit=limit)
    assert p99(flooded.waits_s[TWO]) <= 1.5 * p99(usual.waits_s[TWO])
    assert flooded.rows_run / flooded.now >= 0.95 * alone.rows_run / alone.now


def test_batches_stay_small_where_larger_ones_gain_little() -> None:
    assert fair_batch_rows(64, flat_s) == 64
    assert fair_batch_rows(64, lambda rows: 0.001 * rows) <= 4
    assert fair_batch_rows(64, lambda rows: 0.0) == 64, "nothing is measured yet"
    assert fair_batch_rows(1, batch_s) == 1
