"""The pool of a version: its queue, and the instances that run what is in it.

The pool owns the lock. The web side calls `offer` and `cancel`, the instances' threads call `next_batch`,
`finish` and `died`. Results leave through the outbox, once per batch.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from typing import Final

from inferpool.backends.base import LoadedModel
from inferpool.errors import Draining, NotReady, Reason
from inferpool.observe.metrics import Metrics
from inferpool.pool.admission import Limits
from inferpool.pool.audit import Audit, AuditSample
from inferpool.pool.batch import RUNS, Batch, Outcome, Run
from inferpool.pool.buckets import BatchBuckets
from inferpool.pool.completion import Completion
from inferpool.pool.device_accounts import DeviceAccount, DeviceAccounts
from inferpool.pool.entry_queue import Queue
from inferpool.pool.instance import Instance
from inferpool.pool.instance_set import InstanceSet
from inferpool.pool.latency_model import LatencyModel
from inferpool.pool.log_limits import LogLimiter
from inferpool.pool.padding import Padding
from inferpool.pool.ports import Entry, Outbox, Result, VersionKey
from inferpool.pool.retries import Retries
from inferpool.pool.run_stopper import RunStopper
from inferpool.pool.run_watcher import RunWatcher
from inferpool.pool.splitting import SplitRequest
from inferpool.pool.stats import DROPPED, BatchCount, BatchStats, InstanceState, Waiting, hung_reason

log = logging.getLogger(__name__)

FEW_RUNS: Final = 8
"""An expectation based on fewer runs is doubtful: it refuses nothing that an idle instance could try."""
STALE_S: Final = 10.0
"""So is one if nothing has run for this long, because what slowed the last runs may have passed."""


class Pool:
    """The instances of one version, their shared queue, and what was measured of them."""

    def __init__(
        self,
        key: VersionKey,
        limits: Limits,
        latency: LatencyModel,
        outbox: Outbox,
        metrics: Metrics,
        clock: Callable[[], float],
        *,
        batched: bool,
        padding: Padding | None = None,
        max_joined_bytes: float = math.inf,
        buckets: BatchBuckets | None = None,
        audit: Audit | None = None,
        forget_plan: Callable[[], None] | None = None,
        watcher: RunWatcher | None = None,
        accounts: DeviceAccounts | None = None,
    ) -> None:
        """`batched` says whether rows of different entries may share a run, which has been proven.

        `padding` is how rows of different lengths are treated; None if all lengths are equal. The outputs of
        an entry's parts are joined up to `max_joined_bytes`. `buckets` has the batch sizes that models on
        GPUs run. `audit` compares rows with what they get alone; None if the graph has proven them equal.
        `forget_plan` is called if batching is turned off while the version serves. `watcher` ends runs that
        take too long; without one, runs have no limit. `accounts` are shared by all pools of the process.
        """
        self.key = key
        self.limits = limits
        self.latency = latency
        self.batched = batched
        self.batching_stopped: Reason | None = None
        self.log_limiter = LogLimiter(clock)
        self._padding = padding
        self._max_joined_bytes = max_joined_bytes
        self._buckets = buckets
        self._audit = audit
        self._forget_plan = forget_plan
        self._outbox = outbox
        self._clock = clock
        self._stats = BatchStats(metrics, key, padding, buckets, audited=audit is not None)
        self._lock = threading.Lock()
        self._queue = Queue(limits, latency.seconds, latency.safety_factor)
        self._instances = InstanceSet(key, self, clock, self.log_limiter)
        self._retries = Retries()
        self._watcher = RunWatcher(clock, 0.0) if watcher is None else watcher
        self._run_stopper = RunStopper(
            self._instances, self._queue.admission, self._retries, self._watcher, clock
        )
        self._completion = Completion(self._queue, self._retries, self._stats, clock, self._run_stopper.leave)
        self._device_accounts = DeviceAccounts() if accounts is None else accounts
        self._accounts: dict[str, DeviceAccount] = {}  # of the devices that instances were started on
        self._last_run = clock()
        self._closed = False
        self._watcher.add(self)

    # The web side.

    def offer(self, entry: Entry) -> None:
        """Accept `entry`, or raise QueueFull, DeadlineExceeded, NotReady or Draining."""
        with self._lock:
            self._refuse_unless_open()
            if not (self.batched or entry.parts):
                entry.rows = 1
            if entry.deadline < math.inf:
                now = self._clock()
                doubtful = self.latency.runs(entry.load) < FEW_RUNS or now - self._last_run > STALE_S
                self._queue.offer(entry, now, self._instances.free_at(now), probe=doubtful)
            else:  # such an entry is never late
                self._queue.offer(entry, entry.arrived, [0.0] * len(self._instances))
            if entry.parts or self.limits.is_large(entry):
                self._completion.expect_slices(entry)
            self._instances.wake_for(self._queue.load, self.limits.batch_rows)
            for _ in entry.parts[1:]:
                self._instances.wake_for(self._queue.load, self.limits.batch_rows)

    def refuse_early(self, tenant: int) -> None:
        """Raise the error that would refuse even an entry of one row of `tenant` now.

        This takes no lock, because the answer is a guess in any case: the entry is offered later.
        """
        self._refuse_unless_open()
        self._queue.refuse_early(tenant, len(self._instances))

    def cancel(self, entry_id: int, reason: str) -> None:
        """Answer an entry now, for `disconnected` or `deadline`, whether it waits or runs.

        Does nothing if it has its result. A run is asked to stop once nobody waits for any entry in it.
        """
        with self._lock:
            results = self._completion.cancel(entry_id, reason)
        self._put(results)

    def waiting(self) -> Waiting:
        """Return what waits now."""
        with self._lock:
            queue = self._queue
            wait_s = queue.admission.wait_s(len(self._instances))
            return Waiting(queue.rows, queue.oldest_age_s(self._clock()), wait_s)

    def batches(self) -> list[BatchCount]:
        """Return what has run by batch size, smallest first."""
        with self._lock:
            return self._stats.batches()

    def instances(self) -> list[InstanceState]:
        """Return each instance's device and state, and count the time that runs have taken up to now."""
        with self._lock:
            now = self._clock()
            for instance in self._instances.running():
                run_s = now - instance.began
                self._stats.count_busy(instance.device, max(0.0, run_s - instance.counted_s))
                instance.counted_s = max(run_s, instance.counted_s)
            return self._instances.states()

    def release_memory(self) -> None:
        """Free memory that runtimes keep for later runs."""
        with self._lock:
            models = self._instances.models()
        for model in models:
            model.release_memory()

    def hung(self) -> Reason | None:
        """Say which share of the instances hang, and since when; None if none does."""
        return hung_reason(self.instances())

    @property
    def is_running(self) -> bool:
        """Whether the thread of any instance lives."""
        return any(instance.is_alive for instance in (*self._instances.all(), *self._instances.hung()))

    def bucket_sizes(self) -> tuple[int, ...]:
        """Return the batch sizes that run on GPUs now; empty on the CPU, which runs any size."""
        return self._buckets.sizes if self._buckets is not None else ()

    # Start and end.

    def start_instance(self, model: LoadedModel, device: str) -> None:
        """Start one more instance, which runs `model` on `device`."""
        with self._lock:  # so that no caller sees an instance whose thread does not run yet
            self._stats.add_device(device)
            account = self._accounts[device] = self._device_accounts.of(device)
            self._queue.join(account, self._clock())
            self._instances.start(model, device)
            self._queue.admission.bound_by_time(len(self._instances))

    def drain(self, timeout_s: float) -> bool:
        """Accept no more, finish what was accepted, end the instances; False if that took too long.

        Entries that have no result by then are answered with Draining, and runs are asked to stop.
        """
        with self._lock:
            self._closed = True
            self.limits.delay_s = 0.0
            self._instances.wake_all()
            instances, hung = self._instances.all(), self._instances.hung()
        deadline = self._clock() + timeout_s
        ended = [instance.join(max(0.0, deadline - self._clock())) for instance in instances]
        with self._lock:
            results = self._completion.give_up("draining")
            for instance in self._instances.running():
                for row_slice in instance.batch.waiting_slices() if instance.batch is not None else ():
                    entry = row_slice.entry
                    results += self._completion.cancel(entry.part_of or entry.id, "draining")
        self._put(results)
        ended += [instance.join(0.0) for instance in hung]
        if all(ended):
            self._watcher.remove(self)
        return all(ended)

    # The instances' side.

    def next_batch(self, instance: Instance) -> Batch | None:
        """Block until `instance` has a batch to run; None when the pool is closed and empty."""
        while True:
            results: list[Result] = []
            sample: AuditSample | None = None
            with self._lock:
                now = self._clock()
                if instance.is_surplus:
                    return None
                if self._audit is not None and self._audit.overdue(now):
                    sample = self._take_sample(instance, now)
                batch = None if sample is not None else self._next(instance, now, results)
                ends = batch is None and sample is None and self._closed and not len(self._queue)
                wakeup = None
                if ends:
                    self._instances.remove(instance)
                elif batch is None and sample is None:
                    if self._audit is not None:
                        sample = self._take_sample(instance, now)
                    if sample is None:
                        self._instances.begin_waiting(instance)
                        wakeup = self._queue.next_wakeup(now)
            self._put(results)
            if batch is not None or ends:
                return batch
            if sample is not None:
                self._run_audit(instance, sample)
                continue
            if not instance.wait(None if wakeup is None else wakeup - now):
                with self._lock:
                    woken = not self._instances.stop_waiting(instance)
                if woken:
                    # An offer chose this instance just when its wait timed out: the wake-up will come.
                    instance.wait(None)

    def finish(self, instance: Instance, batch: Batch, run: Run) -> None:
        """Answer the entries of a batch that has run, and keep its measurements."""
        results: list[Result] = []
        complete: list[SplitRequest] = []
        completion = self._completion
        outcomes: Sequence[Outcome] = run.outcomes
        with self._lock:
            run_s = self._end_run(instance)
            if self._audit is not None and batch.stopped == RUNS:
                # Before the results: the inputs may be overwritten once an entry has its result.
                self._consider_audit(batch, run)
            if batch.stopped != RUNS or batch.answered is not None:
                self._retries.forget(batch)
                outcomes = completion.sort_out(batch, run, results)
            for outcome in outcomes:
                split = completion.end(outcome, batch, run.compute_s, results)
                if split is not None:
                    complete.append(split)
            # The web side's thread can wake up while this one does the rest. A client that has its answer
            # cannot observe stale counters, because readers of the counters take this lock.
            self._put(results)
            if batch.answered is not None:
                self._put_ended(batch)
            if batch.stopped == RUNS:
                self._retries.forget(batch)
            if run.wrong_rows is not None:
                self._stop_batching(run.wrong_rows, "rows")
                for entry in run.undivided:
                    self._completion.run_undivided(entry)
            try:
                self._keep(instance, batch, run, run_s)
            except Exception:
                # Raising would end the instance, and run a batch again that has been answered.
                log.exception("the measurements of a batch of %s/%s could not be kept", *self.key)
        # Without the lock, and after the neighbours' results: large outputs take a while to join.
        for split in complete:
            self._put_joined(split)
        if run.wrong_rows is not None and self._forget_plan is not None:
            self._forget_plan()

    def died(self, instance: Instance, batch: Batch | None) -> None:
        """Replace an instance whose thread has died. The entries of its batch run once more, each alone.

        If the device is lost to this process, no instance could run there in its place.
        """
        results: list[Result] = []
        if instance.lost is not None and self._watcher.on_hung is not None:
            # Before any result: another process can run these entries.
            self._watcher.on_hung(self.key, f"{instance.device} is lost: {instance.lost}")
        with self._lock:
            self._end_run(instance)
            self._instances.remove(instance)
            if instance.lost is not None:
                self._instances.lose(instance)
            elif not instance.is_surplus:
                self._instances.replace(instance)
            self._queue.admission.bound_by_time(len(self._instances))
            if batch is not None:
                for outcome in self._retries.add(batch, self._clock()):
                    self._completion.end(outcome, batch, 0.0, results)
            if not len(self._instances):
                results += self._completion.give_up("draining" if self._closed else "lost")
            self._instances.wake_some(len(self._retries))
        self._put(results)
        if batch is not None and batch.answered is not None:
            with self._lock:
                self._put_ended(batch)

    # The watcher's side.

    def check_runs(self) -> float:
        """Stop runs that take too long, and count on instances no more whose runs do not stop.

        Returns when to ask again, in seconds of the pool's clock; infinity if there is nothing to wait for.
        """
        results: list[Result] = []
        with self._lock:
            soonest, reason = self._run_stopper.check(self._completion, results, closed=self._closed)
        self._put(results)
        if reason is not None and self._watcher.on_hung is not None:
            self._watcher.on_hung(self.key, reason)
        return soonest

    # Under the lock: the begin and the end of a run.

    def _end_run(self, instance: Instance) -> float:
        """Take note that an instance runs nothing; returns the seconds of its run that are counted."""
        counted_s, instance.counted_s = instance.counted_s, 0.0
        instance.busy_until = 0.0
        instance.batch = None
        instance.stop_asked = math.inf
        if self._instances.is_hung(instance):
            log.warning("%s runs again after %.0f s", instance.name, self._clock() - instance.began)
            self._instances.recover(instance)
            self._queue.admission.bound_by_time(len(self._instances))
        return counted_s

    def _begin_run(self, instance: Instance, batch: Batch, now: float, expected_s: float) -> None:
        """Take note that an instance runs `batch` from now on."""
        instance.busy_until = now + expected_s
        instance.expected_s = expected_s
        instance.began = now
        instance.batch = batch
        if self._watcher.is_idle:
            self._watcher.wake()

    # Under the lock: which batch runs next.

    def _refuse_unless_open(self) -> None:
        if self._closed:
            raise Draining("the server, or this version, is shutting down; try again later")
        if not len(self._instances):
            raise NotReady("every instance of this version is lost or hangs; its log says why")

    def _next(self, instance: Instance, now: float, results: list[Result]) -> Batch | None:
        """Return the batch that `instance` runs now; adds the results of entries that will never run."""
        self._instances.arrived(instance)
        batch = self._next_retry(now, results)
        if batch is None:
            taken = self._queue.take(now, self._accounts[instance.device])
            results += self._completion.drop(taken.drops)
            if not taken.slices:
                return None
            batch = Batch(taken.slices, self.batched, taken.reason, now, self._padding)
            batch.row_s = taken.row_s
        self._begin_run(instance, batch, now, self.latency.seconds(batch.load))
        if self._instances.idle_count and (len(self._retries) or len(self._queue)):
            self._instances.wake_one()
        return batch

    def _next_retry(self, now: float, results: list[Result]) -> Batch | None:
        while (batch := self._retries.take()) is not None:
            row_slice = batch.slices[0]
            if row_slice.is_split and self._completion.split_of(row_slice.entry) is None:
                self._retries.forget(batch)  # the request ended with another of its slices
            elif row_slice.entry.deadline <= now:
                self._retries.forget(batch)
                self._completion.end(Outcome(row_slice, None, DROPPED["deadline"]()), batch, 0.0, results)
            else:
                return batch
        return None

    # Under the lock: what was measured.

    def _stop_batching(self, reason: Reason, kind: str) -> None:
        """Run every entry alone from here on, with all its rows at once; `kind` is one of `STOPPED`."""
        if not self.batched:
            return
        self.batched = False
        self.batching_stopped = reason
        self.limits.batch_rows = 1
        self._audit = None
        self._stats.count_stop(kind)
        for entry in self._queue.sliced():
            self._completion.run_undivided(entry)
        self._instances.wake_some(len(self._retries))

    def _take_sample(self, instance: Instance, now: float) -> AuditSample | None:
        """Return the entry that `instance` runs again now; None if no audit is due."""
        sample = None if self._audit is None else self._audit.take()
        if sample is not None:
            self._instances.arrived(instance)
            row_slice = sample.row_slice
            batch = Batch([row_slice], False, "alone", now)
            batch.answer([row_slice.entry.id])
            self._begin_run(instance, batch, now, self.latency.seconds(batch.load))
        return sample

    def _consider_audit(self, batch: Batch, run: Run) -> None:
        """Keep an entry of a batch for an audit, if one is due."""
        try:
            if self._audit is not None:
                self._audit.consider(batch, run, self.latency.seconds(1.0), self._clock())
        except Exception:
            # Raising would end the instance, and run the batch again.
            log.exception("no entry of a batch of %s/%s could be kept for an audit", *self.key)

    def _keep(self, instance: Instance, batch: Batch, run: Run, counted_s: float) -> None:
        """Count a batch that has run, and bound what may wait by how long it took."""
        self._last_run = self._clock()
        if batch.row_s >= 0:
            self._queue.settle(batch, run.compute_s, self._accounts[instance.device])
        if run.clean or (batch.stopped != RUNS and run.compute_s > self.latency.seconds(batch.load)):
            # A run that was stopped would have taken longer still.
            self.latency.observe(batch.load or 1.0, run.compute_s)
        self._queue.admission.bound_by_time(len(self._instances))
        self._stats.count_batch(instance.device, batch, run.compute_s, counted_s)
        if self._buckets is not None and self.batched:
            # The GPU may have had no memory for larger batches.
            self.limits.batch_rows = min(self.limits.batch_rows, self._buckets.largest)

    # Without the lock: audits.

    def _run_audit(self, instance: Instance, sample: AuditSample) -> None:
        """Run an entry again, alone, and stop batching if it got another answer in its batch."""
        audit = self._audit
        if audit is None:
            return  # another instance has found a difference
        began = self._clock()
        batch = instance.batch
        difference = audit.check(sample, instance.run_alone)
        with self._lock:
            if batch is not None and batch.stopped != RUNS:
                difference = None  # a run that was stopped says nothing
            self._end_run(instance)
            audit.ran(self._clock() - began)
            self._stats.count_audit()
            if difference is not None:
                self._stop_batching(difference, "answer")
        if difference is not None:
            log.error("%s: %s; batching is off from here on", instance.name, difference)
            if self._forget_plan is not None:
                self._forget_plan()

    # The outbox.

    def _put(self, results: list[Result]) -> None:
        if results:
            self._outbox.put(results)

    def _put_ended(self, batch: Batch) -> None:
        over = self._completion.end_reading(batch)
        if over:
            self._outbox.ended(over)

    def _put_joined(self, split: SplitRequest) -> None:
        result = split.result(self._max_joined_bytes)
        if result.error is not None and result.error.__cause__ is not None:
            suppressed = self.log_limiter.suppressed("split request")
            if suppressed is not None:
                log.warning(
                    "%s/%s gave outputs that cannot be joined (%d more since the last such line): %s",
                    *self.key, suppressed, result.error.__cause__,
                )  # fmt: skip
        self._outbox.put([result])
