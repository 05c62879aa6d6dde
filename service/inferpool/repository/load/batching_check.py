"""Whether rows of different requests may share a run: checked once, at load (law 5).

Different rows run one by one and in several groupings: eight rows, or fewer if the model is slow. Batching is
safe if every output has one row for each row of the input, and if each row gets the same answer in company as
alone, within the datatype's rounding. A model fails the check if it mixes rows (normalises over the batch,
quantises the batch with one scale), if its first dimension is fixed, or if it draws random numbers.

The rows come from the model's golden samples. Without samples they are made up from the signature, with a
fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np

from inferpool.backends.base import LoadedModel
from inferpool.backends.row_verdict import Evidence, Independence, RowVerdict
from inferpool.errors import Reason, short_reason
from inferpool.repository.load.batching_remedies import Obstacle
from inferpool.repository.load.comparison import compare_outputs
from inferpool.repository.load.runnable_rows import ROWS, find_runnable_rows, rows_between
from inferpool.tensors import ANY, JSON, Array, Signature, Tensors, shape_text

_GROUPINGS: Final = {
    ROWS: ((0, 1, 2, 3, 4, 5, 6, 7), (2, 3, 4), (7, 6), (5, 0, 3, 1, 6)),
    3: ((0, 1, 2), (2, 0)),
    2: ((1, 0),),
}
"""Which rows run together, by the number of rows; the slower the model, the fewer rows it runs."""


class Fault(NamedTuple):
    """Why rows may not share a run.

    Attributes:
        obstacle: the kind of fault, by which the remedy is found.
        reason: a sentence for `/models`.
        tensor: the name of the input or output at fault; "" if the fault is not that of one.
        is_input: whether `tensor` is an input.
    """

    obstacle: Obstacle
    reason: Reason
    tensor: str = ""
    is_input: bool = False


UNREAD: Final = RowVerdict(Independence.UNKNOWN, "its graph was not read")


@dataclass(frozen=True, slots=True)
class BatchingProof:
    """The result of the check, and the rows that it was made with.

    Attributes:
        reason: a sentence for `/models`, whatever the result.
        fault: why rows may not share a run; None if they may.
        evidence: what shows that they may; None if they may not.
        rows: different rows that the model runs, along the first dimension; empty if none were found.
        alone: the outputs of each row alone, joined along the first dimension; empty unless `batched`.
    """

    reason: Reason
    fault: Fault | None = None
    evidence: Evidence | None = None
    rows: Tensors = field(default_factory=dict)
    alone: Tensors = field(default_factory=dict)

    @property
    def batched(self) -> bool:
        """Whether rows may share a run."""
        return self.fault is None


def refuted(fault: Fault, rows: Tensors | None = None) -> BatchingProof:
    """The result for a model whose rows may not share a run; it runs `rows` one by one."""
    return BatchingProof(fault.reason, fault, rows=rows or {})


def check_batching(
    model: LoadedModel,
    samples: Sequence[Tensors],
    budget_s: float,
    clock: Callable[[], float],
    graph: RowVerdict = UNREAD,
) -> BatchingProof:
    """Find out whether rows of `model` may share a run; `samples` are inputs that it is known to take.

    `graph` is what reading the model's graph has shown. If an operation mixes rows, no run can prove the
    opposite, because runs show the rows that were tried and no others. If none does, the runs confirm it.

    Takes at most about `budget_s` seconds, or six runs of one row if these take longer.
    """
    obstacle = _obstacle(model.signature)
    if obstacle is not None:
        return refuted(obstacle)
    rows, seconds, unrunnable = find_runnable_rows(model, samples, clock)
    if unrunnable is not None:
        reason = f"no made-up rows could be run ({unrunnable}); add a golden sample to prove it with"
        return refuted(Fault(Obstacle.NOTHING_RUNS, reason))
    declared = _fixed_output(model.signature)
    if graph.independence is Independence.MIXES:
        fault = Fault(Obstacle.ROWS_MIXED, f"rows depend on one another: {graph.reason}")
        if declared is not None:
            fault = declared._replace(reason=f"{declared.reason} ({graph.reason})")
        return refuted(fault, rows_between(rows, 0, 1))
    count = next((size for size in _GROUPINGS if seconds * _runs(size) <= budget_s), min(_GROUPINGS))
    rows = rows_between(rows, 0, count)
    try:
        alone = _run_alone(model, rows, count)
        if isinstance(alone, Fault):
            return refuted(declared or alone, rows)
        result = _compare_groupings(model, rows, alone, count, graph)
    except Exception as error:  # noqa: BLE001 - a model may raise anything in company; it is served alone
        reason = f"the model raised {short_reason(error)!r} when rows ran together"
        return refuted(declared or Fault(Obstacle.RAISED, reason), rows)
    if isinstance(result, Fault):
        return refuted(declared or result, rows)
    sizes = ", ".join(map(str, sorted({len(grouping) for grouping in _GROUPINGS[count]})))
    evidence = Evidence.GRAPH if graph.independence is Independence.INDEPENDENT else Evidence.RUNS
    read = graph.reason if evidence is Evidence.GRAPH else f"by runs alone ({graph.reason})"
    return BatchingProof(
        f"rows answer the same alone and together: {read}"
        f" (tried {sizes}; largest relative difference {result:.1g})",
        evidence=evidence,
        rows=rows,
        alone=alone,
    )


def _run_alone(model: LoadedModel, rows: Tensors, count: int) -> Tensors | Fault:
    """The outputs of each row alone, joined, or the fault of an output that does not follow the rows."""
    each = [model.run(rows_between(rows, row, row + 1)) for row in range(count)]
    alone: Tensors = {}
    for name in each[0]:
        outputs = [answer[name] for answer in each]
        fault = _row_fault(outputs)
        if fault is not None:
            obstacle = Obstacle.ROWS_LOST if isinstance(outputs[0], np.ndarray) else Obstacle.NO_TENSOR
            return Fault(obstacle, f'output "{name}" {fault}', name)
        alone[name] = np.concatenate(outputs)
    return alone


def _compare_groupings(
    model: LoadedModel, rows: Tensors, alone: Tensors, count: int, graph: RowVerdict
) -> float | Fault:
    """The largest relative difference between rows together and rows `alone`, or what is wrong."""
    worst = 0.0
    for grouping in _GROUPINGS[count]:
        outputs = model.run({name: tensor[list(grouping)] for name, tensor in rows.items()})
        fault, difference = compare_outputs(model.signature, outputs, alone, grouping, model.rounding)
        if fault is not None:
            return Fault(Obstacle.ROWS_MIXED, f"{fault} when {len(grouping)} rows run together")
        worst = max(worst, difference)
    read = graph.independence is Independence.INDEPENDENT
    if not read and not any(_tells_apart(tensor) for tensor in alone.values()):
        return Fault(
            Obstacle.ROWS_ALIKE,
            "every row that was tried gets the same answer, which proves nothing; add a golden sample",
        )
    return worst


def _tells_apart(alone: Array) -> bool:
    """Whether an output differs between rows, in a finite number or a text."""
    first = alone[:1]
    if alone.dtype.kind == "f":
        same = (alone == first) | ~np.isfinite(alone)
        return not bool(same.all())
    return not bool((alone == first).all())


def _runs(count: int) -> int:
    """How many rows a check with `count` rows runs in all."""
    return count + sum(map(len, _GROUPINGS[count]))


def _obstacle(signature: Signature) -> Fault | None:
    """Why the signature alone forbids batching; None if it does not.

    A declared shape of an output forbids nothing, because files declare wrong ones and runtimes do not care.
    """
    if all(spec.optional for spec in signature.inputs):
        return Fault(Obstacle.NO_REQUIRED_INPUT, "the model has no input that every request must have")
    for spec in signature.inputs:
        what = f'input "{spec.name}"'
        if spec.optional:
            continue
        if spec.shape is None:
            return Fault(Obstacle.UNKNOWN_RANK, f"the rank of {what} is not known", spec.name, True)
        if not spec.shape:
            return Fault(Obstacle.SCALAR, f"{what} is a scalar: it has no rows", spec.name, True)
        if spec.shape[0] != ANY:
            reason = f"the first dimension of {what} is fixed at {spec.shape[0]}"
            return Fault(Obstacle.FIXED_ROWS, reason, spec.name, True)
    for spec in signature.outputs:
        if spec.datatype == JSON:
            return Fault(Obstacle.NO_TENSOR, f'output "{spec.name}" is no tensor: it has no rows', spec.name)
    return None


def _fixed_output(signature: Signature) -> Fault | None:
    """The fault of an output whose declared first dimension is fixed, if runs show that it is; else None."""
    for spec in signature.outputs:
        if spec.shape and spec.shape[0] != ANY:
            reason = f'the first dimension of output "{spec.name}" is fixed at {spec.shape[0]}'
            return Fault(Obstacle.FIXED_ROWS, reason, spec.name)
    return None


def _row_fault(outputs: list[Any]) -> Reason | None:
    """How an output of single rows fails to have one row each; None if it has."""
    for output in outputs:
        if not isinstance(output, np.ndarray):
            return "is no tensor"
        if not output.ndim or output.shape[0] != 1:
            return f"is {shape_text(output.shape)} for one row: it does not follow the rows of the input"
    if any(output.shape != outputs[0].shape for output in outputs):
        return "has another shape for each row"
    return None
