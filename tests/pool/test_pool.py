"""The pool with a fake model: what waits runs together, the guilty fail alone, and drains end it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from inferpool.errors import (
    DeadlineExceeded,
    Draining,
    ModelFailed,
    NotReady,
    QueueFull,
)
from inferpool.gradient_names import Gradient
from inferpool.observe.metrics import Metrics
from inferpool.pool.admission import Limits
from inferpool.pool.audit import FIRST_AUDITS, Audit
from inferpool.pool.buckets import BatchBuckets, BucketedModel
from inferpool.pool.latency_model import LatencyModel
from inferpool.pool.padding import Padding
from inferpool.pool.pool import Pool
from inferpool.pool.ports import Entry, Result
from inferpool.tensors import Tensors

from tests.chaos import inferpool_chaos as chaos
from tests.fake_gpu import FakeCard, FakeModel
from tests.pool.bench import KEY, Bench, Outbox, check
from tests.server import wait_until


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
    assert made.ran() == 1  # takes the pool's lock: the bounds follow the run after its result is out
    assert 2 * 8 * 5 <= made.pool.limits.queue_rows < 2 * 8 * 6
    for _ in range(200):
        made.pool.latency.observe(8, 30)
    made.offer(1)
    made.go()
    assert entry.id not in made.outbox.take(1)
    assert made.ran() == 2
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
