"""Audits of a version whose batching is proven by runs alone: rows of a batch run again, alone.

Runs at load show only the rows that were tried. So now and then an entry of a batch runs once more without
its neighbours, when an instance has nothing else to do. If its answer differs by more than rounding explains,
rows of this version depend on one another, and the pool stops batching them.

Plain policy: the pool says what has run and asks for what to run, with moments of its own clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import numpy as np

from inferpool.backends.base import ran_out_of_memory
from inferpool.errors import OutOfMemory, Reason
from inferpool.pool.batch import Batch, Outcome, RowSlice, Run
from inferpool.pool.ports import Entry
from inferpool.tensors import Tensors

Compare: TypeAlias = Callable[[Tensors, Tensors, Sequence[Tensors]], Reason | None]
"""Compares an answer with the one of a run alone; returns a difference that rounding does not explain.

The answers to other rows, which come last, give the scale of each number.
"""

SHARE: Final = 0.005
"""Audits may take this share of the time that batches take."""
FIRST_AUDITS: Final = 4
"""So many audits take place as soon as there is a batch, because a version is least known at first."""
OVERDUE_S: Final = 30.0
"""A sample that has waited so long for an idle instance runs before the next batch."""
MOST_BYTES: Final = 16 * 1024 * 1024
"""Inputs of an entry, and tensors of its neighbours, that are kept for an audit. Larger ones are not."""
MOST_NEIGHBOURS: Final = 8
"""So many neighbours of an entry give the scale of its outputs."""
ALIKE: Final = 4.0
"""A neighbour gives the scale only if the largest numbers of the inputs differ by at most this factor: a
larger neighbour has larger terms, beside which a wrong answer to small numbers looks like rounding."""


class AuditSample:
    """An entry's slice that ran in a batch, and what the batch answered.

    Attributes:
        row_slice: the slice.
        outputs: the outputs that its entry got.
        neighbours: the outcomes of other slices, which give the scale of each output.
        batch_rows: how many rows the batch had.
        kept: moment at which the batch had run.
    """

    __slots__ = ("batch_rows", "kept", "neighbours", "outputs", "row_slice")

    def __init__(
        self, row_slice: RowSlice, outputs: Tensors, neighbours: list[Outcome], batch_rows: int, kept: float
    ) -> None:
        self.row_slice = row_slice
        self.outputs = outputs
        self.neighbours = neighbours
        self.batch_rows = batch_rows
        self.kept = kept


class Audit:
    """Chooses the entries of one version that run again, and compares. The caller holds the pool's lock.

    Only `check` runs the model, and is called without the lock.
    """

    def __init__(self, compare: Compare) -> None:
        self._compare = compare
        self._credit_s = 0.0
        self._sampled = 0
        self._sample: AuditSample | None = None

    def consider(self, batch: Batch, run: Run, alone_s: float, now: float) -> None:
        """Take note of a batch that has run; keeps an entry of it if an audit is due.

        `alone_s` is how long a run of one row is expected to take.
        """
        # Credit is bounded, so that a long time without batches is not followed by many audits.
        self._credit_s = min(self._credit_s + SHARE * run.compute_s, FIRST_AUDITS * alone_s)
        slices = batch.slices
        if self._sample is not None or len(slices) < 2 or not (run.clean and batch.batched):
            return
        if self._sampled >= FIRST_AUDITS and self._credit_s < alone_s:
            return
        chosen = run.outcomes[self._sampled % len(slices)]
        self._sampled += 1
        if chosen.outputs is None or _bytes_of(chosen.row_slice.entry.inputs) > MOST_BYTES:
            return
        kept_bytes = _bytes_of(chosen.outputs)
        others: list[Outcome] = []
        for each in run.outcomes:
            if each is chosen or each.outputs is None:
                continue
            kept_bytes += _bytes_of(each.outputs) + _bytes_of(each.row_slice.entry.inputs)
            if kept_bytes > MOST_BYTES or len(others) == MOST_NEIGHBOURS:
                break
            others.append(each)
        # Copied, because the memory of the inputs is used again once the entries have their results.
        self._sample = AuditSample(
            _own_inputs(chosen.row_slice),
            chosen.outputs,
            [Outcome(_own_inputs(each.row_slice), each.outputs, None) for each in others],
            batch.rows,
            now,
        )

    def overdue(self, now: float) -> bool:
        """Whether an entry has waited too long for an idle instance."""
        return self._sample is not None and now - self._sample.kept >= OVERDUE_S

    def take(self) -> AuditSample | None:
        """Return the entry that an idle instance is to run again; None if there is none."""
        sample, self._sample = self._sample, None
        return sample

    def ran(self, seconds: float) -> None:
        """Take note of how long an audit took."""
        self._credit_s -= seconds

    def check(self, sample: AuditSample, run_alone: Callable[[RowSlice], Tensors]) -> Reason | None:
        """Run an entry again, alone; returns how its answer differed in the batch, None if it did not.

        An entry that fails alone although it has an answer differs, too. If the entry gets another answer at
        each run alone, the reason says so.
        """
        try:
            alone = run_alone(sample.row_slice)
            alike = _alike_outputs(sample)
            fault = self._compare(sample.outputs, alone, alike)
            if fault is None:
                return None
            if self._compare(run_alone(sample.row_slice), alone, alike) is not None:
                return "the model answers one row differently each time, so nothing is known of its batches"
        except Exception as error:  # noqa: BLE001 - a model may raise anything, and the instance goes on
            if isinstance(error, OutOfMemory) or ran_out_of_memory(error):
                return None  # this says nothing of the answer
            return f"a row that had an answer in a batch fails alone ({type(error).__name__})"
        return f"{fault} in a batch of {sample.batch_rows} rows"


def _own_inputs(row_slice: RowSlice) -> RowSlice:
    """A copy of a slice that has memory of its own."""
    entry = row_slice.entry
    inputs = {name: tensor.copy() for name, tensor in entry.inputs.items()}
    copied = Entry(
        entry.id, entry.key, inputs, entry.rows, entry.group, entry.nbytes, entry.arrived,
        outputs=entry.outputs, row_load=entry.row_load, request_id=entry.request_id,
    )  # fmt: skip
    copied.part_of = entry.part_of
    return RowSlice(copied, row_slice.start, row_slice.stop)


def _alike_outputs(sample: AuditSample) -> list[Tensors]:
    """The outputs of neighbours whose inputs are about as large as those of the entry."""
    own = _magnitude(sample.row_slice)
    found: list[Tensors] = []
    for each in sample.neighbours:
        other = _magnitude(each.row_slice)
        if each.outputs is not None and own <= ALIKE * other and other <= ALIKE * own:
            found.append(each.outputs)
    return found


def _magnitude(row_slice: RowSlice) -> float:
    """The largest finite number among the inputs of a slice; 0 if it has none."""
    largest = 0.0
    for tensor in row_slice.entry.inputs.values():
        if tensor.dtype.kind in "fiu":
            sizes = np.abs(tensor[row_slice.start : row_slice.stop].astype(np.float64))
            largest = max(largest, float(np.max(sizes, initial=0.0, where=np.isfinite(sizes))))
    return largest


def _bytes_of(tensors: Tensors) -> int:
    return sum(64 * len(each) if isinstance(each, list) else each.nbytes for each in tensors.values())
