"""Which rows are audited, how often, and what counts as a difference; with moments that the tests choose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from inferpool.errors import OutOfMemory
from inferpool.pool.audit import FIRST_AUDITS, MOST_BYTES, OVERDUE_S, SHARE, Audit
from inferpool.pool.batch import Batch, Outcome, RowSlice, Run
from inferpool.pool.ports import Entry, VersionKey
from inferpool.tensors import Tensors

ALONE_S = 0.001
RUN_S = 0.004


def equal(answer: Tensors, alone: Tensors, others: Sequence[Tensors]) -> str | None:
    """Outputs must be the same in every element."""
    for name, tensor in answer.items():
        if not np.array_equal(tensor, alone[name]):
            return f'output "{name}" differs'
    return None


def ran(entries: int = 4, *, rows: int = 1, clean: bool = True, columns: int = 2) -> Run:
    """How a batch of so many entries has run; each answer is twice its input."""
    outcomes = []
    for number in range(1, entries + 1):
        inputs = {"x": np.full((rows, columns), number, np.float32)}
        entry = Entry(number, VersionKey("m", 1), inputs, rows, None, 8, 0.0)
        outcomes.append(Outcome(RowSlice(entry, 0, rows), {"y": inputs["x"] * 2}, None))
    return Run(outcomes, RUN_S, clean)


def consider(audit: Audit, run: Run, now: float = 0.0, *, batched: bool = True) -> None:
    slices = [outcome.row_slice for outcome in run.outcomes]
    audit.consider(Batch(slices, batched, "drained", 0.0), run, ALONE_S, now)


def doubled(row_slice: RowSlice) -> Tensors:
    """The right answer, alone."""
    return {"y": row_slice.entry.inputs["x"] * 2}


def test_the_first_batches_are_audited_then_a_share_of_the_time() -> None:
    """Over ten thousand batches, audits take SHARE of their time, beside the first few."""
    audit = Audit(equal)
    audits = 0
    for _ in range(10_000):
        consider(audit, ran())
        sample = audit.take()
        if sample is not None:
            audits += 1
            audit.ran(ALONE_S)
        if audits == FIRST_AUDITS - 1:
            assert sample is not None
    expected = 10_000 * RUN_S * SHARE / ALONE_S
    assert audits <= expected + FIRST_AUDITS
    assert audits >= 0.9 * expected
    assert audits * ALONE_S < 0.01 * 10_000 * RUN_S


def test_each_entry_of_a_batch_has_its_turn() -> None:
    audit = Audit(equal)
    chosen = set()
    for _ in range(FIRST_AUDITS):
        consider(audit, ran(FIRST_AUDITS))
        sample = audit.take()
        assert sample is not None
        chosen.add(sample.row_slice.entry.id)
    assert chosen == set(range(1, FIRST_AUDITS + 1))


@pytest.mark.parametrize(
    ("run", "batched"),
    [
        (ran(1, rows=8), True),
        (ran(), False),
        (ran(clean=False), True),
        (ran(2, columns=MOST_BYTES // 4 + 1), True),
    ],
    ids=["alone", "unbatched", "raised", "large"],
)
def test_batches_without_company_or_too_large_are_not_audited(run: Run, batched: bool) -> None:
    audit = Audit(equal)
    consider(audit, run, batched=batched)
    assert audit.take() is None


def test_a_sample_that_waits_too_long_does_not_wait_for_an_idle_instance() -> None:
    audit = Audit(equal)
    assert not audit.overdue(1e9)
    consider(audit, ran(), now=100.0)
    consider(audit, ran(), now=120.0)
    assert not audit.overdue(100.0 + OVERDUE_S - 1)
    assert audit.overdue(100.0 + OVERDUE_S)
    assert audit.take() is not None
    assert audit.take() is None


def found(answers: Sequence[Tensors | Exception], run: Run | None = None) -> str | None:
    """The finding of an audit if runs alone give these answers, one after the other."""
    audit = Audit(equal)
    consider(audit, run or ran())
    sample = audit.take()
    assert sample is not None
    remaining = list(answers)

    def run_alone(row_slice: RowSlice) -> Tensors:
        answer = remaining.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return audit.check(sample, run_alone)


def row(*numbers: float) -> Tensors:
    return {"y": np.array([numbers], np.float32)}


def test_differences() -> None:
    right = row(2, 2)
    assert found([right]) is None
    assert found([row(2, 3), row(2, 3)]) == 'output "y" differs in a batch of 4 rows'
    assert found([row(2, 3), row(2, 4)]) == (
        "the model answers one row differently each time, so nothing is known of its batches"
    )
    assert found([ValueError("secret")]) == "a row that had an answer in a batch fails alone (ValueError)"
    for error in (
        OutOfMemory("none left"),
        MemoryError(),
        RuntimeError("Failed to allocate memory"),
    ):
        assert found([error]) is None


def test_neighbours_give_the_scale() -> None:
    """The comparison gets the answers to the other entries of the batch."""
    seen: list[Tensors] = []

    def keep(answer: Tensors, alone: Tensors, others: Sequence[Tensors]) -> str | None:
        seen.extend(others)
        return None

    audit = Audit(keep)
    run = ran(3)
    consider(audit, run)
    sample = audit.take()
    assert sample is not None
    assert audit.check(sample, doubled) is None
    assert seen == [run.outcomes[1].outputs, run.outcomes[2].outputs]


def test_much_larger_neighbours_give_no_scale() -> None:
    """A difference that is small beside their answers may be large for the answer that is compared."""
    counts: list[int] = []

    def keep(answer: Tensors, alone: Tensors, others: Sequence[Tensors]) -> str | None:
        counts.append(len(others))
        return None

    audit = Audit(keep)
    consider(audit, ran(8))
    sample = audit.take()
    assert sample is not None
    assert audit.check(sample, doubled) is None
    assert counts == [3], "1 beside 2, 3 and 4, but not beside 5 to 8"


def test_lists_are_kept_as_they_are() -> None:
    run = ran()
    for outcome in run.outcomes:
        outcome.outputs = {"y": [{"a": 1.0}]}  # type: ignore[dict-item]
    assert found([{"y": [{"a": 1.0}]}], run) is None  # type: ignore[dict-item]
    assert found([{"y": [{"a": 2.0}]}] * 2, run) == 'output "y" differs in a batch of 4 rows'  # type: ignore[dict-item]


def test_a_sample_keeps_its_inputs_when_shared_memory_is_used_again() -> None:
    audit = Audit(equal)
    run = ran()
    for outcome in run.outcomes:
        outcome.row_slice.entry.mark = memoryview(bytearray(1))
    memory = [outcome.row_slice.entry.inputs["x"] for outcome in run.outcomes]
    consider(audit, run)
    for tensor in memory:
        tensor[...] = np.nan
    sample = audit.take()
    assert sample is not None
    assert audit.check(sample, doubled) is None
    for each in sample.neighbours:
        assert np.isfinite(each.row_slice.entry.inputs["x"]).all()
