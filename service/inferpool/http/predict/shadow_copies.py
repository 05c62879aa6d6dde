"""Copies of requests for a shadow: sent after the real answer, compared with it, and never waited for."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from inferpool.codecs.text import Rows
from inferpool.errors import DeadlineExceeded, InferpoolError, Refused
from inferpool.http.predict.canary_choice import begin_cells
from inferpool.http.predict.results import ResultDispatcher
from inferpool.http.predict.served_version import ServedVersion
from inferpool.observe.families import SHADOW, SHADOW_OUTPUT
from inferpool.observe.metrics import Metrics
from inferpool.pool.ports import LOWEST_PRIORITY, Entry, Inbox, Part, Result, VersionKey
from inferpool.pool.splitting import split_entry
from inferpool.tensors import Array, Tensors, bf16_to_fp32

log = logging.getLogger(__name__)

MOST_COPIES: Final = 16
"""Copies of one process that wait, run or are compared at a time; further ones are dropped."""
MOST_HELD_BYTES: Final = 64 * 2**20
"""Bytes of the tensors that these copies hold together."""
MOST_COPIED_BYTES: Final = 4 * 2**20
"""Bytes of the inputs of a request that are copied at once, which takes a millisecond."""
COPY_TIMEOUT_S: Final = 5.0
"""How long a copy may take; a queue that takes longer refuses it at once."""
_HASHES: Final = 1 << 32
_GOLDEN: Final = 0x9E3779B1
"""2**32 divided by the golden ratio: multiples of it spread evenly, so each share takes every so-manieth."""

_COMPARED, _FAILED, _DROPPED, _UNLIKE, _LABEL_ROWS, _CHANGED_ROWS, _SENT_S, _COPY_S, _SLOWER = range(1, 10)
_LARGEST, _SUM, _NUMBERS, _NON_FINITE = range(1, 5)


class ShadowTarget:
    """A shadow, and where the figures about it are counted."""

    def __init__(self, metrics: Metrics, served: ServedVersion, number: int, share: float) -> None:
        """`number` is that of the trial, and `share` the share of requests that are copied."""
        key = served.view.key
        labels = (key.model, str(key.version))
        self.served = served
        self.number = number
        self._threshold = int(share * _HASHES)
        self._cells = begin_cells(metrics.cells(SHADOW, *labels), number)
        self._outputs = {
            spec.name: begin_cells(metrics.cells(SHADOW_OUTPUT, *labels, spec.name), number)
            for spec in served.signature.outputs
        }
        self._copies = {
            outcome: metrics.value("shadow_copies_total", *labels, outcome)
            for outcome in ("compared", "failed", "dropped")
        }
        self._sent_s = metrics.value("shadow_seconds_total", *labels, "sent")
        self._copy_s = metrics.value("shadow_seconds_total", *labels, "copy")

    def wants(self, entry_id: int) -> bool:
        """Whether the request of an entry is to be copied."""
        return (entry_id * _GOLDEN) % _HASHES < self._threshold

    def dropped(self) -> None:
        """Count a copy that was not run, or not in time."""
        self._copies["dropped"].add()
        self._add(_DROPPED, 1)

    def failed(self) -> None:
        """Count a copy that the shadow answered with an error."""
        self._copies["failed"].add()
        self._add(_FAILED, 1)

    def compared(self, found: Difference, sent_s: float, copy_s: float) -> None:
        """Count a copy that was compared, and the queue and compute time of the pair."""
        self._copies["compared"].add()
        self._sent_s.add(sent_s)
        self._copy_s.add(copy_s)
        if self._cells[0] != self.number:
            return  # a later trial counts
        amounts: tuple[tuple[int, float], ...] = (
            (_COMPARED, 1),
            (_UNLIKE, found.unlike),
            (_LABEL_ROWS, found.label_rows),
            (_CHANGED_ROWS, found.changed_rows),
            (_SENT_S, sent_s),
            (_COPY_S, copy_s),
            (_SLOWER, copy_s > sent_s),
        )
        for index, amount in amounts:
            self._add(index, amount)
        for name, each in found.outputs.items():
            cells = self._outputs[name]
            cells[_LARGEST] = max(cells[_LARGEST], each.largest)
            cells[_SUM] += each.total
            cells[_NUMBERS] += each.numbers
            cells[_NON_FINITE] += each.non_finite

    def _add(self, index: int, amount: float) -> None:
        if self._cells[0] == self.number:
            self._cells[index] += amount


@dataclass(slots=True)
class OutputSum:
    """The differences of one output: the largest, their sum, how many, and how many that are not finite."""

    largest: float = 0.0
    total: float = 0.0
    numbers: int = 0
    non_finite: int = 0


@dataclass(slots=True)
class Difference:
    """How the answer to a copy differs; `ShadowFigures` has the meaning of the fields."""

    outputs: dict[str, OutputSum] = field(default_factory=dict)
    unlike: bool = False
    label_rows: int = 0
    changed_rows: int = 0


class _Copied:
    """A request to be copied, until its copy is compared."""

    __slots__ = ("entry", "inputs", "nbytes", "outputs", "rows", "sent_s", "target", "then", "wanted")

    def __init__(
        self,
        target: ShadowTarget,
        inputs: Tensors,
        rows: list[Rows],
        wanted: tuple[str, ...] | None,
        then: Callable[[Result], None],
    ) -> None:
        self.target = target
        self.inputs = inputs
        self.rows = rows
        self.wanted = wanted
        self.then = then
        self.outputs: Tensors = {}
        self.sent_s = 0.0
        self.nbytes = 0
        self.entry: Entry | None = None


class ShadowCopies:
    """The copies of one process. All methods are called on the event loop; one thread compares."""

    def __init__(
        self,
        inbox: Inbox,
        results: ResultDispatcher,
        clock: Callable[[], float],
        entry_ids: itertools.count[int],
        release: Callable[[VersionKey, int], None] | None,
    ) -> None:
        """The arguments are those of `Predictor`, which numbers all entries by `entry_ids`."""
        self._inbox = inbox
        self._results = results
        self._clock = clock
        self._entry_ids = entry_ids
        self._release = release
        self._copies = 0
        self._held_bytes = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shadow")

    def follow(
        self,
        target: ShadowTarget,
        entry_id: int,
        inputs: Tensors,
        rows: list[Rows],
        wanted: tuple[str, ...] | None,
        then: Callable[[Result], None],
    ) -> Callable[[Result], None]:
        """Return what is to be called with the result of an entry instead of `then`, which it calls.

        Copies the request if its share is met. `rows` are the tokens of a text, by parts; `wanted` names the
        outputs that the request asks for.
        """
        if not target.wants(entry_id):
            return then
        if self._release is not None:
            # The memory of a body may be an engine's, and is used for others once the result has come.
            try:
                if sum(tensor.nbytes for tensor in inputs.values()) > MOST_COPIED_BYTES:
                    target.dropped()
                    return then
                inputs = {name: _owned(tensor) for name, tensor in inputs.items()}
            except Exception:
                log.exception("a request could not be copied for a shadow")
                target.failed()
                return then
        copied = _Copied(target, inputs, rows, wanted, then)

        def deliver(result: Result) -> None:
            self._deliver(copied, result)

        return deliver

    def _deliver(self, copied: _Copied, result: Result) -> None:
        is_taken = False
        if result.outputs is not None:
            # A fault of the copy must not cost the request its answer.
            try:
                is_taken = self._take(copied, result, result.outputs)
                if not is_taken:
                    copied.target.dropped()
            except Exception:
                log.exception("a request could not be copied for a shadow")
                copied.target.failed()
        try:
            copied.then(result)
        finally:
            if is_taken:
                self._results.later(lambda: self._send(copied))

    def _take(self, copied: _Copied, result: Result, outputs: Tensors) -> bool:
        """Keep the outputs that a copy is compared with, and count its bytes; False if there is no room."""
        tensors = [copied.inputs, *(each.tensors for each in copied.rows[1:]), outputs]
        nbytes = sum(getattr(value, "nbytes", 64) for each in tensors for value in each.values())
        if self._copies >= MOST_COPIES or self._held_bytes + nbytes > MOST_HELD_BYTES:
            return False
        # The memory of an engine's outputs is used for others once the answer is out.
        lent = self._release is not None
        copied.outputs = {name: _kept(value, lent) for name, value in outputs.items()}
        copied.sent_s = result.queue_s + result.compute_s
        copied.nbytes = nbytes
        self._copies += 1
        self._held_bytes += nbytes
        return True

    def _send(self, copied: _Copied) -> None:
        """Offer the copy, now that the answer is written."""
        try:
            entry = copied.entry = self._entry(copied)
            self._results.subscribe(entry.id, lambda result: self._take_result(copied, result))
            try:
                self._inbox.offer(entry)
            except BaseException:
                self._results.unsubscribe(entry.id)
                raise
        except (Refused, DeadlineExceeded):
            self._end(copied, copied.target.dropped)
        except InferpoolError:
            self._end(copied, copied.target.failed)
        except Exception:
            log.exception("a request could not be copied for a shadow")
            self._end(copied, copied.target.failed)

    def _entry(self, copied: _Copied) -> Entry:
        if len(copied.rows) < 2:
            return self._part(copied, copied.inputs)
        parts = [Part(self._part(copied, each.tensors), each.indices) for each in copied.rows]
        return split_entry(next(self._entry_ids), parts)

    def _part(self, copied: _Copied, tensors: Tensors) -> Entry:
        served, now = copied.target.served, self._clock()
        rows = served.rows(tensors)
        entry_id = next(self._entry_ids)
        group, row_load = served.group(entry_id, tensors, rows)
        nbytes = max(8 * rows, sum(tensor.nbytes for tensor in tensors.values()))
        return Entry(
            entry_id, served.view.key, tensors, rows, group, nbytes, now, now + COPY_TIMEOUT_S,
            LOWEST_PRIORITY, copied.wanted, row_load, "shadow",
        )  # fmt: skip

    def _take_result(self, copied: _Copied, result: Result) -> None:
        target, outputs = copied.target, result.outputs
        if outputs is None:
            late = isinstance(result.error, (Refused, DeadlineExceeded))
            self._end(copied, target.dropped if late else target.failed)
            return
        copy_s = result.queue_s + result.compute_s
        work = self._thread.submit(compare, target.served, copied.outputs, outputs)

        def compared() -> None:
            if work.exception() is not None:
                log.error("the answer of a shadow could not be compared", exc_info=work.exception())
                self._end(copied, target.failed)
            else:
                self._end(copied, lambda: target.compared(work.result(), copied.sent_s, copy_s))

        work.add_done_callback(lambda _: self._results.later(compared))

    def _end(self, copied: _Copied, count: Callable[[], None]) -> None:
        self._copies -= 1
        self._held_bytes -= copied.nbytes
        if copied.entry is not None and self._release is not None:
            self._release(copied.entry.key, copied.entry.id)
        count()


def compare(served: ServedVersion, sent: Tensors, copy: Tensors) -> Difference:
    """How the outputs of a copy differ from those that were sent; `served` is the shadow."""
    found = Difference()
    for name, value in sent.items():
        other = copy.get(name)
        if other is None or name not in served.signature.outputs_by_name:
            found.unlike = True
            continue
        if not isinstance(value, np.ndarray) or not isinstance(other, np.ndarray):
            differs = float(value != other)  # objects of JSON
            found.outputs[name] = OutputSum(differs, differs, 1)
            continue
        if other.shape != value.shape:
            found.unlike = True
            continue
        one, two = value, other
        if name in served.bf16:
            one, two = bf16_to_fp32(one), bf16_to_fp32(two)
        found.outputs[name] = _differences(one, two)
        if name in served.class_names and one.ndim == 2 and one.size:
            found.label_rows = len(one)
            found.changed_rows = int(np.count_nonzero(_best(one) != _best(two)))
    return found


def _differences(one: Array, two: Array) -> OutputSum:
    if one.dtype.kind not in "fiu" or two.dtype.kind not in "fiu":
        differs = np.asarray(one != two)
        count = int(np.count_nonzero(differs))
        return OutputSum(float(count > 0), float(count), int(differs.size))
    wide, other = one.astype(np.float64), two.astype(np.float64)
    equal = (wide == other) | (np.isnan(wide) & np.isnan(other))
    comparable = equal | (np.isfinite(wide) & np.isfinite(other))
    with np.errstate(invalid="ignore"):
        gaps = np.where(equal, 0.0, np.abs(wide - other))[comparable]
    return OutputSum(
        float(gaps.max(initial=0.0)), float(gaps.sum()), int(gaps.size), int(np.count_nonzero(~comparable))
    )


def _best(scores: Array) -> Array:
    """The column of the best score of each row; NaN is worse than any other, as in `LabelsCodec`."""
    if scores.dtype.kind == "f":
        wide = scores.astype(np.float64)
        scores = np.where(np.isnan(wide), -np.inf, np.maximum(wide, np.finfo(np.float64).min))
    best: Array = scores.argmax(axis=1)
    return best


def _kept(value: Array, lent: bool) -> Array:
    return value.copy() if lent and isinstance(value, np.ndarray) else value


def _owned(tensor: Array) -> Array:
    return tensor if tensor.flags.owndata else tensor.copy()
