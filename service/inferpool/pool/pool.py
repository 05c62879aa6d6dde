"""The pool of a version: its queue and the instances that work it off.

The pool owns the lock. `offer` and `cancel` come from the web side, `next_batch`, `finish` and `died`
from the instances' threads. Results leave through the outbox once a batch.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from inferpool.backends.base import LoadedModel
from inferpool.errors import Draining, NotReady
from inferpool.observe.metrics import Metrics
from inferpool.pool.assembly import SplitRequests
from inferpool.pool.buckets import BatchBuckets
from inferpool.pool.drop_reasons import DROPPED
from inferpool.pool.entry_queue import Drop, Limits, Queue
from inferpool.pool.instance import Batch, Instance, Outcome, Run
from inferpool.pool.latency_model import Profile
from inferpool.pool.log_limits import LogLimiter
from inferpool.pool.mixed_parts import Whole
from inferpool.pool.padding import Padding
from inferpool.pool.ports import Entry, Outbox, Result, VersionKey
from inferpool.pool.retries import Retries
from inferpool.pool.stats import BatchCount, Counts

log = logging.getLogger(__name__)

RESTARTS_AT_MOST: Final = 5
"""Threads of a version that are replaced within `RESTART_WINDOW_S`; the next to die stays lost."""
RESTART_WINDOW_S: Final = 60.0

FEW_RUNS: Final = 8
"""An expectation that rests on fewer runs refuses nothing that an idle instance could try."""
STALE_S: Final = 10.0
"""Nor does one where nothing has run for so long: what slowed the last runs may have passed."""


@dataclass(frozen=True, slots=True)
class InstanceState:
    """What is known of an instance from outside: `state` is `ready` or `lost`."""

    device: str
    state: str


class Waiting(NamedTuple):
    """What waits: rows, the seconds that the entry which came first has waited, and those of work ahead."""

    rows: int = 0
    oldest_age_s: float = 0.0
    wait_s: float = 0.0


class Pool:
    """Instances of one version, their shared queue, and what was measured of them."""

    def __init__(
        self,
        key: VersionKey,
        limits: Limits,
        profile: Profile,
        outbox: Outbox,
        metrics: Metrics,
        clock: Callable[[], float],
        *,
        batched: bool,
        padding: Padding | None = None,
        most_joined_bytes: float = math.inf,
        ladder: BatchBuckets | None = None,
    ) -> None:
        """`batched` says whether rows of different entries may share a run: it has been proven.

        `padding` is how rows of different lengths are treated; None where they are all alike. The outputs of
        an entry's parts are joined up to `most_joined_bytes`. `ladder` has the batch sizes that models on
        GPUs run.
        """
        self.key = key
        self.limits = limits
        self.profile = profile
        self.batched = batched
        self._padding = padding
        self._most_joined_bytes = most_joined_bytes
        self.complaints = LogLimiter(clock)
        self._ladder = ladder
        self.wrong_rows = ""
        self._outbox = outbox
        self._clock = clock
        self._counts = Counts(metrics, key, padding, ladder)
        self._lock = threading.Lock()
        self._queue = Queue(limits, profile.seconds, profile.caution)
        self._instances: list[Instance] = []
        self._idle: list[Instance] = []
        self._lost: list[str] = []
        self._assemblies = SplitRequests()
        # By the id of an entry with parts, and by those of its parts.
        self._wholes: dict[int, Whole] = {}
        self._retries = Retries()
        self._deaths: deque[float] = deque()
        self._measured = clock()
        self._started = 0
        self._waking = 0
        self._closed = False

    # The web side.

    def offer(self, entry: Entry) -> None:
        """Accept `entry`, or raise QueueFull, DeadlineExceeded, NotReady or Draining."""
        with self._lock:
            self._refuse_unless_open()
            if not (self.batched or entry.parts):
                entry.rows = 1
            if entry.deadline < math.inf:
                now = self._clock()
                doubtful = self.profile.runs(entry.load) < FEW_RUNS or now - self._measured > STALE_S
                free_at = [instance.busy_until for instance in self._instances]
                self._queue.offer(entry, now, free_at, probe=doubtful)
            else:  # it is never too late for it
                self._queue.offer(entry, entry.arrived, [0.0] * len(self._instances))
            if entry.parts:
                whole = Whole(entry)
                self._wholes[entry.id] = whole
                for part in entry.parts:
                    self._wholes[part.entry.id] = whole
                    self._waits(part.entry)
            else:
                self._waits(entry)

    def refuse_early(self) -> None:
        """Raise what even an entry of one row would be refused with now.

        Without the lock: it is a guess in any case, for the row comes later.
        """
        self._refuse_unless_open()
        self._queue.refuse_if_full(1, 0, False, len(self._instances))

    def cancel(self, entry_id: int, reason: str) -> None:
        """Drop an entry that still waits, for `disconnected` or `deadline`; what is running runs on."""
        with self._lock:
            whole = self._wholes.get(entry_id)
            drop = self._cancel(entry_id, reason) if whole is None else self._cancel_parts(whole, reason)
            results = self._dropped([drop]) if drop is not None else []
        self._put(results)

    def waiting(self) -> Waiting:
        """What waits now."""
        with self._lock:
            queue = self._queue
            return Waiting(queue.rows, queue.oldest_age_s(self._clock()), queue.wait_s(len(self._instances)))

    def batches(self) -> list[BatchCount]:
        """What has run, by batch size, smallest first."""
        with self._lock:
            return self._counts.batches()

    def instances(self) -> list[InstanceState]:
        """Each instance's device and state."""
        with self._lock:
            ready = [InstanceState(instance.device, "ready") for instance in self._instances]
            return ready + [InstanceState(device, "lost") for device in self._lost]

    def rungs(self) -> tuple[int, ...]:
        """The batch sizes that run on GPUs now; empty on the CPU, where any does."""
        return self._ladder.rungs if self._ladder is not None else ()

    # Life.

    def start_instance(self, model: LoadedModel, device: str) -> None:
        """Start one more instance, which runs `model` on `device`."""
        with self._lock:
            self._new_instance(model, device)

    def drain(self, timeout_s: float) -> bool:
        """Accept no more, finish what was accepted, end the instances; False if that took too long.

        What has not begun to run by then is answered with Draining.
        """
        with self._lock:
            self._closed = True
            self.limits.delay_s = 0.0
            for instance in self._idle:
                instance.wake()
            self._idle.clear()
            instances = list(self._instances)
        deadline = self._clock() + timeout_s
        ended = [instance.join(max(0.0, deadline - self._clock())) for instance in instances]
        with self._lock:
            results = self._give_up("draining")
        self._put(results)
        return all(ended)

    # The instances' side.

    def next_batch(self, instance: Instance) -> Batch | None:
        """Block until `instance` has a batch to run; None when the pool is closed and empty."""
        while True:
            with self._lock:
                batch, results, wait_s = self._next(instance)
                ends = batch is None and self._closed
                if ends:
                    self._instances.remove(instance)
            self._put(results)
            if batch is not None or ends:
                return batch
            if not instance.wait(wait_s):
                with self._lock:
                    chosen = instance not in self._idle
                    if not chosen:
                        self._idle.remove(instance)
                if chosen:
                    # An offer chose this instance as its wait timed out: the wake-up is on its way.
                    instance.wait(None)

    def finish(self, instance: Instance, batch: Batch, run: Run) -> None:
        """Answer the entries of a batch that has run, and keep what was measured of it."""
        results: list[Result] = []
        with self._lock:
            instance.busy_until = 0.0
            for outcome in run.outcomes:
                results += self._ended(outcome, batch, run.compute_s)
            if not self._wholes:
                # The web side's thread wakes up while the rest is done here. Nobody who has an answer sees it
                # uncounted: whoever reads what was counted has to have had the lock.
                self._put(results)
                results = []
            self._retries.ran(batch)
            if run.wrong_rows and self.batched:
                results += self._stop_batching(run.wrong_rows)
            try:
                self._keep(instance, batch, run)
            except Exception:
                # The instance would end, and its batch would run again, which has been answered.
                log.exception("what a batch of %s/%s took could not be kept", *self.key)
        self._put(results)

    def died(self, instance: Instance, batch: Batch | None) -> None:
        """Replace an instance whose thread has died; what it ran is run once more, entry by entry."""
        with self._lock:
            self._instances.remove(instance)
            if instance.woken:
                self._waking -= 1  # it died on its way to the queue
            self._replace(instance)
            results: list[Result] = []
            if batch is not None:
                for outcome in self._retries.add(batch, self._clock()):
                    results += self._ended(outcome, batch, 0.0)
            if not self._instances:
                results += self._give_up("draining" if self._closed else "lost")
            for _ in range(min(len(self._idle), len(self._retries))):
                self._wake()
        self._put(results)

    # Under the lock.

    def _keep(self, instance: Instance, batch: Batch, run: Run) -> None:
        """Count a batch that has run, and let what it took bound what may wait."""
        self._measured = self._clock()
        if run.clean:
            self.profile.observe(max(1, batch.load), run.compute_s)
        self._queue.bound_by_time(len(self._instances))
        self._counts.ran(instance.device, batch, run.compute_s)
        if self._ladder is not None and self.batched:
            # No larger batches than there is memory for.
            self.limits.batch_rows = min(self.limits.batch_rows, self._ladder.top)

    def _waits(self, entry: Entry) -> None:
        """An entry is in the queue."""
        if self._queue.is_large(entry):
            self._assemblies.begin(entry)
        self._wake_for_more()

    def _wake_for_more(self) -> None:
        """Wake an idle instance, unless those that are waking take all that waits.

        Whatever of it they cannot take together, the first of them wakes another for.
        """
        if self._idle and self._queue.load > self._waking * self.limits.batch_rows:
            self._wake()

    def _wake(self) -> None:
        instance = self._idle.pop()
        instance.woken = True
        self._waking += 1
        instance.wake()

    def _refuse_unless_open(self) -> None:
        if self._closed:
            raise Draining("the server, or this version, is shutting down")
        if not self._instances:
            raise NotReady("every instance of this version is lost")

    def _next(self, instance: Instance) -> tuple[Batch | None, list[Result], float | None]:
        """What `instance` runs now, the results of what never will, and how long to wait else."""
        if instance.woken:
            instance.woken = False
            self._waking -= 1
        now = self._clock()
        results: list[Result] = []
        batch = None
        while batch is None and (batch := self._retries.take()) is not None:
            piece = batch.pieces[0]
            if not piece.whole and piece.entry.id not in self._assemblies:
                batch = None  # another piece of its entry has failed meanwhile
            elif piece.entry.deadline <= now:
                results += self._ended(Outcome(piece, None, DROPPED["deadline"]()), batch, 0.0)
                batch = None
        if batch is None:
            taken = self._queue.take(now)
            results += self._dropped(taken.drops)
            if taken.pieces:
                batch = Batch(taken.pieces, self.batched, taken.reason, now, self._padding)
        if batch is not None:
            instance.busy_until = now + self.profile.seconds(batch.load)
            if self._idle and (self._retries or len(self._queue)):
                self._wake()
            return batch, results, None
        if self._closed and not len(self._queue):
            return None, results, None
        self._idle.append(instance)
        wakeup = self._queue.next_wakeup(now)
        return None, results, None if wakeup is None else wakeup - now

    def _ended(self, outcome: Outcome, batch: Batch, compute_s: float) -> list[Result]:
        """The result that an outcome completes, if any: a piece of a larger entry may not be the last."""
        piece = outcome.piece
        entry = piece.entry
        queue_s = batch.taken - entry.arrived
        if piece.whole:
            return [Result(entry.id, outcome.outputs, outcome.error, queue_s, compute_s, batch.rows)]
        result = self._assemblies.add(outcome, queue_s, compute_s, batch.rows)
        if result is None:
            return []
        if result.error is not None:
            self._queue.cancel(entry.id, "failed")
            if result.error.__cause__ is not None:
                self._complain_of_parts(result.error.__cause__)
                # It is said, and need not be again where the entry is a part of another.
                result.error.__cause__ = None
        return [result]

    def _dropped(self, drops: list[Drop]) -> list[Result]:
        results: list[Result] = []
        now = self._clock()
        for entry, _ in drops:
            self._assemblies.drop(entry.id)
        for entry, reason in drops:
            # An entry in parts is dropped with the first of them, once.
            drop = Result(entry.id, None, DROPPED[reason](), now - entry.arrived)
            alone, ended = self._fold([drop])
            if alone or ended:
                self._counts.dropped(reason)
            results += alone
            results += [whole.end(last) for whole, last in ended]
        return results

    def _stop_batching(self, why: str) -> list[Result]:
        """Serve every entry alone from here on; those that only run in pieces cannot be served."""
        self.batched = False
        self.wrong_rows = why
        self.limits.batch_rows = 1
        waiting = [self._queue.cancel(entry_id, "unbatched") for entry_id in self._assemblies.ids()]
        return self._dropped([drop for drop in waiting if drop is not None])

    def _new_instance(self, model: LoadedModel, device: str) -> None:
        """Start an instance; under the lock, so that nobody sees one whose thread does not run yet."""
        self._started += 1
        self._counts.add_device(device)
        name = f"{self.key.model}/{self.key.version}#{self._started}"
        instance = Instance(self, model, device, name, self._clock, self.complaints)
        instance.start()
        self._instances.append(instance)
        self._queue.bound_by_time(len(self._instances))

    def _replace(self, instance: Instance) -> None:
        now = self._clock()
        self._deaths.append(now)
        while self._deaths[0] < now - RESTART_WINDOW_S:
            self._deaths.popleft()
        if len(self._deaths) > RESTARTS_AT_MOST:
            log.error("an instance of %s/%s died too often and is not replaced", *self.key)
            self._lost.append(instance.device)
            return
        try:
            self._new_instance(instance.model, instance.device)
        except RuntimeError as fault:  # no thread is to be had
            log.error("an instance of %s/%s died and cannot be replaced: %s", *self.key, fault)
            self._lost.append(instance.device)

    def _give_up(self, reason: str) -> list[Result]:
        """Answer everything that waits: nobody is left to run it."""
        results: list[Result] = []
        for waiting in self._retries.clear():
            for piece in waiting.pieces:
                results += self._ended(Outcome(piece, None, DROPPED[reason]()), waiting, 0.0)
        return results + self._dropped(self._queue.drop_all(reason))

    def _cancel(self, entry_id: int, reason: str) -> Drop | None:
        """Take an entry out that waits, for the first time or to be run again; None if it does not."""
        drop = self._queue.cancel(entry_id, reason)
        if drop is None and (entry := self._retries.cancel(entry_id)) is not None:
            drop = Drop(entry, reason)
        return drop

    def _cancel_parts(self, whole: Whole, reason: str) -> Drop | None:
        """Drop the parts that still wait, and with them the entry; None, and all goes on, if none waits."""
        ids = [part.entry.id for part in whole.entry.parts]
        waited = [one for one in ids if self._cancel(one, reason) is not None]
        if not waited:
            return None
        for part_id in waited:
            del self._wholes[part_id]
        self._let_go(whole)
        return Drop(whole.entry, reason)

    def _let_go(self, whole: Whole) -> None:
        """The entry has its result; those of parts that are running are still to come, and go nowhere."""
        whole.over = True
        for part in whole.entry.parts:
            if self._assemblies.drop(part.entry.id):
                self._wholes.pop(part.entry.id, None)
        del self._wholes[whole.entry.id]

    def _fold(self, results: list[Result]) -> tuple[list[Result], list[tuple[Whole, Result]]]:
        """The results of what was offered as it ran, and the entries that end with the result of a part."""
        folded, ended = [], []
        for result in results:
            whole = self._wholes.pop(result.entry_id, None)
            if whole is None:
                folded.append(result)
            elif not whole.over and whole.add(result):
                if self._cancel_parts(whole, "failed") is None:
                    self._let_go(whole)
                ended.append((whole, result))
        return folded, ended

    def _put(self, results: list[Result]) -> None:
        ended: list[tuple[Whole, Result]] = []
        if results and self._wholes:
            with self._lock:
                results, ended = self._fold(results)
        if results:
            self._outbox.put(results)
        # Neither under the lock nor before the neighbours have theirs: joining takes as long as it is large.
        for whole, last in ended:
            own = whole.end(last, self._most_joined_bytes)
            if own.error is not None and own.error.__cause__ is not None:
                self._complain_of_parts(own.error.__cause__)
            self._outbox.put([own])

    def _complain_of_parts(self, fault: BaseException) -> None:
        unsaid = self.complaints.unsaid("parts")
        if unsaid is not None:
            log.warning(
                "%s/%s gave parts that cannot be joined (as %d times before, unsaid): %s",
                *self.key, unsaid, fault,
            )  # fmt: skip
