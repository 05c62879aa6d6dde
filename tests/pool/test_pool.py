"""The pool with a fake model: every entry ends once, the guilty fail alone, the dead are replaced."""

from __future__ import annotations

import itertools
import math
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
import pytest
from inferpool.backends.base import LoadedModel
from inferpool.errors import DeadlineExceeded, Draining, InvalidInput, ModelFailed, NotReady, QueueFull
from inferpool.observe.metrics import Metrics
from inferpool.pool.buckets import BatchBuckets
from inferpool.pool.entry_queue import Limits
from inferpool.pool.instance import Instance
from inferpool.pool.latency_model import Measurement, Profile
from inferpool.pool.pool import RESTARTS_AT_MOST, Pool
from inferpool.pool.ports import Entry, Part, Result, VersionKey
from inferpool.tensors import Signature, Tensors, TensorSpec

from tests.chaos import inferpool_chaos as chaos

KEY = VersionKey("m", 1)


class Outbox:
    """Keeps results, and lets a test wait for them."""

    def __init__(self) -> None:
        self.results: queue.Queue[Result] = queue.Queue()
        self.puts = 0

    def put(self, results: Sequence[Result]) -> None:
        assert results
        self.puts += 1
        for result in results:
            self.results.put(result)

    def take(self, count: int) -> dict[int, Result]:
        """The next `count` results by entry; no entry has two."""
        found: dict[int, Result] = {}
        for _ in range(count):
            result = self.results.get(timeout=10)
            assert result.entry_id not in found
            found[result.entry_id] = result
        return found


class Held(LoadedModel):
    """The chaos model, which waits for `release` before each run and keeps what it was given."""

    signature = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("sum", "FP64", (-1,)),))

    def __init__(self) -> None:
        self.model = chaos.ChaosModel({})
        self.release = threading.Semaphore(0)
        self.running = threading.Semaphore(0)
        self.batches: list[int] = []

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        self.batches.append(len(inputs["x"]))
        self.running.release()
        assert self.release.acquire(timeout=10)
        return self.model.run(inputs)

    def close(self) -> None:
        pass


class Bench:
    """A pool of one instance over a held model."""

    def __init__(
        self,
        instances: int = 1,
        most_joined_bytes: float = math.inf,
        ladder: BatchBuckets | None = None,
        **limits: object,
    ) -> None:
        self.outbox = Outbox()
        self.model = Held()
        self.metrics = Metrics({})
        self._ids = itertools.count(1)
        fields = {"batch_rows": 8, "queue_rows": 100, "queue_bytes": 10**6} | limits
        self.pool = Pool(
            KEY,
            Limits(**fields),
            Profile([Measurement(1, 0.01, 100), Measurement(8, 0.02, 100)]),
            self.outbox,
            self.metrics,
            time.monotonic,
            batched=True,
            most_joined_bytes=most_joined_bytes,
            ladder=ladder,
        )
        for _ in range(instances):
            self.pool.start_instance(self.model, "cpu")

    def offer(self, *marks: float, **rest: object) -> Entry:
        """Offer an entry with a row for each mark, which is the row's first element."""
        rows = np.zeros((len(marks), 4), np.float32)
        rows[:, 0] = marks
        fields = {"group": None, "nbytes": rows.nbytes, "arrived": time.monotonic()} | rest
        entry = Entry(next(self._ids), KEY, {"x": rows}, len(rows), **fields)
        self.pool.offer(entry)
        return entry

    def busy(self) -> Entry:
        """Keep the instance busy with one row, so that what is offered next waits together."""
        entry = self.offer(7)
        assert self.model.running.acquire(timeout=10)
        return entry

    def go(self) -> None:
        """Let every run pass from here on."""
        self.model.release.release(10_000)


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**fields: object) -> Bench:
        made.append(Bench(**fields))
        return made[-1]

    yield make
    for item in made:
        item.go()
        item.pool.drain(10)


