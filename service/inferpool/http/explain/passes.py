"""Runs rows for an explanation in the pool: batch by batch, behind all predictions, until time is up.

A worker thread makes the rows and reads the outputs. The event loop offers the entries, so the thread and
the loop meet in `Passes`.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import Final

from inferpool.errors import (
    DeadlineExceeded,
    Draining,
    InferpoolError,
    InternalError,
    NotReady,
    Refused,
)
from inferpool.http.explain.turns import SharedTurn, Turns
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.predictor import Predictor
from inferpool.pool.ports import Entry, Result
from inferpool.tensors import Tensors

IN_FLIGHT: Final = 2
"""Entries of an explanation at a time: one runs, and one waits, so that no instance waits for the thread.

Beside predictions it is one.
"""


class ClientGone(InferpoolError):
    """The client has disconnected, so nobody waits for the explanation."""


class _Pass:
    """An entry between its offer and its result."""

    __slots__ = ("entry", "future", "gradients", "ran", "tensors")

    def __init__(self, tensors: Tensors, gradients: tuple[str, ...]) -> None:
        self.tensors = tensors
        self.gradients = gradients
        self.ran = False
        self.entry: Entry | None = None
        self.future: Future[Result] = Future()


class Passes:
    """The passes of one explanation.

    `run` is for the worker thread, `abandon` for the event loop.

    Attributes:
        rows: how many rows the model has run.
        turns: when the thread may work beside predictions; the thread begins and ends them.
    """

    def __init__(
        self,
        predictor: Predictor,
        context: PredictContext,
        loop: asyncio.AbstractEventLoop,
        shared: SharedTurn,
        on_result: Callable[[Entry, Result], None],
    ) -> None:
        """`on_result` is called on the loop for every entry that ran."""
        self.rows = 0
        self._predictor = predictor
        self._context = context
        self._loop = loop
        self._on_result = on_result
        self._offered: set[_Pass] = set()
        self._gone = threading.Event()
        self.turns = Turns(shared, predictor.clock, self._gone)

    def most_rows(self, most: int) -> int:
        """Return how many rows the next batch has at most, if an entry may have `most`."""
        return min(most, self.turns.size.rows) if self.turns.is_busy else most

    def run(
        self, batches: Iterable[Tensors], until: float, gradients: tuple[str, ...] = ()
    ) -> Generator[Tensors]:
        """Yield the outputs of each batch of rows, in order; ends early at `until`, by the predictor's clock.

        With names of `gradients`, yield those in place of the outputs.
        The outputs of a batch are valid until the next ones are asked for. Raises ClientGone, and what a
        prediction raises.
        """
        waiting: deque[_Pass] = deque()
        # A pass that has been read ends with the offer of the next one, which wakes the loop once for both.
        read: _Pass | None = None
        rows = iter(batches)
        try:
            while self._left_s(until) > 0 and (tensors := next(rows, None)) is not None:
                waiting.append(self._send(_Pass(tensors, gradients), until, read))
                read = None
                # Once there are predictions, no pass is left to run during a rest.
                while len(waiting) >= (1 if self.turns.is_busy else IN_FLIGHT):
                    if read is not None:
                        self._end(read)
                        read = None
                    outputs = self._outputs(waiting[0], until)
                    if outputs is None:
                        return
                    yield outputs
                    read = waiting.popleft()
                    self.turns.next_part(until, self.rows)
            while waiting:
                outputs = self._outputs(waiting[0], until)
                if outputs is None:
                    return
                yield outputs
                self._end(waiting.popleft())
        finally:
            if read is not None:
                self._end(read)
            for each in waiting:
                self._end(each)

    def abandon(self) -> None:
        """Stop: the client is gone. Entries that wait are dropped, and do not run."""
        self._gone.set()
        for each in list(self._offered):
            self._drop(each)
            if not each.future.done():
                each.future.set_exception(ClientGone("the client is gone"))

    def _left_s(self, until: float) -> float:
        return until - self._predictor.clock()

    def _send(self, each: _Pass, until: float, read: _Pass | None = None) -> _Pass:
        self._loop.call_soon_threadsafe(self._offer, each, each.future, until, read)
        return each

    def _outputs(self, each: _Pass, until: float) -> Tensors | None:
        """Wait for the outputs of a pass; None if time is up before them."""
        while True:
            try:
                result = each.future.result(max(0.0, self._left_s(until)))
                each.ran = result.batch_rows > 0
                if result.error is not None:
                    raise result.error
            except (TimeoutError, DeadlineExceeded):
                return None
            except (NotReady, Draining):
                raise
            except Refused as refusal:
                if each.ran:  # a run lacked memory, and would again
                    raise
                # Predictions, or other requests of the tenant, come first. Later there may be room.
                if self._left_s(until) <= refusal.retry_after_s:
                    return None
                if self._gone.wait(refusal.retry_after_s):
                    raise ClientGone("the client is gone") from None
                each.future = Future()
                self._send(each, until)
                continue
            if result.outputs is None:
                raise InternalError("the model returned nothing")
            rows = each.entry.rows if each.entry is not None else 0
            self.rows += rows
            self.turns.size.ran(rows, result.compute_s)
            return result.outputs

    def _end(self, each: _Pass) -> None:
        self._loop.call_soon_threadsafe(self._drop, each)

    # On the event loop.

    def _offer(self, each: _Pass, future: Future[Result], until: float, read: _Pass | None) -> None:
        def arrived(result: Result) -> None:
            try:
                if each.entry is not None and result.outputs is not None:
                    self._on_result(each.entry, result)
            finally:
                if not future.done():
                    future.set_result(result)

        try:
            if read is not None:
                self._drop(read)
            if self._gone.is_set():
                raise ClientGone("the client is gone")
            self._drop(each)  # an entry that was refused by its engine is offered again
            self._offered.add(each)
            each.entry = self._predictor.submit_pass(
                self._context, each.tensors, until, arrived, each.gradients
            )
        except Exception as error:  # noqa: BLE001 - every error is the thread's to handle
            self._offered.discard(each)
            future.set_exception(error)

    def _drop(self, each: _Pass) -> None:
        entry = each.entry
        if entry is not None:
            each.entry = None
            self._predictor.end_pass(entry)
        self._offered.discard(each)
