"""One loaded copy of a version, with a thread of its own that runs a batch whenever it is free."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from typing import Final, Protocol

from inferpool.backends.base import DeviceLost, LoadedModel, ran_out_of_memory
from inferpool.errors import InferpoolError, ModelFailed, ModelRejected, Overloaded, Reason
from inferpool.gradient_names import are_gradients
from inferpool.pool.batch import (
    RUNS,
    Batch,
    Outcome,
    RowSlice,
    Run,
    WrongRows,
    gather,
    gather_separately,
    scatter,
    select,
    wanted_outputs,
)
from inferpool.pool.buckets import BucketedModel
from inferpool.pool.log_limits import LogLimiter
from inferpool.pool.ports import LOWEST_PRIORITY, Entry
from inferpool.pool.redaction import redact_error, refusal_text
from inferpool.system.cpu_pace import PACE
from inferpool.tensors import Tensors

PART_PAUSE_S: Final = 0.005
"""The longest pause after a part of a large entry, or after what nobody waits for, in seconds.

Smaller entries may wait for the instance.
"""

log = logging.getLogger(__name__)


class BatchSource(Protocol):
    """The side of a pool that its instances see."""

    def next_batch(self, instance: Instance) -> Batch | None:
        """Block until there is a batch to run; None when the instance is to end."""

    def finish(self, instance: Instance, batch: Batch, run: Run) -> None:
        """Take the outcomes of a batch."""

    def died(self, instance: Instance, batch: Batch | None) -> None:
        """Take note that the instance's thread is ending by accident, while it ran `batch`."""


