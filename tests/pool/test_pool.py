"""The pool with a fake model: every entry ends once, the guilty fail alone, dead instances are replaced."""

from __future__ import annotations

import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from inferpool.backends.base import LoadedModel
from inferpool.errors import (
    DeadlineExceeded,
    Draining,
    InvalidInput,
    ModelFailed,
    NotReady,
    QueueFull,
    RunTimeout,
)
from inferpool.gradient_names import Gradient
from inferpool.observe.metrics import Metrics
from inferpool.pool.admission import Limits
from inferpool.pool.audit import FIRST_AUDITS, Audit
from inferpool.pool.buckets import BatchBuckets, BucketedModel
from inferpool.pool.instance_set import MAX_RESTARTS
from inferpool.pool.latency_model import LatencyModel, Measurement
from inferpool.pool.padding import Padding
from inferpool.pool.pool import Pool
from inferpool.pool.ports import Entry, Part, Result, VersionKey
from inferpool.pool.run_limits import GRACE_S
from inferpool.pool.run_watcher import RunWatcher
from inferpool.pool.splitting import split_entry
from inferpool.tensors import Signature, Tensors, TensorSpec

from tests.chaos import inferpool_chaos as chaos
from tests.fake_gpu import FakeCard, FakeModel
from tests.server import wait_until

KEY = VersionKey("m", 1)


class Outbox:
    """Keeps results, and lets a test wait for them."""

    def __init__(self) -> None:
        self.results: queue.Queue[Result] = queue.Queue()
        self.unread: queue.Queue[int] = queue.Queue()
        self.puts = 0

    def put(self, results: Sequence[Result]) -> None:
        assert results
        self.puts += 1
        for result in results:
            self.results.put(result)

    def ended(self, entry_ids: Sequence[int]) -> None:
        assert entry_ids
        for entry_id in entry_ids:
            self.unread.put(entry_id)

    def take(self, count: int) -> dict[int, Result]:
        """The next `count` results by entry; no entry has two."""
        found: dict[int, Result] = {}
        for _ in range(count):
            result = self.results.get(timeout=60)
            assert result.entry_id not in found
            found[result.entry_id] = result
        return found


class Clock:
    """The system's clock, which a test can put forward."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


class HeldModel(LoadedModel):
    """The chaos model, which waits for `release` before each run and keeps the rows of each batch."""

    signature = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("sum", "FP64", (-1,)),))

    def __init__(self) -> None:
        self.model = chaos.ChaosModel({})
        self.release = threading.Semaphore(0)
        self.running = threading.Semaphore(0)
        self.batches: list[int] = []
        self.deadly = False
        self.deaths = 0
        self.lost_reason: str | None = None
        self.stoppable = False
        self.endless = math.nan
        self.run_s = 0.0
        self.stops: list[int] = []
        self._stopped: set[int] = set()

    def lost(self) -> str | None:
        return self.lost_reason

    def stop_run(self, thread: int) -> None:
        self.stops.append(thread)
        if self.stoppable:
            self._stopped.add(thread)

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        self.batches.append(len(inputs["x"]))
        self.running.release()
        self._stopped.discard(threading.get_ident())
        time.sleep(self.run_s)
        deadline = time.monotonic() + 60
        while self.endless in inputs["x"][:, 0] or not self.release.acquire(timeout=0.01):
            assert time.monotonic() < deadline
            if threading.get_ident() in self._stopped:
                raise RuntimeError("the run was stopped")
        if self.deadly:
            self.deaths += 1
            raise SystemExit
        if self.lost_reason is not None:
            raise RuntimeError(self.lost_reason)
        return self.model.run(inputs)

    def close(self) -> None:
        pass


class Bench:
    """A pool of one instance over a held model."""

    def __init__(
        self,
        instances: int = 1,
        max_joined_bytes: float = math.inf,
        buckets: BatchBuckets | None = None,
        padding: Padding | None = None,
        audit: Audit | None = None,
        forget_plan: Callable[[], None] | None = None,
        run_timeout_s: float = 0.0,
        on_hung: Callable[[VersionKey, str], None] | None = None,
        **limits: Any,
    ) -> None:
        self.outbox = Outbox()
        self.clock = Clock()
        self.model = HeldModel()
        self.metrics = Metrics({})
        self._ids = itertools.count(1)
        fields: dict[str, Any] = {"batch_rows": 8, "queue_rows": 100, "queue_bytes": 10**6} | limits
        self.pool = Pool(
            KEY,
            Limits(**fields),
            LatencyModel([Measurement(1, 0.01, 100), Measurement(8, 0.02, 100)]),
            self.outbox,
            self.metrics,
            self.clock,
            batched=True,
            padding=padding,
            max_joined_bytes=max_joined_bytes,
            buckets=buckets,
            audit=audit,
            forget_plan=forget_plan,
            watcher=RunWatcher(self.clock, run_timeout_s, on_hung),
        )
        for _ in range(instances):
            self.pool.start_instance(self.model, "cpu")

    def stops(self, reason: str) -> float:
        """How often batching was turned off for this reason."""
        return self.metrics.value("batching_stopped_total", *map(str, KEY), reason).value

    def audits(self) -> float:
        """How many audits have run."""
        return self.metrics.value("audits_total", *map(str, KEY)).value

    def entry(self, *marks: float, **rest: Any) -> Entry:
        """An entry with a row for each mark, which is the row's first element."""
        rows = np.zeros((len(marks), 4), np.float32)
        rows[:, 0] = marks
        fields: dict[str, Any] = {"group": None, "nbytes": rows.nbytes, "arrived": self.clock()} | rest
        return Entry(next(self._ids), KEY, {"x": rows}, len(rows), **fields)

    def offer(self, *marks: float, **rest: Any) -> Entry:
        """Offer an entry with a row for each mark."""
        entry = self.entry(*marks, **rest)
        self.pool.offer(entry)
        return entry

    def offer_parts(self, *marks: Sequence[float], **rest: Any) -> Entry:
        """Offer an entry of parts, each with a row for each of its marks."""
        parts, start = [], 0
        for part in marks:
            parts.append(Part(self.entry(*part, **rest), range(start, start + len(part))))
            start += len(part)
        entry = split_entry(next(self._ids), parts)
        self.pool.offer(entry)
        return entry

    def dropped(self, reason: str) -> float:
        """How many entries were counted as dropped for `reason`."""
        return self.metrics.value("dropped_entries_total", "m", "1", reason).value

    def ran(self) -> int:
        """How many batches have run."""
        return sum(count.runs for count in self.pool.batches())

    def busy_seconds(self) -> float:
        """How long instances have run batches, by the metrics."""
        self.pool.instances()
        return self.metrics.value("instance_busy_seconds_total", "m", "1", "cpu").value

    def busy(self) -> Entry:
        """Keep the instance busy with one row, so that what is offered next waits together."""
        entry = self.offer(7)
        assert self.model.running.acquire(timeout=60)
        return entry

    def go(self, runs: int = 10_000) -> None:
        """Let so many runs pass; by default every run from here on."""
        self.model.release.release(runs)


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**fields: Any) -> Bench:
        made.append(Bench(**fields))
        return made[-1]

    yield make
    for item in made:
        item.go()
        item.pool.drain(60)


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


