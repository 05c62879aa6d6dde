"""The queue's policy as pure maths: a state machine of its invariants, and each rule by itself."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from inferpool.errors import DeadlineExceeded, QueueFull
from inferpool.pool.admission import Limits
from inferpool.pool.batch import RowSlice
from inferpool.pool.device_accounts import ACTIVE_S, DeviceAccount
from inferpool.pool.entry_queue import OLDEST_LEADS_EVERY, Queue
from inferpool.pool.ordered_queue import QueueSlot
from inferpool.pool.ports import LOWEST_PRIORITY, Entry, VersionKey

KEY = VersionKey("m", 1)
LIMIT = 8


def batch_s(rows: float) -> float:
    return 0.010 + 0.001 * rows


def entry(number: int, rows: int = 1, *, now: float = 0.0, **rest: Any) -> Entry:
    fields: dict[str, Any] = {"group": "a", "nbytes": rows * 4} | rest
    return Entry(number, KEY, {"x": np.zeros((rows, 1))}, rows, arrived=now, **fields)


def queue_of(*entries: Entry, **limits: Any) -> Queue:
    queue = Queue(
        Limits(**({"batch_rows": LIMIT, "queue_rows": 1000, "queue_bytes": 10**6} | limits)), batch_s
    )
    for item in entries:
        queue.offer(item, item.arrived)
    return queue


def taken(queue: Queue, now: float = 0.0) -> list[int]:
    return [each.entry.id for each in queue.take(now, DeviceAccount()).slices]


SLOTS = st.builds(
    lambda priority, low_band, deadline, serial: QueueSlot(
        entry(1, priority=priority, deadline=deadline), 0, False, low_band, serial
    ),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from((1.0, 2.0, math.inf)),
    st.integers(1, 4),
)


@given(SLOTS, SLOTS)
def test_slots_are_compared_as_their_orders_are(one: QueueSlot, other: QueueSlot) -> None:
    assert one.precedes(other) == (one.order < other.order)


class QueueMachine(RuleBasedStateMachine):
    """Offers, removes and takes in any order; every entry is accounted for at every moment."""

    TENANTS = 1

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue(Limits(LIMIT, 60, 10_000), batch_s)
        self.now = 0.0
        self.number = 0
        self.waiting: dict[int, Entry] = {}
        self.served: dict[int, int] = {}
        self.ended: dict[int, str] = {}
        self.batches = 0

    @rule(
        rows=st.integers(0, 30),
        group=st.sampled_from("ab"),
        priority=st.sampled_from([1, 2, 3, LOWEST_PRIORITY]),
        timeout=st.one_of(st.none(), st.floats(0.0, 0.3)),
        tenant=st.integers(0, 5),
    )
    def offer(self, rows: int, group: str, priority: int, timeout: float | None, tenant: int) -> None:
        self.number += 1
        deadline = math.inf if timeout is None else self.now + timeout
        item = entry(self.number, rows, now=self.now, group=group, priority=priority, deadline=deadline)
        item.tenant = tenant % self.TENANTS
        item.share = 1.0 + item.tenant
        before = (len(self.queue), self.queue.rows, self.queue.nbytes)
        try:
            self.queue.offer(item, self.now, [self.now])
        except (QueueFull, DeadlineExceeded):
            assert (len(self.queue), self.queue.rows, self.queue.nbytes) == before
        else:
            self.waiting[item.id] = item
            self.served[item.id] = 0

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.waiting)))
        assert self.queue.remove(number) is self.waiting.pop(number)
        self.end(number, "disconnected")
        assert self.queue.remove(number) is None

    @rule(passes=st.floats(0.0, 0.2))
    def time_passes(self, passes: float) -> None:
        self.now += passes

    @rule()
    def take(self) -> None:
        before = dict(self.waiting)
        take = self.queue.take(self.now, DeviceAccount())
        for drop in take.drops:
            assert drop.reason == "deadline"
            assert drop.entry.deadline < self.now + batch_s(min(drop.entry.rows, LIMIT))
            self.end(self.waiting.pop(drop.entry.id).id, "deadline")
        assert bool(take.slices) == bool(before.keys() - {drop.entry.id for drop in take.drops})
        if not take.slices:
            return
        self.batches += 1
        assert take.rows <= LIMIT
        assert take.reason in ("full", "drained", "deadline", "piece")
        assert len({each.entry.group for each in take.slices}) == 1
        assert len(take.slices) == 1 or all(each.has_all_rows for each in take.slices)
        for each in take.slices:
            assert each.entry.deadline >= self.now + batch_s(take.rows)
            assert each.start == self.served[each.entry.id], "slices leave in order, none twice"
            self.served[each.entry.id] = each.stop
            if each.stop == each.entry.rows:
                self.end(self.waiting.pop(each.entry.id).id, "served")
        self.check_order(take.slices, before)

    def check_order(self, slices: list[RowSlice], before: dict[int, Entry]) -> None:
        """No entry that was left behind comes before a taken one of its tenant, group and priority."""
        left = [item for item in before.values() if item.id in self.waiting and item.rows <= LIMIT]
        by_age = (self.batches - 1) % OLDEST_LEADS_EVERY == OLDEST_LEADS_EVERY - 1
        for each in slices[1 if by_age else 0 :]:
            for item in left:
                if (item.tenant, item.group, item.priority) == (
                    each.entry.tenant,
                    each.entry.group,
                    each.entry.priority,
                ) and each.has_all_rows:
                    assert (each.entry.deadline, each.entry.id) < (item.deadline, item.id)

    def end(self, number: int, how: str) -> None:
        assert number not in self.ended, "every entry ends once"
        self.ended[number] = how

    @invariant()
    def books_balance(self) -> None:
        assert len(self.queue) == len(self.waiting)
        left = {number: max(1, item.rows - self.served[number]) for number, item in self.waiting.items()}
        assert self.queue.rows == sum(left.values())
        assert self.queue.nbytes == sum(item.nbytes for item in self.waiting.values())
        assert self.waiting.keys() | self.ended.keys() >= self.served.keys()
        wakeup = self.queue.next_wakeup(self.now)
        assert wakeup is None or wakeup >= self.now

    def teardown(self) -> None:
        """Everything that was accepted comes out in the end."""
        for _ in range(1000):
            if not self.waiting:
                break
            self.take()
        assert not self.waiting
        assert not len(self.queue)
        assert self.queue.rows == self.queue.nbytes == 0


class SharedQueueMachine(QueueMachine):
    """The same with several tenants, which come and go."""

    TENANTS = 3

    @rule(passes=st.floats(0.0, 2 * ACTIVE_S))
    def tenants_leave(self, passes: float) -> None:
        self.now += passes

    @invariant()
    def shares_balance(self) -> None:
        shares = self.queue._waiting.shares
        if shares is None:
            assert len({item.tenant for item in self.waiting.values()}) <= 1
            return
        tenants = [shares.entries_of(number) for number in shares.numbers()]
        assert sum(each.count for each in tenants if each) == len(self.queue)
        assert sum(each.nbytes for each in tenants if each) == self.queue.nbytes
        load = sum(each.small_load + each.large_load for each in tenants if each)
        assert load == pytest.approx(self.queue.load)
        assert shares.total_share == pytest.approx(sum(each.share for each in tenants if each))


TestSharedQueueMachine = SharedQueueMachine.TestCase
TestSharedQueueMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_batch_takes_what_waits_up_to_its_rows() -> None:
    queue = queue_of(entry(1, 3), entry(2, 3), entry(3, 3))
    take = queue.take(0.0, DeviceAccount())
    assert [each.entry.id for each in take.slices] == [1, 2]
    assert take.reason == "full"
    assert queue.take(0.0, DeviceAccount()).reason == "drained"


def test_entries_of_different_row_shapes_never_share_a_batch() -> None:
    queue = queue_of(entry(1, group="a"), entry(2, group="b"), entry(3, group="a"))
    assert taken(queue) == [1, 3]
    assert taken(queue) == [2]


def test_the_earliest_deadline_goes_first_within_a_priority() -> None:
    queue = queue_of(
        entry(1, 8),
        entry(2, 8, deadline=9.0),
        entry(3, 8, deadline=5.0),
        entry(4, 8, deadline=9.5, priority=1),
    )
    assert [taken(queue) for _ in range(3)] == [[4], [3], [2]]


def test_every_fourth_batch_is_led_by_the_entry_that_has_waited_longest() -> None:
    queue = queue_of(entry(1, 8, priority=9))
    order = []
    for number in range(2, 12):
        queue.offer(entry(number, 8, priority=1), 0.0)
        order += taken(queue)
    assert order.index(1) == OLDEST_LEADS_EVERY - 1


def test_a_large_entry_runs_in_slices_and_lets_others_go_between() -> None:
    queue = queue_of(entry(1, 20))
    first = queue.take(0.0, DeviceAccount()).slices
    assert [(each.start, each.stop) for each in first] == [(0, 4)]
    queue.offer(entry(2, 1), 0.0)
    assert taken(queue) == [2]
    for start in (4, 8, 12, 16):
        slices = queue.take(0.0, DeviceAccount()).slices
        assert [(each.start, each.stop) for each in slices] == [(start, start + 4)]
    assert not queue.take(0.0, DeviceAccount()).slices
    assert not queue.nbytes


def test_a_large_entry_does_not_fill_the_queue_for_small_ones() -> None:
    queue = queue_of(entry(1, 10_000), queue_rows=16)
    queue.offer(entry(2, 8), 0.0)
    queue.offer(entry(3, 8), 0.0)
    with pytest.raises(QueueFull):
        queue.offer(entry(4, 1), 0.0)
    with pytest.raises(QueueFull):
        queue.offer(entry(5, 17), 0.0)


def test_a_full_queue_says_when_there_will_be_room() -> None:
    queue = queue_of(*(entry(number, 8) for number in range(10)), queue_rows=80)
    with pytest.raises(QueueFull) as refusal:
        queue.offer(entry(99, 8), 0.0, [0.0, 0.0])
    assert refusal.value.retry_after_s == pytest.approx(batch_s(8) / 2)


def test_bytes_are_bounded_apart_from_rows() -> None:
    queue = queue_of(entry(1, nbytes=900), queue_bytes=1000)
    with pytest.raises(QueueFull, match="900 bytes"):
        queue.offer(entry(2, nbytes=200), 0.0)


def test_what_waits_in_the_background_takes_no_room_from_requests() -> None:
    queue = queue_of(
        entry(1, 8, nbytes=45, priority=LOWEST_PRIORITY),
        entry(2, 8, nbytes=45, priority=LOWEST_PRIORITY),
        queue_rows=16,
        queue_bytes=100,
    )
    with pytest.raises(QueueFull):
        queue.offer(entry(3, priority=LOWEST_PRIORITY), 0.0)
    queue.offer(entry(4, 8, nbytes=60), 0.0)
    queue.offer(entry(5, 8, nbytes=40), 0.0)
    with pytest.raises(QueueFull):
        queue.offer(entry(6), 0.0)
    assert [taken(queue) for _ in range(4)] == [[4], [5], [1], [2]]


def test_an_empty_queue_takes_an_entry_of_any_size() -> None:
    queue = queue_of(entry(1, 8, nbytes=10**9), queue_rows=1, queue_bytes=1)
    assert taken(queue) == [1]


def test_rounding_errors_of_loads_do_not_refuse_a_request_when_nothing_else_waits() -> None:
    queue = queue_of(queue_rows=40)
    for number, (rows, row_load) in enumerate(((1, 0.1), (1, 0.2), (1, 0.3), (100, 0.1), (60, 0.13)), 1):
        queue.offer(entry(number, rows, row_load=row_load), 0.0)
    while taken(queue):
        pass
    assert queue.load == 0
    queue.offer(entry(6, 1000), 0.0)


def test_rounding_errors_of_large_loads_are_gone_while_a_small_entry_waits() -> None:
    queue = queue_of(queue_rows=40)
    for number, (rows, row_load) in enumerate(((100, 0.1), (60, 0.13), (70, 0.17)), 1):
        queue.offer(entry(number, rows, row_load=row_load), 0.0)
    queue.offer(entry(4), 0.0)
    for number in (1, 2, 3):
        queue.remove(number)
    assert queue.load == 1
    queue.offer(entry(5, 1000), 0.0)


def test_a_row_that_costs_more_than_a_batch_runs_alone_behind_those_that_cost_less() -> None:
    costly = [entry(number, group="large", row_load=20.0) for number in (1, 2)]
    small = [entry(number, group="small") for number in (3, 4)]
    queue = queue_of(*costly, *small)
    assert [taken(queue), taken(queue), taken(queue)] == [[3, 4], [1], [2]]


def test_a_costly_row_is_not_overtaken_for_ever() -> None:
    queue = queue_of(entry(1, group="large", row_load=20.0), *(entry(n, rows=LIMIT) for n in range(2, 9)))
    assert [taken(queue) for _ in range(OLDEST_LEADS_EVERY)][-1] == [1]


def test_a_costly_row_fills_the_queue_for_its_own_kind_only() -> None:
    queue = queue_of(entry(1, group="large", row_load=90.0), queue_rows=100)
    with pytest.raises(QueueFull):
        queue.offer(entry(2, group="large", row_load=20.0), 0.0)
    queue.offer(entry(3), 0.0)


def test_the_deadline_of_a_small_row_counts_the_costly_row_that_runs_but_none_that_waits() -> None:
    costly = [entry(number, group="large", row_load=200.0, deadline=1.5) for number in (1, 2, 3)]
    queue = queue_of(*costly)
    running_until = 0.210
    with pytest.raises(DeadlineExceeded):
        queue.offer(entry(4, deadline=0.1), 0.0, [running_until])
    queue.offer(entry(5, deadline=0.3), 0.0, [running_until])
    with pytest.raises(DeadlineExceeded):
        queue.offer(entry(6, group="large", row_load=200.0, deadline=1.6), 0.0, [running_until])


def test_rows_that_cost_less_than_one_fill_a_batch_by_their_cost() -> None:
    queue = queue_of(*(entry(number, row_load=0.25) for number in range(1, 41)))
    assert len(taken(queue)) == 4 * LIMIT


def test_bytes_bound_a_batch_of_large_rows_that_cost_little() -> None:
    queue = queue_of(*(entry(number, nbytes=1000) for number in range(1, 5)), batch_bytes=2500)
    assert [taken(queue), taken(queue)] == [[1, 2], [3, 4]]
    # A single entry runs however large it is.
    assert taken(queue_of(entry(1, nbytes=1000), batch_bytes=10)) == [1]


def test_a_deadline_that_cannot_be_met_is_refused_at_the_door() -> None:
    queue = queue_of(*(entry(number, 8) for number in range(10)))
    wait = 10 * batch_s(8)
    late = entry(98, 8, deadline=wait + 0.9 * batch_s(8), priority=9)
    with pytest.raises(DeadlineExceeded):
        queue.offer(late, 0.0, [0.0])
    queue.offer(entry(99, 8, deadline=wait + 1.1 * batch_s(8), priority=9), 0.0, [0.0])


def test_the_safety_factor_applies_to_what_waits_but_not_to_the_run_itself() -> None:
    limits = Limits(LIMIT, 1000, 10**6)
    careful = Queue(limits, batch_s, safety_factor=lambda: 1.5)
    for number in range(1, 11):
        careful.offer(entry(number, rows=LIMIT, priority=1), 0.0)
    waiting, own = 10 * batch_s(LIMIT), batch_s(1)
    with pytest.raises(DeadlineExceeded):
        careful.offer(entry(11, deadline=1.49 * waiting + own), 0.0)
    careful.offer(entry(12, deadline=1.51 * waiting + own), 0.0)
    Queue(limits, batch_s, safety_factor=lambda: 1.5).offer(entry(13, deadline=1.01 * own), 0.0)


def test_an_urgent_entry_is_not_refused_for_the_lax_ones_that_it_overtakes() -> None:
    queue = queue_of(*(entry(number, 8) for number in range(10)))
    queue.offer(entry(99, 8, deadline=1.5 * batch_s(8)), 0.0, [0.0])
    assert taken(queue) == [99]


def test_two_instances_halve_the_predicted_wait() -> None:
    queue = queue_of(*(entry(number, 8, deadline=100.0) for number in range(10)))
    deadline = 5.5 * batch_s(8) + batch_s(8)
    with pytest.raises(DeadlineExceeded):
        queue.offer(entry(98, 8, deadline=deadline, priority=9), 0.0, [0.0])
    queue.offer(entry(99, 8, deadline=deadline, priority=9), 0.0, [0.0, 0.0])


def test_an_expired_entry_is_dropped_once_and_never_taken() -> None:
    queue = queue_of(entry(1, deadline=1.0))
    take = queue.take(2.0, DeviceAccount())
    assert not take.slices
    assert [(drop.entry.id, drop.reason) for drop in take.drops] == [(1, "deadline")]
    assert not queue.take(2.0, DeviceAccount()).drops


def test_a_wrong_measurement_does_not_keep_everything_from_running() -> None:
    queue = Queue(Limits(LIMIT, 100, 10**6), lambda rows: 60.0)
    with pytest.raises(DeadlineExceeded):
        queue.offer(entry(1, deadline=1.0), 0.0, [0.0])
    queue.offer(entry(2, deadline=1.0), 0.0, [0.0], probe=True)
    assert taken(queue) == [2]
    with pytest.raises(DeadlineExceeded):
        queue.offer(entry(3, deadline=1.0), 0.0, [60.0], probe=True)


def test_an_entry_that_cannot_meet_its_deadline_any_more_does_not_lead_a_batch() -> None:
    """Nothing is late yet, but the first entry would be after its run."""
    queue = queue_of(entry(1, deadline=0.1), entry(2, deadline=9.0))
    take = queue.take(0.095, DeviceAccount())
    assert [each.entry.id for each in take.slices] == [2]
    assert [(drop.entry.id, drop.reason) for drop in take.drops] == [(1, "deadline")]


def test_an_entry_that_cannot_meet_its_deadline_any_more_is_left_out_of_a_batch() -> None:
    """The first entry leads with its higher priority, and the third one still fits behind it."""
    queue = queue_of(entry(1, priority=1), entry(2, deadline=0.1), entry(3))
    take = queue.take(0.095, DeviceAccount())
    assert [each.entry.id for each in take.slices] == [1, 3]
    assert [(drop.entry.id, drop.reason) for drop in take.drops] == [(2, "deadline")]


def test_a_deadline_in_the_past_is_refused_at_the_door() -> None:
    with pytest.raises(DeadlineExceeded, match="passed before"):
        queue_of().offer(entry(1, now=2.0, deadline=1.0), 2.0)


def test_a_large_entry_is_expected_to_run_its_slices_on_all_instances() -> None:
    """Five slices of four rows: two rounds on three instances."""
    needed = 2 * batch_s(4)
    with pytest.raises(DeadlineExceeded):
        queue_of().offer(entry(1, 20, deadline=0.99 * needed), 0.0, [0.0] * 3)
    queue_of().offer(entry(1, 20, deadline=1.01 * needed), 0.0, [0.0] * 3)


def test_a_batch_does_not_grow_past_what_its_tightest_deadline_allows() -> None:
    queue = queue_of(entry(1, 2, deadline=batch_s(4)), entry(2, 2), entry(3, 4))
    take = queue.take(0.0, DeviceAccount())
    assert [each.entry.id for each in take.slices] == [1, 2]
    assert take.reason == "deadline"


@given(st.integers(0, 100), st.integers(1, 4))
def test_the_work_that_waits_is_what_its_batches_take(count: int, instances: int) -> None:
    queue = queue_of(*map(entry, range(1, count + 1)))
    foreseen = queue.admission.wait_s(instances)
    batches = []
    while take := queue.take(0.0, DeviceAccount()).slices:
        batches.append(batch_s(len(take)))
    assert foreseen == pytest.approx(sum(batches) / instances)
    assert queue.admission.wait_s(instances) == 0.0


def test_a_delay_counts_from_the_first_entry() -> None:
    queue = queue_of(entry(1, now=1.0), delay_s=0.5)
    assert taken(queue, 1.1) == []
    queue.offer(entry(2, now=1.4), 1.4)
    assert queue.next_wakeup(1.4) == 1.5
    assert taken(queue, 1.5) == [1, 2]


def test_a_delay_ends_when_the_batch_is_full_or_a_deadline_would_pass() -> None:
    queue = queue_of(entry(1, 8), delay_s=9.0)
    assert taken(queue) == [1]
    queue = queue_of(entry(1, deadline=1.0), delay_s=9.0)
    wakeup = queue.next_wakeup(0.0)
    assert wakeup is not None
    assert wakeup < 1.0
    assert taken(queue, wakeup) == [1]


def test_entries_that_have_left_the_queue_are_not_kept_in_memory() -> None:
    """Their slots may stay in a heap until their deadlines, and their groups are the clients' choice."""
    queue = queue_of()
    left = []
    for number in range(2_000):
        item = entry(number, deadline=1e9, group=number)
        left.append(weakref.ref(item.inputs["x"]))
        queue.offer(item, 0.0)
        assert taken(queue) == [number]
    del item
    gc.collect()
    assert not [each for each in left if each() is not None]
    assert queue.next_wakeup(0.0) is None


def slots_in(queue: Queue) -> int:
    """How many slots are in memory."""
    return sum(type(each) is QueueSlot for each in gc.get_objects())


def test_dead_slots_are_swept_away() -> None:
    """Entries with later deadlines stay, in every order; those that were taken before are let go of."""
    queue = queue_of(entry(1, 8, deadline=1e9, priority=9), entry(2, 8, deadline=2e9, priority=9))
    before = slots_in(queue)
    for number in range(10, 4_010):
        queue.offer(entry(number, 8, deadline=1e8 + number % 7, priority=1 + number % 3), 0.0)
        assert queue.remove(number) is not None
    assert slots_in(queue) - before < 1_000
    assert [taken(queue), taken(queue)] == [[1], [2]]