def check(entry: Entry, result: Result) -> None:
    assert result.error is None
    assert result.outputs is not None
    assert result.outputs["sum"].tolist() == chaos.expected(entry.inputs["x"]).tolist()


def test_what_waits_runs_together_and_is_answered_in_one_put(bench: Callable[..., Bench]) -> None:
    made = bench()
    first = made.busy()
    rest = [made.offer(number, number + 0.5) for number in range(4)]
    made.go()
    results = made.outbox.take(5)
    for entry in (first, *rest):
        check(entry, results[entry.id])
    assert made.model.batches == [1, 8]
    assert made.outbox.puts == 2


def test_whoever_has_an_answer_finds_it_counted(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench()
    seen: list[tuple[int, float]] = []

    def look() -> None:
        counted = sum(count.runs for count in made.pool.batches())
        seen.append((counted, made.metrics.value("batches_total", "m", "1", "cpu", "drained").value))

    reader = threading.Thread(target=look)

    def put(results: Sequence[Result]) -> None:
        reader.start()
        # As long as the instance is here it has counted nothing: whoever looks has to wait.
        reader.join(0.2)
        Outbox.put(made.outbox, results)

    monkeypatch.setattr(made.outbox, "put", put)
    made.busy()
    made.go()
    made.outbox.take(1)
    reader.join(10)
    assert seen == [(1, 1)]


def test_what_cannot_be_counted_is_answered_and_not_run_again(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(BatchBuckets):
        def padded(self, rows: int) -> int:
            raise IndexError("no such rung")

    made = bench(ladder=Broken([1, 2, 4, 8]))
    made.busy()
    made.go()
    assert made.outbox.take(1)
    made.offer(1)
    assert made.outbox.take(1)
    assert made.pool.drain(10)
    assert made.model.batches == [1, 1]
    assert made.outbox.results.empty()
    assert [line.message for line in caplog.records] == ["what a batch of m/1 took could not be kept"] * 2


def test_only_the_guilty_of_a_batch_fail(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.busy()
    entries = [made.offer(chaos.RAISE if number in (2, 5) else number) for number in range(8)]
    made.go()
    results = made.outbox.take(9)
    for number, entry in enumerate(entries):
        if number in (2, 5):
            assert isinstance(results[entry.id].error, ModelFailed)
        else:
            check(entry, results[entry.id])


def test_wrong_rows_fail_their_batch_and_turn_batching_off(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.busy()
    large = made.offer(*range(20))
    bad = [made.offer(chaos.WRONG_ROWS), made.offer(1)]
    made.go()
    results = made.outbox.take(4)
    assert all(isinstance(results[entry.id].error, ModelFailed) for entry in (*bad, large))
    assert not made.pool.batched
    assert "shape [3] for 2 rows" in made.pool.wrong_rows
    after = [made.offer(2), made.offer(3, 4)]
    results = made.outbox.take(2)
    for entry in after:
        check(entry, results[entry.id])


def test_a_large_request_is_rejoined_in_order_whoever_runs_its_pieces(bench: Callable[..., Bench]) -> None:
    made = bench(instances=3)
    entry = made.offer(*range(1000))
    made.go()
    result = made.outbox.take(1)[entry.id]
    check(entry, result)
    assert max(made.model.batches) == 4
    assert made.pool.waiting() == (0, 0.0, 0.0)
    assert not made.pool._assemblies.ids()


def test_a_piece_that_fails_fails_its_request_once_and_stops_the_rest(bench: Callable[..., Bench]) -> None:
    made = bench()
    marks = [0.0] * 1000
    marks[20] = chaos.RAISE
    entry = made.offer(*marks)
    other = made.offer(1)
    made.go()
    results = made.outbox.take(2)
    assert isinstance(results[entry.id].error, ModelFailed)
    check(other, results[other.id])
    assert len(made.model.batches) < 10
    assert made.outbox.results.empty()


def test_a_thread_that_dies_is_replaced_and_its_entries_run_once_more(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.busy()
    entries = [made.offer(number) for number in range(3)]
    deadly = made.offer(chaos.DIE)
    made.go()
    results = made.outbox.take(5)
    for entry in entries:
        check(entry, results[entry.id])
    assert isinstance(results[deadly.id].error, ModelFailed)
    assert [item.state for item in made.pool.instances()] == ["ready"]
    after = made.offer(5)
    check(after, made.outbox.take(1)[after.id])


def test_an_instance_that_dies_too_often_stays_lost_and_the_pool_says_so(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.go()
    deadly = 0
    while any(item.state == "ready" for item in made.pool.instances()):
        try:
            entry = made.offer(chaos.DIE)
        except NotReady:
            break
        deadly += 1
        error = made.outbox.take(1)[entry.id].error
        assert isinstance(error, ModelFailed | NotReady)
    assert deadly <= RESTARTS_AT_MOST
    assert [item.state for item in made.pool.instances()] == ["lost"]
    with pytest.raises(NotReady):
        made.offer(1)


def test_a_cancelled_entry_never_runs_and_is_reported_once(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.busy()
    gone, stays = made.offer(1), made.offer(2)
    made.pool.cancel(gone.id, "disconnected")
    made.pool.cancel(gone.id, "disconnected")
    made.go()
    results = made.outbox.take(3)
    check(stays, results[stays.id])
    assert results[gone.id].error is not None
    assert made.model.batches == [1, 1]
    dropped = made.metrics.value("dropped_entries_total", "m", "1", "disconnected")
    assert dropped.value == 1


def test_an_entry_whose_deadline_passes_while_it_waits_never_runs(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.busy()
    late = made.offer(1, deadline=time.monotonic() + 0.6)
    while time.monotonic() < late.deadline:
        threading.Event().wait(late.deadline - time.monotonic())
    made.go()
    results = made.outbox.take(2)
    assert isinstance(results[late.id].error, DeadlineExceeded)
    assert made.model.batches == [1]


def test_refusals_are_raised_at_the_door(bench: Callable[..., Bench]) -> None:
    made = bench(queue_rows=8)
    made.busy()
    made.offer(*range(8))
    with pytest.raises(QueueFull) as refusal:
        made.offer(1)
    assert refusal.value.retry_after_s > 0
    with pytest.raises(QueueFull):
        made.pool.refuse_early()
    with pytest.raises(DeadlineExceeded):
        made.offer(1, deadline=time.monotonic() + 0.001)


def test_what_may_wait_follows_what_was_measured_last(bench: Callable[..., Bench]) -> None:
    """A machine that has become slower works off less in the time that may be waited."""
    made = bench(instances=2, queue_s=0.5, least_rows=3)
    assert made.pool.limits.queue_rows == 2 * 8 * 25, "two batches of eight rows in 20 ms"
    for _ in range(200):
        made.pool.profile.observe(8, 0.1)
    entry = made.busy()
    made.go()
    made.outbox.take(1)
    assert 2 * 8 * 5 <= made.pool.limits.queue_rows < 2 * 8 * 6
    for _ in range(200):
        made.pool.profile.observe(8, 30)
    made.offer(1)
    made.go()
    assert entry.id not in made.outbox.take(1)
    assert made.pool.limits.queue_rows == 2 * 8, "a batch for each, however long it takes"


def test_drain_finishes_what_was_accepted_and_takes_no_more(bench: Callable[..., Bench]) -> None:
    made = bench(delay_s=100.0)
    entries = [made.offer(number) for number in range(3)]
    made.go()
    assert made.pool.drain(10)
    results = made.outbox.take(3)
    for entry in entries:
        check(entry, results[entry.id])
    with pytest.raises(Draining):
        made.offer(1)


def test_what_a_drain_cannot_finish_is_answered(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.busy()
    waiting = made.offer(1)
    assert not made.pool.drain(0.05)
    assert isinstance(made.outbox.take(1)[waiting.id].error, Draining)


def test_an_idle_pool_does_not_run(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.go()
    made.offer(1)
    made.outbox.take(1)
    before = time.process_time()
    threading.Event().wait(0.3)
    assert time.process_time() - before < 0.05


def test_random_work_from_many_threads_is_answered_once_each_and_rightly(bench: Callable[..., Bench]) -> None:
    made = bench(instances=2, queue_rows=100_000)
    made.go()
    offered: dict[int, tuple[Entry, bool]] = {}
    lock = threading.Lock()

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(300):
            marks = rng.integers(0, 100, rng.choice([1, 2, 5, 30])).astype(float)
            poisoned = bool(rng.random() < 0.05)
            if poisoned:
                marks[0] = chaos.RAISE
            with lock:
                entry = made.offer(*marks, priority=int(rng.integers(1, 4)), deadline=math.inf)
                offered[entry.id] = (entry, poisoned)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = made.outbox.take(len(offered))
    for number, (entry, poisoned) in offered.items():
        if poisoned:
            assert isinstance(results[number].error, ModelFailed)
        else:
            check(entry, results[number])
    assert made.outbox.results.empty()


def test_a_piece_that_kills_its_thread_is_retried_once_whatever_the_others_do(
    bench: Callable[..., Bench],
) -> None:
    made = bench(instances=2)
    marks = [0.0] * 400
    marks[0] = chaos.DIE
    entry = made.offer(*marks)
    made.go()
    assert isinstance(made.outbox.take(1)[entry.id].error, ModelFailed)
    after = [made.offer(number) for number in range(4)]
    results = made.outbox.take(4)
    for item in after:
        check(item, results[item.id])
    assert [item.state for item in made.pool.instances()] == ["ready", "ready"]


def test_parts_that_cannot_be_joined_fail_their_request_once(bench: Callable[..., Bench]) -> None:
    made = bench()
    widths = itertools.count(1)
    made.model.model.run = lambda inputs: {"sum": np.zeros((len(inputs["x"]), next(widths)))}  # type: ignore[method-assign]
    entry = made.offer(*range(20))
    made.go()
    assert isinstance(made.outbox.take(1)[entry.id].error, ModelFailed)
    assert [item.state for item in made.pool.instances()] == ["ready"]


@pytest.mark.parametrize(("most", "error"), [(math.inf, ModelFailed), (10**9, InvalidInput)])
def test_parts_that_no_memory_holds_together_end_their_request_alone(
    bench: Callable[..., Bench], most: float, error: type[Exception]
) -> None:
    """Each part is small, and joined they are not: one of them is long, and all become as long as it."""
    made = bench(most_joined_bytes=most)
    made.busy()

    def run(inputs: Tensors) -> Tensors:
        long = inputs["x"][0, 0] == 1  # a view of one number, so that it takes no memory itself
        return {"sum": np.broadcast_to(np.float64(1), (len(inputs["x"]), 2**50 if long else 1))}

    made.model.model.run = run  # type: ignore[method-assign]
    rows = [{"x": np.full((1, 4), mark, np.float32)} for mark in (1, 2)]
    parts = tuple(
        Part(Entry(100 + n, KEY, row, 1, n, 16, time.monotonic()), [n]) for n, row in enumerate(rows)
    )
    made.pool.offer(Entry(99, KEY, {}, 2, 0, 32, time.monotonic(), parts=parts))
    neighbour = made.offer(3)
    made.go()
    results = made.outbox.take(3)
    assert isinstance(results[99].error, error)
    assert results[neighbour.id].error is None
    after = made.offer(3)
    assert made.outbox.take(1)[after.id].error is None
    assert [item.state for item in made.pool.instances()] == ["ready"]


def in_parts(made: Bench, entry_id: int, marks: Sequence[Sequence[float]], deadline: float) -> Entry:
    """Offer an entry whose parts have a row for each of their marks."""
    now = time.monotonic()
    parts, start = [], 0
    for number, part in enumerate(marks, entry_id + 1):
        rows = np.zeros((len(part), 4), np.float32)
        rows[:, 0] = part
        entry = Entry(number, KEY, {"x": rows}, len(rows), None, rows.nbytes, now, deadline)
        parts.append(Part(entry, range(start, start + len(rows))))
        start += len(rows)
    whole = Entry(entry_id, KEY, {}, start, None, 16 * start, now, deadline, parts=tuple(parts))
    made.pool.offer(whole)
    return whole


@pytest.mark.parametrize("rows", [1, 10])
def test_an_entry_in_parts_is_dropped_once(bench: Callable[..., Bench], rows: int) -> None:
    """However many of its parts have waited too long, and whether they are larger than a batch or not."""
    made = bench()
    first = made.busy()
    whole = in_parts(made, 100, [[1.0] * rows] * 4, time.monotonic() + 0.6)
    last = made.offer(5)
    while time.monotonic() <= whole.deadline:
        pass
    made.go()
    results = made.outbox.take(3)
    assert results.keys() == {first.id, whole.id, last.id}
    assert isinstance(results[whole.id].error, DeadlineExceeded)
    assert made.pool.drain(10)
    assert made.outbox.results.empty(), "no result of a part is seen"
    assert dropped(made, "deadline") == 1


@pytest.mark.parametrize("rows", [5, 10])
def test_parts_that_run_when_their_entry_is_dropped_answer_nobody(
    bench: Callable[..., Bench], rows: int
) -> None:
    """The client leaves while the first part runs and the others wait."""
    made = bench()
    whole = in_parts(made, 100, [[1.0] * rows] * 4, math.inf)
    assert made.model.running.acquire(timeout=10)
    made.pool.cancel(whole.id, "disconnected")
    last = made.offer(5)
    made.go()
    assert made.outbox.take(2).keys() == {whole.id, last.id}
    assert made.pool.drain(10)
    assert made.outbox.results.empty(), "no result of a part is seen"
    assert dropped(made, "disconnected") == 1


def dropped(made: Bench, reason: str) -> float:
    """What is counted as dropped for `reason`."""
    text = made.metrics.render("")[0].decode()
    found = re.search(rf'^inferpool_dropped_entries_total\{{.*reason="{reason}".*\}} (\S+)$', text, re.M)
    assert found is not None
    return float(found[1])


def test_a_cancelled_retry_is_not_run(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.busy()
    deadly, gone = made.offer(chaos.DIE), made.offer(3)
    made.model.release.release(2)  # the busy run, and the one that dies
    assert made.model.running.acquire(timeout=10)
    assert made.model.running.acquire(timeout=10)  # the deadly entry's second run, by itself
    made.pool.cancel(gone.id, "disconnected")
    made.go()
    results = made.outbox.take(3)
    assert isinstance(results[deadly.id].error, ModelFailed)
    assert results[gone.id].outputs is None
    assert made.model.batches == [1, 2, 1]


class Bell:
    """Stands before the lock that an instance waits for, and rings it later."""

    def __init__(self, instance: Instance) -> None:
        self.instance, self.lock = instance, instance._wake
        self.rung = False
        instance._wake = cast("threading.Lock", self)

    def release(self) -> None:
        assert not self.rung
        self.rung = True

    def pass_on(self) -> None:
        self.instance._wake = self.lock
        if self.rung:
            self.lock.release()


def test_a_second_instance_is_woken_only_for_what_the_first_cannot_take(bench: Callable[..., Bench]) -> None:
    made = bench(instances=3, batch_rows=4)
    deadline = time.monotonic() + 10
    while len(made.pool._idle) < 3:
        assert time.monotonic() < deadline
    bells = [Bell(instance) for instance in made.pool._idle]
    entries = [made.offer(mark) for mark in range(4)]
    assert sum(bell.rung for bell in bells) == 1, "one batch takes them all"
    entries.append(made.offer(4))
    assert sum(bell.rung for bell in bells) == 2
    made.go()
    for bell in bells:
        bell.pass_on()
    results = made.outbox.take(5)
    for entry in entries:
        check(entry, results[entry.id])