def test_a_client_that_has_its_answer_finds_it_counted(
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
        # The instance counts the batch after this, so that the reader has to wait.
        reader.join(0.2)
        Outbox.put(made.outbox, results)

    monkeypatch.setattr(made.outbox, "put", put)
    made.busy()
    made.go()
    made.outbox.take(1)
    reader.join(60)
    assert seen == [(1, 1)]


def test_a_batch_that_cannot_be_counted_is_answered_and_not_run_again(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(BatchBuckets):
        def padded_rows(self, rows: int) -> int:
            raise IndexError("no such bucket")

    made = bench(buckets=Broken([1, 2, 4, 8]))
    made.busy()
    made.go()
    assert made.outbox.take(1)
    made.offer(1)
    assert made.outbox.take(1)
    assert made.pool.drain(60)
    assert made.model.batches == [1, 1]
    assert made.outbox.results.empty()
    assert [line.message for line in caplog.records] == [
        "the measurements of a batch of m/1 could not be kept"
    ] * 2


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


def test_after_wrong_rows_every_request_runs_alone_and_whole(bench: Callable[..., Bench]) -> None:
    """Those of the batch, those that wait, those that have run in part, and all that follow are right."""
    made = bench()
    made.busy()
    large = made.offer(*range(20))
    bad = [made.offer(chaos.WRONG_ROWS), made.offer(1), made.offer(2, 3)]
    made.go()
    results = made.outbox.take(5)
    for entry in (*bad, large):
        check(entry, results[entry.id])
    assert not made.pool.batched
    assert made.pool.batching_stopped == 'output "sum" has shape [5] for 4 rows'
    assert made.stops("rows") == 1
    after = [made.offer(2), made.offer(3, 4)]
    results = made.outbox.take(2)
    for entry in after:
        check(entry, results[entry.id])
    assert made.pool.drain(60)
    assert made.outbox.results.empty()


def test_wrong_rows_in_a_slice_run_the_whole_request_at_once(bench: Callable[..., Bench]) -> None:
    """The answer is the one of a single run, which has a row too many here, as the model gives it alone."""
    made = bench()
    marks = [*map(float, range(12)), chaos.WRONG_ROWS, *map(float, range(7))]
    large = made.offer(*marks)
    made.go()
    result = made.outbox.take(1)[large.id]
    assert result.outputs is not None
    sums = chaos.expected(large.inputs["x"]).tolist()
    assert result.outputs["sum"].tolist() == [*sums, 0.0]
    assert made.model.batches[-1] == 20
    assert made.pool.drain(60)
    assert made.outbox.results.empty()


def test_the_rows_of_a_part_with_wrong_rows_run_one_by_one(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.busy()
    split = made.offer_parts([1, chaos.WRONG_ROWS, 2], [3], group="parts")
    made.go()
    result = made.outbox.take(2)[split.id]
    assert result.outputs is not None
    rows = np.concatenate([part.entry.inputs["x"] for part in split.parts])
    assert result.outputs["sum"].tolist() == chaos.expected(rows).tolist()


def watched(bench: Callable[..., Bench], **limits: Any) -> Bench:
    """A pool whose batches are audited."""

    def compare(answer: Tensors, alone: Tensors, others: Sequence[Tensors]) -> str | None:
        return None if np.array_equal(answer["sum"], alone["sum"]) else 'output "sum" differs'

    return bench(audit=Audit(compare), **limits)


def test_a_row_that_differs_in_company_turns_batching_off(bench: Callable[..., Bench]) -> None:
    forgotten: list[bool] = []
    made = watched(bench, forget_plan=lambda: forgotten.append(True))
    made.busy()
    for marks in ([chaos.MIX], [1], [2, 3]):
        made.offer(*marks)
    made.go()
    made.outbox.take(4)
    wait_until(lambda: made.pool.batching_stopped is not None, "batching is off")
    assert made.pool.batching_stopped == 'output "sum" differs in a batch of 4 rows'
    assert (made.stops("answer"), made.stops("rows"), made.audits()) == (1, 0, 1)
    wait_until(lambda: forgotten == [True], "the plan is forgotten")
    for entry in [made.offer(chaos.MIX), made.offer(1)]:
        check(entry, made.outbox.take(1)[entry.id])


def test_rows_that_are_the_same_alone_keep_batching_on(bench: Callable[..., Bench]) -> None:
    """Only the first batches are audited at once; the others as far as the time that they take allows."""
    made = watched(bench)
    for turn in range(20):
        made.busy()
        for number in range(4):
            made.offer(turn + number)
        made.go(2)
        made.outbox.take(5)
        if turn < FIRST_AUDITS:
            made.go(1)
        expected = min(turn + 1, FIRST_AUDITS)
        wait_until(lambda: made.audits() == expected, "the audit has run")  # noqa: B023
        while made.model.running.acquire(blocking=False):
            pass
    assert made.pool.batched
    assert made.pool.batching_stopped is None


def test_an_audit_that_fails_or_ends_its_thread_costs_no_request(bench: Callable[..., Bench]) -> None:
    made = watched(bench)
    made.busy()
    entries = [made.offer(1), made.offer(2)]
    made.go(2)
    results = made.outbox.take(3)
    made.model.deadly = True
    made.go(1)
    wait_until(lambda: made.model.deaths == 1, "the audit has ended its thread")
    made.model.deadly = False
    made.go()
    for entry in entries:
        check(entry, results[entry.id])
    after = made.offer(3)
    check(after, made.outbox.take(1)[after.id])
    assert made.pool.batched


def test_a_large_request_is_joined_in_order_whichever_instance_runs_its_slices(
    bench: Callable[..., Bench],
) -> None:
    made = bench(instances=3)
    entry = made.offer(*range(1000))
    made.go()
    result = made.outbox.take(1)[entry.id]
    check(entry, result)
    assert max(made.model.batches) == 4
    assert made.pool.waiting() == (0, 0.0, 0.0)


def test_a_slice_that_fails_fails_its_request_once_and_stops_the_rest(bench: Callable[..., Bench]) -> None:
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
    assert deadly <= MAX_RESTARTS
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
    assert made.dropped("disconnected") == 1


def test_an_entry_whose_deadline_passes_while_it_waits_never_runs(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.busy()
    late = made.offer(1, deadline=made.clock() + 100)
    made.clock.ahead_s += 101
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
        made.pool.refuse_early(0)
    with pytest.raises(DeadlineExceeded):
        made.offer(1, deadline=made.clock() + 0.001)


def test_what_may_wait_follows_what_was_measured_last(bench: Callable[..., Bench]) -> None:
    """A machine that has become slower runs fewer rows in the time that entries may wait."""
    made = bench(instances=2, queue_s=0.5, least_rows=3)
    assert made.pool.limits.queue_rows == 2 * 8 * 25, "two batches of eight rows in 20 ms"
    for _ in range(200):
        made.pool.latency.observe(8, 0.1)
    entry = made.busy()
    made.go()
    made.outbox.take(1)
    assert 2 * 8 * 5 <= made.pool.limits.queue_rows < 2 * 8 * 6
    for _ in range(200):
        made.pool.latency.observe(8, 30)
    made.offer(1)
    made.go()
    assert entry.id not in made.outbox.take(1)
    assert made.pool.limits.queue_rows == 2 * 8, "a batch for each, however long it takes"


def test_what_may_wait_does_not_follow_runs_that_compute_gradients(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench()
    name = Gradient("sum", 0, "x", by_rows=True).name
    monkeypatch.setattr(made.model, "run", lambda inputs, outputs: dict.fromkeys(outputs, inputs["x"]))
    measured = sum(line.runs for line in made.pool.latency.table())
    entry = made.offer(1, 2, outputs=(name,))
    outputs = made.outbox.take(1)[entry.id].outputs
    assert outputs is not None
    assert outputs[name].shape == (2, 4)
    made.offer(1, 2, outputs=("sum",))
    made.outbox.take(1)
    wait_until(lambda: made.ran() == 2, "both runs are counted")
    assert sum(line.runs for line in made.pool.latency.table()) == measured + 1


def test_drain_finishes_what_was_accepted_and_takes_no_more(bench: Callable[..., Bench]) -> None:
    made = bench(delay_s=100.0)
    entries = [made.offer(number) for number in range(3)]
    made.go()
    assert made.pool.drain(60)
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


def test_requests_that_are_given_up_at_random_moments_end_once(bench: Callable[..., Bench]) -> None:
    """The outbox hears once that nobody reads an entry any more, if its result said that a run did."""
    made = bench(instances=3, queue_rows=100_000)
    made.model.stoppable = True
    made.model.run_s = 0.002
    made.go(10**6)
    offered: dict[int, Entry] = {}
    lock = threading.Lock()

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(200):
            marks = [float(mark) for mark in rng.integers(0, 100, rng.choice([1, 2, 5, 30]))]
            if rng.random() < 0.05:
                marks[0] = chaos.RAISE
            with lock:
                if rng.random() < 0.3 and len(marks) > 1:
                    entry = made.offer_parts(marks[:1], marks[1:])
                else:
                    entry = made.offer(*marks)
                offered[entry.id] = entry
            time.sleep(rng.choice([0, 0, 1e-4, 1e-3]))
            if rng.random() < 0.5:
                made.pool.cancel(entry.id, str(rng.choice(["deadline", "disconnected"])))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = made.outbox.take(len(offered))
    assert results.keys() == offered.keys()
    assert made.pool.drain(60)
    assert made.outbox.results.empty()
    ended = [made.outbox.unread.get_nowait() for _ in range(made.outbox.unread.qsize())]
    assert ended, "some entries were given up while they ran"
    assert sorted(ended) == sorted(number for number, result in results.items() if result.runs_on)
    for number, result in results.items():
        if result.error is None and not offered[number].parts:
            check(offered[number], result)


def test_a_slice_that_kills_its_thread_is_retried_once_whatever_the_others_do(
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


def test_slices_that_cannot_be_joined_fail_their_request_once(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    made = bench()
    widths = itertools.count(1)

    def run(inputs: Tensors) -> Tensors:
        return {"sum": np.zeros((len(inputs["x"]), next(widths)))}

    made.model.model.run = run  # type: ignore[method-assign, assignment]
    made.go()
    for _ in range(2):
        entry = made.offer(*range(20))
        assert isinstance(made.outbox.take(1)[entry.id].error, ModelFailed)
    assert [item.state for item in made.pool.instances()] == ["ready"]
    assert len(caplog.records) == 1, "one such line a minute"
    assert "m/1 gave outputs that cannot be joined (0 more since the last such line)" in caplog.text


@pytest.mark.parametrize(("max_bytes", "error"), [(math.inf, ModelFailed), (10**9, InvalidInput)])
def test_parts_whose_outputs_are_too_large_to_join_fail_their_request_alone(
    bench: Callable[..., Bench], max_bytes: float, error: type[Exception]
) -> None:
    """Each output is small. Joined, all rows get the length of the longest, which no memory holds."""
    made = bench(max_joined_bytes=max_bytes)
    made.busy()

    def run(inputs: Tensors) -> Tensors:
        long = inputs["x"][0, 0] == 1  # a view of one number, which takes no memory itself
        return {"sum": np.broadcast_to(np.float64(1), (len(inputs["x"]), 2**50 if long else 1))}

    made.model.model.run = run  # type: ignore[method-assign, assignment]
    entry = made.offer_parts([1], [2], group=99)
    neighbour = made.offer(3)
    made.go()
    results = made.outbox.take(3)
    assert isinstance(results[entry.id].error, error)
    assert results[neighbour.id].error is None
    after = made.offer(3)
    assert made.outbox.take(1)[after.id].error is None
    assert [item.state for item in made.pool.instances()] == ["ready"]


@pytest.mark.parametrize("instances", [1, 3])
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_parts_are_answered_as_one_request(bench: Callable[..., Bench], rows: int, instances: int) -> None:
    """They may share a batch, fill one each, or run in slices."""
    made = bench(instances=instances)
    marks = [[float(rows * part + row) for row in range(rows)] for part in range(3)]
    entry = made.offer_parts(*marks)
    made.go()
    outputs = made.outbox.take(1)[entry.id].outputs
    assert outputs is not None
    assert outputs["sum"].tolist() == [3 * mark + 1 for part in marks for mark in part]
    assert made.pool.drain(60)
    assert made.outbox.results.empty(), "no result of a part is seen"


def test_a_part_that_fails_ends_its_request_and_the_others_do_not_run(bench: Callable[..., Bench]) -> None:
    made = bench()
    first = made.busy()
    entry = made.offer_parts([chaos.RAISE] * 5, [1.0] * 5, [2.0] * 5)
    made.go()
    results = made.outbox.take(2)
    check(first, results[first.id])
    assert isinstance(results[entry.id].error, ModelFailed)
    assert made.pool.drain(60)
    assert made.outbox.results.empty()
    assert made.model.batches == [1, 5]


@pytest.mark.parametrize("rows", [1, 10])
def test_an_entry_in_parts_is_dropped_once(bench: Callable[..., Bench], rows: int) -> None:
    """However many of its parts have waited too long, and whether they fit in a batch or not."""
    made = bench()
    first = made.busy()
    entry = made.offer_parts(*[[1.0] * rows] * 4, deadline=made.clock() + 100)
    last = made.offer(5)
    made.clock.ahead_s += 101
    made.go()
    results = made.outbox.take(3)
    assert results.keys() == {first.id, entry.id, last.id}
    assert isinstance(results[entry.id].error, DeadlineExceeded)
    assert made.pool.drain(60)
    assert made.outbox.results.empty(), "no result of a part is seen"
    assert made.dropped("deadline") == 1


@pytest.mark.parametrize("rows", [5, 10])
def test_running_parts_of_a_cancelled_entry_give_no_result(bench: Callable[..., Bench], rows: int) -> None:
    """The client leaves while the first part runs and the others wait."""
    made = bench()
    entry = made.offer_parts(*[[1.0] * rows] * 4)
    assert made.model.running.acquire(timeout=60)
    made.pool.cancel(entry.id, "disconnected")
    last = made.offer(5)
    made.go()
    assert made.outbox.take(2).keys() == {entry.id, last.id}
    assert made.pool.drain(60)
    assert made.outbox.results.empty(), "no result of a part is seen"
    assert made.dropped("disconnected") == 1


def test_a_split_request_of_which_all_rows_run_is_answered_once(bench: Callable[..., Bench]) -> None:
    made = bench(instances=2)
    entry = made.offer_parts([1.0] * 8, [2.0] * 8)
    assert made.model.running.acquire(timeout=60)
    assert made.model.running.acquire(timeout=60)
    made.pool.cancel(entry.id, "disconnected")
    result = made.outbox.take(1)[entry.id]
    assert result.error is not None
    assert result.runs_on
    made.go(1)
    wait_until(lambda: made.ran() == 1, "one part has run")
    assert made.outbox.unread.empty(), "the other part is still read"
    made.go()
    assert made.outbox.unread.get(timeout=60) == entry.id
    assert made.pool.drain(60)
    assert made.outbox.results.empty()
    assert made.outbox.unread.empty()
    assert made.dropped("disconnected") == 1


def test_a_deadline_that_passes_during_the_run_is_answered_then(bench: Callable[..., Bench]) -> None:
    """The neighbour in the batch gets its answer, and the model is not asked to stop."""
    made = bench()
    made.busy()
    late, other = made.offer(1, deadline=made.clock() + 1000), made.offer(2)
    made.go(1)
    made.outbox.take(1)
    assert made.model.running.acquire(timeout=60)
    assert made.model.batches == [1, 2]
    made.pool.cancel(late.id, "deadline")
    made.pool.cancel(late.id, "disconnected")
    result = made.outbox.take(1)[late.id]
    assert isinstance(result.error, DeadlineExceeded)
    assert "while the model ran" in str(result.error)
    assert result.runs_on
    assert made.outbox.unread.empty()
    assert not made.model.stops
    made.go()
    answer = made.outbox.take(1)[other.id]
    check(other, answer)
    assert not answer.runs_on
    assert made.outbox.unread.get(timeout=60) == late.id
    made.pool.cancel(other.id, "deadline")
    assert made.pool.drain(60)
    assert made.outbox.results.empty()
    assert made.outbox.unread.empty()
    assert made.dropped("deadline") == 1
    assert made.dropped("disconnected") == 0


def test_a_run_is_stopped_when_nobody_waits_for_any_entry_of_it(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.busy()
    entries = [made.offer(1), made.offer(2)]
    made.go(1)
    made.outbox.take(1)
    assert made.model.running.acquire(timeout=60)
    made.pool.cancel(entries[0].id, "disconnected")
    assert not made.model.stops, "one client still waits"
    made.model.stoppable = True
    made.pool.cancel(entries[1].id, "deadline")
    assert set(made.outbox.take(2)) == {entry.id for entry in entries}
    assert {made.outbox.unread.get(timeout=60) for _ in entries} == {entry.id for entry in entries}
    assert made.model.stops
    made.model.stoppable = False
    after = made.offer(3)
    made.go()
    check(after, made.outbox.take(1)[after.id])
    assert made.pool.drain(60)
    assert made.outbox.results.empty()


@pytest.mark.parametrize("ran_s", [101.0, 60.0], ids=["out of time", "much longer than expected"])
def test_a_batch_that_runs_too_long_is_run_again_one_by_one(
    bench: Callable[..., Bench], ran_s: float
) -> None:
    """The guilty entry is answered with RunTimeout when it times out alone, its neighbours get answers."""
    made = bench(run_timeout_s=100.0)
    made.model.stoppable = True
    made.model.endless = chaos.WAIT
    made.busy()
    good = [made.offer(1), made.offer(2)]
    guilty = made.offer(chaos.WAIT)
    expired = made.offer(4, deadline=made.clock() + 50)
    made.go()
    made.outbox.take(1)
    wait_until(lambda: made.model.batches == [1, 4], "all four run together")
    assert made.pool.check_runs() - made.clock() == pytest.approx(GRACE_S, abs=1)
    made.clock.ahead_s += ran_s
    made.pool.check_runs()
    results = made.outbox.take(3)
    for entry in good:
        check(entry, results[entry.id])
    assert isinstance(results[expired.id].error, DeadlineExceeded)
    wait_until(lambda: made.model.batches == [1, 4, 1, 1, 1], "the guilty entry runs alone")
    made.clock.ahead_s += 101
    made.pool.check_runs()
    assert isinstance(made.outbox.take(1)[guilty.id].error, RunTimeout)
    after = made.offer(3)
    check(after, made.outbox.take(1)[after.id])


def test_an_instance_whose_run_does_not_stop_hangs_and_is_replaced(bench: Callable[..., Bench]) -> None:
    made = bench(run_timeout_s=100.0)
    entry = made.busy()
    made.clock.ahead_s += 101
    made.pool.check_runs()
    assert made.pool.hung() is None
    made.clock.ahead_s += GRACE_S + 1
    made.pool.check_runs()
    result = made.outbox.take(1)[entry.id]
    assert isinstance(result.error, RunTimeout)
    assert result.runs_on
    states = made.pool.instances()
    assert sorted(state.state for state in states) == ["hung", "ready"]
    assert max(state.run_s for state in states) == pytest.approx(107, abs=5)
    assert made.pool.hung() == "1 of 2 instances hang: a run has taken 107 s"
    assert made.busy_seconds() == pytest.approx(107, abs=5)
    other = made.busy()  # the replacement takes it
    made.go(1)
    assert made.model.running.acquire(timeout=0) is False
    made.go()
    check(other, made.outbox.take(1)[other.id])
    assert made.outbox.unread.get(timeout=60) == entry.id
    wait_until(lambda: [each.state for each in made.pool.instances()] == ["ready"], "the surplus one ends")
    assert made.busy_seconds() == pytest.approx(107, abs=5)
    assert made.pool.drain(60)


def test_without_an_instance_that_does_not_hang_requests_are_refused(bench: Callable[..., Bench]) -> None:
    """The process ends when it is told that an instance hangs, so nothing is replaced meanwhile."""
    told: list[tuple[VersionKey, str]] = []
    made = bench(run_timeout_s=100.0, on_hung=lambda key, reason: told.append((key, reason)))
    made.busy()
    waiting = made.offer(1)
    made.clock.ahead_s += 101
    made.pool.check_runs()
    made.clock.ahead_s += GRACE_S + 1
    made.pool.check_runs()
    assert told == [(KEY, "1 of 1 instances hang: a run has taken 107 s")]
    with pytest.raises(NotReady, match="hangs"):
        made.offer(2)
    made.go()
    assert waiting.id in made.outbox.take(2), "the instance came back"
    assert made.pool.hung() is None


def test_a_run_that_overstays_makes_admission_expect_more_of_it(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.busy()
    made.clock.ahead_s += 20
    with pytest.raises(DeadlineExceeded):
        made.offer(1, deadline=made.clock() + 10)
    made.offer(1, deadline=made.clock() + 100)


def test_draining_answers_and_stops_what_still_runs(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.model.stoppable = True
    entry = made.busy()
    assert not made.pool.drain(0)
    assert isinstance(made.outbox.take(1)[entry.id].error, Draining)
    assert made.outbox.unread.get(timeout=60) == entry.id
    wait_until(lambda: not made.pool.is_running, "the thread has ended")


@pytest.mark.parametrize("split", [False, True])
def test_a_thread_that_dies_on_a_split_request_costs_it_one_more_run(
    bench: Callable[..., Bench], split: bool
) -> None:
    """The slice that dies fails the request at its second run; other slices of the request stop."""
    made = bench()
    marks = [[1.0] * 6, [chaos.DIE] + [1.0] * 5, [1.0] * 6]
    entry = made.offer_parts(*marks) if split else made.offer(*[mark for part in marks for mark in part])
    made.go()
    assert isinstance(made.outbox.take(1)[entry.id].error, ModelFailed)
    after = made.offer(5)
    check(after, made.outbox.take(1)[after.id])
    assert made.outbox.results.empty()


def test_a_retry_whose_deadline_has_passed_is_not_run(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.busy()
    deadly = made.offer(chaos.DIE, priority=1)
    late = made.offer(3, deadline=made.clock() + 100)
    made.model.release.release(2)  # the busy run, and the run that dies
    for _ in range(2):
        assert made.model.running.acquire(timeout=60)
    # The deadly entry runs once more, by itself, while the other one waits.
    made.clock.ahead_s += 101
    made.go()
    results = made.outbox.take(3)
    assert isinstance(results[deadly.id].error, ModelFailed)
    assert isinstance(results[late.id].error, DeadlineExceeded)
    assert made.model.batches == [1, 2, 1]


def test_a_death_after_the_deadline_leads_to_no_second_run(bench: Callable[..., Bench]) -> None:
    made = bench()
    late = made.offer(chaos.DIE, deadline=made.clock() + 100)
    assert made.model.running.acquire(timeout=60)
    made.clock.ahead_s += 101
    made.go()
    assert isinstance(made.outbox.take(1)[late.id].error, DeadlineExceeded)
    assert made.model.batches == [1]


def test_a_slice_of_a_request_that_has_failed_is_not_retried(bench: Callable[..., Bench]) -> None:
    """Two slices run at once. One of them fails the request, and then the other's thread dies."""
    made = bench(instances=2)
    entry = made.offer(*[chaos.RAISE] * 4, *[chaos.DIE] * 4, 1)
    assert made.model.running.acquire(timeout=60)
    assert made.model.running.acquire(timeout=60)
    made.go()
    assert isinstance(made.outbox.take(1)[entry.id].error, ModelFailed)
    assert made.pool.drain(60)
    assert made.outbox.results.empty()
    assert made.model.batches.count(4) <= 3


def test_everything_that_waits_is_answered_when_the_last_instance_is_lost(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system has no thread for another instance."""
    made = bench()
    made.busy()
    deadly = made.offer(chaos.DIE, group="deadly")
    large, parts, small = made.offer(*range(20)), made.offer_parts([1.0], [2.0]), made.offer(3)

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    made.go()
    results = made.outbox.take(5)
    for entry in (deadly, large, parts, small):
        assert isinstance(results[entry.id].error, NotReady)
    assert [item.state for item in made.pool.instances()] == ["lost"]
    assert made.dropped("lost") == 3, "the deadly entry ran"
    with pytest.raises(NotReady, match="lost"):
        made.pool.refuse_early(0)


def test_an_instance_sleeps_until_a_delayed_batch_is_due(bench: Callable[..., Bench]) -> None:
    """No offer wakes it: its own wait times out."""
    made = bench(delay_s=0.05)
    made.go()
    for _ in range(3):
        entry = made.offer(1)
        check(entry, made.outbox.take(1)[entry.id])


def test_buckets_that_have_shrunk_limit_the_next_batches(bench: Callable[..., Bench]) -> None:
    buckets = BatchBuckets([1, 2, 4, 8])
    made = bench(buckets=buckets)
    made.busy()
    buckets.halve(8)
    made.go()
    assert made.outbox.take(1)
    assert made.pool.bucket_sizes() == (1, 2, 4)
    made.offer(1)
    assert made.outbox.take(1)
    assert made.pool.limits.batch_rows == 4
    assert made.metrics.value("padded_rows_total", "m", "1").value == 0
    made.offer(1, 2, 3)
    assert made.outbox.take(1)
    assert made.pool.drain(60)
    assert made.metrics.value("padded_rows_total", "m", "1").value == 1


def test_tokens_and_padding_are_counted(bench: Callable[..., Bench]) -> None:
    """The model's second dimension counts tokens: rows of 4 and of 2 tokens share a batch."""
    made = bench(padding=Padding({"x": 0.0}, "x", 4, 8, proven=True))
    made.busy()
    short = made.entry(1)
    short.inputs["x"] = short.inputs["x"][:, :2]
    made.pool.offer(short)
    made.offer(1, 2)
    made.go()
    results = made.outbox.take(3)
    assert all(result.error is None for result in results.values())
    assert made.pool.drain(60)
    assert made.model.batches == [1, 3]
    assert made.metrics.value("tokens_total", "m", "1").value == 4 + 3 * 4
    assert made.metrics.value("padded_tokens_total", "m", "1").value == 2


def test_a_small_request_waits_for_one_slice_of_a_large_one_at_most(bench: Callable[..., Bench]) -> None:
    made = bench()
    large = made.offer(*range(100))
    assert made.model.running.acquire(timeout=60)
    small = [made.offer(number) for number in range(5)]
    made.model.release.release(2)  # the slice that runs, and the batch of the small ones
    results = made.outbox.take(5)
    for entry in small:
        check(entry, results[entry.id])
    assert made.model.batches[:2] == [4, 5]
    made.go()
    check(large, made.outbox.take(1)[large.id])


def test_a_batch_in_buckets_is_padded_and_gives_each_entry_its_own_rows() -> None:
    card, outbox = FakeCard(), Outbox()
    buckets = BatchBuckets([1, 4, 8])
    pool = Pool(
        KEY,
        Limits(8, 100, 10**6),
        LatencyModel(),
        outbox,
        Metrics({}),
        time.monotonic,
        batched=True,
        buckets=buckets,
    )
    entries = [
        Entry(number, KEY, {"x": np.full((rows, 4), number, np.float32)}, rows, None, 16, 0.0)
        for number, rows in enumerate((2, 1, 3), 1)
    ]
    with pytest.raises(NotReady):
        pool.offer(entries[0])
    model = BucketedModel(FakeModel(card), buckets)
    pool.start_instance(model, "cuda:0")
    for entry in entries:
        pool.offer(entry)
    results = outbox.take(3)
    for entry in entries:
        check(entry, results[entry.id])
    assert pool.drain(60)
    assert {len(batch) for batch in card.batches} <= {1, 4, 8}
    model.close()


def test_a_run_computes_the_outputs_that_its_entries_asked_for(bench: Callable[..., Bench]) -> None:
    made = bench()
    wanted: list[Sequence[str] | None] = []

    def run(inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        wanted.append(outputs)
        rows = len(inputs["x"])
        made.model.running.release()
        assert made.model.release.acquire(timeout=60)
        return {name: np.zeros(rows) for name in outputs or ("a", "b", "c")}

    made.model.run = run  # type: ignore[method-assign, assignment]
    made.busy()
    entries = [made.offer(1, outputs=("b",)), made.offer(2, outputs=("a", "b"))]
    made.go()
    results = made.outbox.take(3)
    assert wanted == [None, ("b", "a")]
    for entry in entries:
        found = results[entry.id].outputs
        assert found is not None
        assert tuple(found) == entry.outputs


def test_an_idle_instance_takes_over_from_one_that_has_died(bench: Callable[..., Bench]) -> None:
    """The entries of the dead instance run again on all that are free."""
    made = bench(instances=1)
    made.busy()
    entries = [made.offer(number) for number in range(3)]
    deadly = made.offer(chaos.DIE)
    for _ in range(2):
        made.pool.start_instance(made.model, "cpu")
    made.go()
    results = made.outbox.take(5)
    for entry in entries:
        check(entry, results[entry.id])
    assert isinstance(results[deadly.id].error, ModelFailed)


@pytest.mark.parametrize("ends", [False, True])
def test_nothing_runs_again_on_a_device_that_is_lost(bench: Callable[..., Bench], ends: bool) -> None:
    """A process that can be replaced is told first, before any of its entries has a result."""
    told: list[tuple[VersionKey, str, int]] = []
    made: Bench

    def tell(key: VersionKey, reason: str) -> None:
        told.append((key, reason, made.outbox.results.qsize()))

    made = bench(on_hung=tell if ends else None)
    made.model.lost_reason = "CUDA: an illegal memory access (error 700)"
    entries = [made.offer(1), made.offer(2), made.offer(3)]
    made.go()
    results = made.outbox.take(3)
    for entry in entries:
        assert isinstance(results[entry.id].error, NotReady)
    assert [instance.state for instance in made.pool.instances()] == ["lost"]
    assert len(made.model.batches) == 1
    if ends:
        assert told == [(KEY, f"cpu is lost: {made.model.lost_reason}", 0)]


def test_a_version_that_is_not_batched_runs_each_entry_alone_and_does_not_split_it(
    bench: Callable[..., Bench],
) -> None:
    made = bench(batch_rows=1)
    made.pool.batched = False
    made.busy()
    entries = [made.offer(1, 2, 3), made.offer(4)]
    made.go()
    results = made.outbox.take(3)
    for entry in entries:
        check(entry, results[entry.id])
    assert made.model.batches == [1, 3, 1]


def test_a_cancelled_retry_is_not_run(bench: Callable[..., Bench]) -> None:
    made = bench()
    made.busy()
    deadly, gone = made.offer(chaos.DIE), made.offer(3)
    made.model.release.release(2)  # the busy run, and the run that dies
    assert made.model.running.acquire(timeout=60)
    assert made.model.running.acquire(timeout=60)  # the deadly entry's second run, by itself
    made.pool.cancel(gone.id, "disconnected")
    made.go()
    results = made.outbox.take(3)
    assert isinstance(results[deadly.id].error, ModelFailed)
    assert results[gone.id].outputs is None
    assert made.model.batches == [1, 2, 1]