class Instance:
    """A thread that takes a batch when it is free, runs it, and hands over the outcomes."""

    def __init__(
        self,
        source: BatchSource,
        model: LoadedModel,
        device: str,
        name: str,
        clock: Callable[[], float],
        log_limiter: LogLimiter,
    ) -> None:
        """`name` is `model/version#number`, for log lines. `log_limiter` limits lines that requests cause.

        The pool keeps some facts here, under its lock. `batch` runs since the moment `began`, and is
        expected to take `expected_s`, until `busy_until`; `counted_s` seconds of it are in the metrics. It
        was asked to stop at the moment `stop_asked`. An instance that `is_surplus` ends after its run,
        because another has replaced it.
        """
        self.device = device
        self.name = name
        self.model = model
        self._bucketed = model if isinstance(model, BucketedModel) else None
        self.busy_until = 0.0
        self.lost: Reason | None = None
        self.woken = False
        self.batch: Batch | None = None
        self.began = 0.0
        self.counted_s = 0.0
        self.expected_s = 0.0
        self.stop_asked = math.inf
        self.is_surplus = False
        self._source = source
        self._clock = clock
        self._log_limiter = log_limiter
        self._wake = threading.Lock()
        self._wake.acquire()
        # Not `_thread`: mypyc would name a field of C `__thread`, which is a keyword.
        self._worker = threading.Thread(target=self._run_batches, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread; raises RuntimeError if the system has no more threads."""
        self._worker.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._worker.is_alive()

    def join(self, timeout_s: float) -> bool:
        """Wait until the thread has ended; False if it has not within `timeout_s`."""
        self._worker.join(timeout_s)
        return not self._worker.is_alive()

    def wake(self) -> None:
        """Let `wait` return. Only for an instance that waits or is about to, and once for each wait."""
        self._wake.release()

    def wait(self, timeout_s: float | None) -> bool:
        """Block until woken; False if `timeout_s` passed first."""
        return self._wake.acquire(timeout=-1 if timeout_s is None else max(0.0, timeout_s))

    def run(self, batch: Batch) -> Run:
        """Run a batch. Whatever the model raises becomes the outcome of the slices that made it raise."""
        started = self._clock()
        try:
            outcomes = self._infer(batch)
        except WrongRows as wrong:
            log.error("%s: %s; batching is off from here on", self.name, wrong)
            outcomes, undivided = self._run_separately(batch)
            return Run(outcomes, self._clock() - started, False, str(wrong), undivided)
        except Exception as error:
            if self._is_stopped():
                return Run([], self._clock() - started, False)
            self.lost = self.model.lost()
            if self.lost is not None:
                # Not an outcome of these entries: nothing can run on the device in this process again.
                raise DeviceLost(self.lost) from error
            run = self._isolate(batch, error)
            run.compute_s = self._clock() - started
            return run
        wanted = batch.slices[0].entry.outputs
        clean = wanted is None or not are_gradients(wanted)
        return Run(outcomes, self._clock() - started, clean)

    def stop(self) -> None:
        """Ask the run to end; the pool has said why in `batch`. Called under the pool's lock, any thread."""
        self.model.stop_run(self._worker.ident or 0)

    def _is_stopped(self) -> bool:
        """Whether the batch that this thread runs was asked to stop. Then no part of it begins to run."""
        return self.batch is not None and self.batch.stopped != RUNS

    def _without_answered(self, slices: list[RowSlice]) -> list[RowSlice]:
        """Leave out slices for which nobody waits any more."""
        answered = None if self.batch is None else self.batch.answered
        return slices if answered is None else [each for each in slices if each.entry.id not in answered]

    def _infer(self, batch: Batch) -> list[Outcome]:
        slices, padding = batch.slices, batch.padding
        if self._bucketed is not None:
            outputs = self._bucketed.run_parts(gather_separately(slices, padding), wanted_outputs(slices))
        else:
            outputs = self.model.run(gather(slices, padding), wanted_outputs(slices))
        entry = slices[0].entry
        if not batch.batched or entry.group == entry.id:
            # No other entry shares this run, so all rows are the entry's.
            scattered = [select(outputs, entry.outputs)]
        else:
            scattered = scatter(outputs, slices, padding)
        return [Outcome(each, own, None) for each, own in zip(slices, scattered, strict=True)]

    def run_alone(self, row_slice: RowSlice) -> Tensors:
        """Return the outputs of a slice without neighbours; raises whatever the model raises."""
        (outcome,) = self._infer(Batch([row_slice], False, "alone", 0.0))
        return outcome.outputs or {}

    def _run_separately(self, batch: Batch) -> tuple[list[Outcome], list[Entry]]:
        """Run each request of a batch alone: the rows of its outputs cannot be told apart by their number.

        The rows of a request's part run one by one, because only single rows can be joined with those of
        other parts. Also returns the entries of which the batch has only some rows.
        """
        outcomes: list[Outcome] = []
        undivided: list[Entry] = []
        for each in self._without_answered(batch.slices):
            if self._is_stopped():
                break
            if each.entry.part_of:
                pieces = [RowSlice(each.entry, row, row + 1) for row in range(each.start, each.stop)]
            elif each.has_all_rows:
                pieces = [each]
            else:
                undivided.append(each.entry)
                continue
            for piece in pieces:
                if self._is_stopped():
                    break
                outcomes += self.run(Batch([piece], False, batch.reason, batch.taken)).outcomes
        return outcomes, undivided

    def _isolate(self, batch: Batch, error: Exception) -> Run:
        """Run the halves of a batch that raised `error`, and those of each half that raises, down to one."""
        if len(batch.slices) == 1:
            guilty = batch.slices[0]
            return Run([Outcome(guilty, None, self._failure(guilty, error))], 0.0, False)
        middle = len(batch.slices) // 2
        outcomes: list[Outcome] = []
        undivided: list[Entry] = []
        wrong_rows: Reason | None = None
        for half in map(self._without_answered, (batch.slices[:middle], batch.slices[middle:])):
            if not half or self._is_stopped():
                continue
            run = self.run(Batch(half, batch.batched, batch.reason, batch.taken, batch.padding))
            outcomes += run.outcomes
            undivided += run.undivided
            wrong_rows = wrong_rows or run.wrong_rows
        return Run(outcomes, 0.0, False, wrong_rows, undivided)

    def _failure(self, guilty: RowSlice, error: Exception) -> InferpoolError:
        """Return the error for a slice that made the model raise `error`, all alone."""
        if ran_out_of_memory(error):
            self._log_failure(guilty, error)
            return Overloaded(
                "memory ran out while the model ran this request; send fewer rows, or try again later"
            )
        rejection = self.model.rejection(error)
        if rejection is not None:
            return ModelRejected(refusal_text(rejection, guilty.entry.inputs))
        self._log_failure(guilty, error)
        return ModelFailed("the model failed on this request")

    def _log_failure(self, guilty: RowSlice, error: Exception) -> None:
        # A client can make the model fail as often as it likes, and this thread has batches to run.
        suppressed = self._log_limiter.suppressed(f"{type(error).__module__}.{type(error).__qualname__}")
        if suppressed is not None:
            redacted = redact_error(error, guilty.entry.inputs)
            log.warning(
                "%s failed on request %s (%d more since the last such line): %s",
                self.name, guilty.entry.request_id, suppressed, redacted, exc_info=redacted,
            )  # fmt: skip

    def _run_batches(self) -> None:
        batch: Batch | None = None
        try:
            self.model.begin()
            while (batch := self._source.next_batch(self)) is not None:
                _mark_running(batch)
                last = batch.slices[-1]
                is_part = last.is_split or last.entry.priority == LOWEST_PRIORITY
                self._source.finish(self, batch, self.run(batch))
                # The thread waits between batches, and must not keep the last one in memory meanwhile.
                batch = None
                if is_part:
                    # A large entry could keep a core busy for seconds, and use up the quota for all. So could
                    # the passes of explanations.
                    PACE.step(PART_PAUSE_S)
        except BaseException:
            log.exception("%s on %s died", self.name, self.device)
            self._source.died(self, batch)


def _mark_running(batch: Batch) -> None:
    """Tell the web processes which entries run, in case that this process does not survive the run."""
    for row_slice in batch.slices:
        mark = row_slice.entry.mark
        if mark is not None:
            mark[row_slice.entry.mark_at] = 1
