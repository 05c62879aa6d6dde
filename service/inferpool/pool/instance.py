"""One loaded copy of a version with a thread of its own, which runs batches whenever it is free."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from inferpool.backends.base import LoadedModel
from inferpool.errors import InferpoolError, ModelFailed
from inferpool.pool.batch import WrongRows, gather, gather_parts, scatter, select, wanted_outputs
from inferpool.pool.buckets import BucketedModel
from inferpool.pool.entry_queue import Piece
from inferpool.pool.log_limits import LogLimiter, redact_error
from inferpool.pool.padding import Padding
from inferpool.tensors import Tensors

log = logging.getLogger(__name__)


class Batch:
    """Pieces that run together.

    Attributes:
        pieces: at least one.
        batched: whether outputs have rows that must agree with the inputs' (law 5).
        reason: why it is no larger, for `batches_total`.
        taken: moment at which the instance took it.
        padding: how rows of different lengths are brought to one; None where all are alike.
        rows: rows of all pieces.
    """

    __slots__ = ("batched", "padding", "pieces", "reason", "rows", "taken")

    def __init__(
        self,
        pieces: list[Piece],
        batched: bool,
        reason: str,
        taken: float,
        padding: Padding | None = None,
    ) -> None:
        self.pieces = pieces
        self.batched = batched
        self.reason = reason
        self.taken = taken
        self.padding = padding
        # Counted once: each of the batch's results tells it.
        self.rows = 0
        for piece in pieces:
            self.rows += piece.rows

    @property
    def load(self) -> float:
        """What they cost, in rows like those that were measured at load."""
        load = 0.0
        for piece in self.pieces:
            load += piece.rows * piece.entry.row_load
        return load


class Outcome:
    """How a piece ended: with its outputs, or with an error."""

    __slots__ = ("error", "outputs", "piece")

    def __init__(self, piece: Piece, outputs: Tensors | None, error: InferpoolError | None) -> None:
        self.piece = piece
        self.outputs = outputs
        self.error = error


class Run:
    """What became of a batch: one outcome a piece; `clean` if it ran whole and at the first go."""

    __slots__ = ("clean", "compute_s", "outcomes", "wrong_rows")

    def __init__(self, outcomes: list[Outcome], compute_s: float, clean: bool, wrong_rows: str = "") -> None:
        self.outcomes = outcomes
        self.compute_s = compute_s
        self.clean = clean
        self.wrong_rows = wrong_rows


class Work(Protocol):
    """What an instance needs of its pool."""

    def next_batch(self, instance: Instance) -> Batch | None:
        """Block until there is a batch to run; None when the instance is to end."""

    def finish(self, instance: Instance, batch: Batch, run: Run) -> None:
        """Take the outcomes of a batch."""

    def died(self, instance: Instance, batch: Batch | None) -> None:
        """The instance's thread is ending by accident, with `batch` under way."""


class Instance:
    """A thread that takes a batch when it is free, runs it, and hands over the outcomes."""

    def __init__(
        self,
        work: Work,
        model: LoadedModel,
        device: str,
        name: str,
        clock: Callable[[], float],
        complaints: LogLimiter,
    ) -> None:
        """`name` is what log lines call it: `model/version#number`; `complaints` bounds those of requests."""
        self.device = device
        self.name = name
        self.model = model
        self._laddered = model if isinstance(model, BucketedModel) else None
        self.busy_until = 0.0
        self.woken = False
        self._work = work
        self._clock = clock
        self._complaints = complaints
        self._wake = threading.Lock()
        self._wake.acquire()
        self._runner = threading.Thread(target=self._live, name=name, daemon=True)

    def start(self) -> None:
        """Begin to take batches."""
        self._runner.start()

    def join(self, timeout_s: float) -> bool:
        """Wait until the thread has ended; False if it has not within `timeout_s`."""
        self._runner.join(timeout_s)
        return not self._runner.is_alive()

    def wake(self) -> None:
        """Let `wait` return. Only after the instance said it would wait, and once for each time."""
        self._wake.release()

    def wait(self, timeout_s: float | None) -> bool:
        """Block until woken; False if `timeout_s` passed first."""
        return self._wake.acquire(timeout=-1 if timeout_s is None else max(0.0, timeout_s))

    def run(self, batch: Batch) -> Run:
        """Run a batch; whatever the model raises becomes the outcome of the pieces that made it raise."""
        started = self._clock()
        try:
            outcomes = self._infer(batch)
        except WrongRows as wrong:
            log.error("%s: %s; batching is off from here on", self.name, wrong)
            failure = ModelFailed("the model gave the wrong number of rows for a batch")
            outcomes = [Outcome(piece, None, failure) for piece in batch.pieces]
            return Run(outcomes, self._clock() - started, False, str(wrong))
        except Exception as error:  # noqa: BLE001 - models raise anything, and only the guilty may fail
            outcomes, wrong_rows = self._isolate(batch, error)
            return Run(outcomes, self._clock() - started, False, wrong_rows)
        return Run(outcomes, self._clock() - started, True)

    def _infer(self, batch: Batch) -> list[Outcome]:
        pieces, padding = batch.pieces, batch.padding
        if self._laddered is not None:
            outputs = self._laddered.run_parts(gather_parts(pieces, padding), wanted_outputs(pieces))
        else:
            outputs = self.model.run(gather(pieces, padding), wanted_outputs(pieces))
        entry = pieces[0].entry
        if not batch.batched or entry.group == entry.id:
            # Nothing shares this run, so nothing has to be told apart.
            parts = [select(outputs, entry.outputs)]
        else:
            parts = scatter(outputs, pieces, padding)
        return [Outcome(piece, part, None) for piece, part in zip(pieces, parts, strict=True)]

    def _isolate(self, batch: Batch, error: Exception) -> tuple[list[Outcome], str]:
        """Run the halves of a batch that raised `error`, theirs if they raise, down to the guilty."""
        if len(batch.pieces) == 1:
            piece = batch.pieces[0]
            self._complain(piece, error)
            return [Outcome(piece, None, ModelFailed("the model failed on this request"))], ""
        middle = len(batch.pieces) // 2
        outcomes: list[Outcome] = []
        wrong_rows = ""
        for half in (batch.pieces[:middle], batch.pieces[middle:]):
            run = self.run(Batch(half, batch.batched, batch.reason, batch.taken, batch.padding))
            outcomes += run.outcomes
            wrong_rows = wrong_rows or run.wrong_rows
        return outcomes, wrong_rows

    def _complain(self, piece: Piece, error: Exception) -> None:
        # A client can make the model fail as often as it likes, and this thread has batches to run.
        unsaid = self._complaints.unsaid(f"{type(error).__module__}.{type(error).__qualname__}")
        if unsaid is not None:
            said = redact_error(error, piece.entry.inputs)
            log.warning(
                "%s failed on request %s (as on %d before, unsaid): %s",
                self.name, piece.entry.request_id, unsaid, said, exc_info=said,
            )  # fmt: skip

    def _live(self) -> None:
        batch: Batch | None = None
        try:
            self.model.begin()
            while (batch := self._work.next_batch(self)) is not None:
                self._work.finish(self, batch, self.run(batch))
                # The thread waits between batches; what it ran must not stay in memory meanwhile.
                batch = None
        except BaseException:
            log.exception("%s on %s died", self.name, self.device)
            self._work.died(self, batch)
