"""Runs of a pool that end early: because they take too long, or because nobody waits for them any more.

`run_limits` says when; this module does what follows. A run that does not stop makes its instance hang, and
the pool goes on without that instance. The caller holds the pool's lock.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from inferpool.errors import Reason
from inferpool.pool.admission import Admission
from inferpool.pool.batch import ABANDONED, PARTED, RUNS, TIMED_OUT, Batch, RowSlice
from inferpool.pool.completion import Completion
from inferpool.pool.instance import Instance
from inferpool.pool.instance_set import InstanceSet
from inferpool.pool.ports import Result
from inferpool.pool.retries import Retries
from inferpool.pool.run_limits import HUNG, PART, STOP
from inferpool.pool.run_watcher import RunWatcher
from inferpool.pool.stats import hung_reason

log = logging.getLogger(__name__)


class RunStopper:
    """Stops the runs of one pool."""

    def __init__(
        self,
        instances: InstanceSet,
        admission: Admission,
        retries: Retries,
        watcher: RunWatcher,
        clock: Callable[[], float],
    ) -> None:
        """The arguments are the pool's own parts; `watcher` has the limits, and is told of runs that hang."""
        self._instances = instances
        self._admission = admission
        self._retries = retries
        self._watcher = watcher
        self._clock = clock

    def check(
        self, completion: Completion, results: list[Result], *, closed: bool
    ) -> tuple[float, Reason | None]:
        """Stop runs that take too long, and count on instances no more whose runs do not stop.

        Adds the results of requests that get none from their runs. Returns when to check again, infinity if
        there is nothing to wait for, and which share of the instances hang if another one does.
        """
        soonest = math.inf
        hung = False
        now = self._clock()
        for instance in self._instances.running():
            batch = instance.batch
            if batch is None or self._instances.is_hung(instance):
                continue
            nobody_waits = not batch.waiting_slices()
            action, moment = self._watcher.limits.judge(
                now,
                instance.began,
                instance.expected_s,
                instance.stop_asked,
                nobody_waits,
                parts=len(batch.slices) > 1 or self._retries.can_put_off(batch),
            )
            if action == STOP:
                is_first = batch.stopped == RUNS
                self._stop(instance, ABANDONED if nobody_waits else TIMED_OUT)
                if is_first and len(batch.slices) == 1 and not nobody_waits:
                    completion.time_out(batch.slices[0], batch, results)
            elif action == PART:
                self._stop(instance, PARTED)
            elif action == HUNG:
                hung = True
                self._hang(instance, batch, completion, results, closed=closed)
            soonest = min(soonest, moment)
        return soonest, hung_reason(self._instances.states()) if hung else None

    def leave(self, request_id: int) -> list[tuple[RowSlice, Batch]]:
        """Tell the batches that run rows of a request that it has its result; returns what of it runs.

        A run is asked to stop once nobody waits for any entry in it.
        """
        found: list[tuple[RowSlice, Batch]] = []
        for instance in self._instances.running():
            batch = instance.batch
            if batch is None:
                continue
            own = [each for each in batch.slices if (each.entry.part_of or each.entry.id) == request_id]
            if not own:
                continue
            found += [(each, batch) for each in own]
            batch.answer([each.entry.id for each in own])
            if not batch.waiting_slices():
                self._stop(instance, ABANDONED)
                self._watcher.wake()
        return found

    def _stop(self, instance: Instance, why: int) -> None:
        """Ask a run to stop."""
        batch = instance.batch
        if batch is None:
            return
        if instance.stop_asked == math.inf:
            instance.stop_asked = self._clock()
        if batch.stopped == RUNS:
            batch.stopped = why
            if why != ABANDONED:
                log.warning(
                    "%s: a batch of %d rows has run for %.0f s, and is stopped%s",
                    instance.name, batch.rows, instance.stop_asked - instance.began,
                    "; its requests run again, one by one" if why == PARTED else "",
                )  # fmt: skip
        instance.stop()

    def _hang(
        self, instance: Instance, batch: Batch, completion: Completion, results: list[Result], *, closed: bool
    ) -> None:
        """Go on without an instance whose run does not stop."""
        log.error(
            "%s on %s hangs: a run has taken %.0f s and does not stop",
            instance.name, instance.device, self._clock() - instance.began,
        )  # fmt: skip
        ends = self._watcher.on_hung is not None
        self._instances.hang(instance, replace=not (ends or closed))
        self._admission.bound_by_time(len(self._instances))
        waiting = batch.waiting_slices()
        if len(waiting) == 1 and len(batch.slices) == 1:
            completion.time_out(waiting[0], batch, results)
        elif not ends:
            batch.answer([each.entry.id for each in waiting])
            for row_slice in waiting:
                completion.retry_timed_out(row_slice, batch, results)
        if not len(self._instances) and not ends:
            results += completion.give_up("draining" if closed else "lost")
        self._instances.wake_some(len(self._retries))
