"""Whether rows of different requests may share a run: checked once, at load (law 5).

First, a row runs alone twice: a model that draws random numbers or remembers earlier requests is told apart.
Then different rows run one by one and in several groupings. Batching is safe if every output has one row for
each row of the input, and if each row gets the same answer in company as alone, within the datatype's
rounding. A model fails the check if it mixes rows (normalises over the batch, quantises the batch with one
scale), or if the first dimension of an input is fixed.

A few rows confirm what reading the graph has shown. If the graph could not be read to its end, the runs
decide: of many rows, each in a range of its own, in several positions, company and sizes. The rows come from
the model's golden samples. Without samples they are made up from the signature, with a fixed seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, Final, NamedTuple

import numpy as np

from inferpool.backends.base import LoadedModel
from inferpool.backends.made_up_inputs import SEED
from inferpool.backends.row_verdict import Evidence, Independence, RowVerdict
from inferpool.errors import OutOfMemory, Reason, short_reason
from inferpool.repository.load.adversarial_rows import make_adversarial_rows, resized_rows
from inferpool.repository.load.batching_proof import BatchingProof, Fault, refuted
from inferpool.repository.load.batching_remedies import Obstacle
from inferpool.repository.load.comparison import READ_SLACK, compare_outputs, input_magnitudes
from inferpool.repository.load.free_sizes import made_up_request
from inferpool.repository.load.runnable_rows import (
    MOST_SAMPLE_ROWS,
    ROWS,
    count_rows,
    find_runnable_rows,
    repeat_rows,
    rows_between,
    rows_by_shape,
)
from inferpool.tensors import ANY, JSON, Array, Signature, Tensors, shape_text

_CONFIRMED_ROWS: Final = 4
_CONFIRMING: Final = ((0, 1, 2, 3), (2, 0))
"""Which rows run together if the graph has shown that they are independent."""
_ORDINARY: Final = ((2, 3, 4), (7, 6), (5, 0, 3, 1, 6))
"""Which ordinary rows run together if the runs are to show it."""
_FEWEST: Final = 2
"""Rows that it takes to show anything."""
_OTHER_SIZES: Final = 2
"""How many other sizes of dimensions of any size are tried."""


UNREAD: Final = RowVerdict(Independence.UNKNOWN, "its graph was not read")


def check_batching(
    model: LoadedModel, samples: Sequence[Tensors], graph: RowVerdict = UNREAD
) -> BatchingProof:
    """Find out whether rows of `model` may share a run; `samples` are inputs that it is known to take.

    `graph` is what reading the model's graph has shown. If an operation mixes rows, no run can prove the
    opposite, because runs show the rows that were tried and no others. If none does, a few runs confirm it.
    Otherwise the runs decide: they try to break the claim. The runs are the same on a slow machine.
    """
    obstacle = _obstacle(model.signature)
    if obstacle is not None:
        return refuted(_changing_request(model, samples) or obstacle)
    rows, unrunnable = find_runnable_rows(model, samples)
    if unrunnable is not None:
        reason = f"no made-up rows could be run ({unrunnable}); add a golden sample to prove it with"
        return refuted(Fault(Obstacle.NOTHING_RUNS, reason))
    first = rows_between(rows, 0, 1)
    declared = _fixed_output(model.signature)
    try:
        changing = _changing(model, model.run(first), model.run(first))
        if changing is not None:
            return refuted(changing, first)
        if graph.independence is Independence.MIXES:
            fault = Fault(Obstacle.ROWS_MIXED, f"rows depend on one another: {graph.reason}")
            if declared is not None:
                fault = declared._replace(reason=f"{declared.reason} ({graph.reason})")
            return refuted(fault, first)
        if graph.independence is Independence.INDEPENDENT:
            result = _confirm(model, rows, graph)
        else:
            result = _try_to_break(model, rows, samples, graph)
    except Exception as error:  # noqa: BLE001 - a model may raise anything in company; it is served alone
        reason = f"the model raised {short_reason(error)!r} when rows ran together"
        result = Fault(Obstacle.RAISED, reason)
    if not isinstance(result, Fault):
        return result
    return refuted(result if result.obstacle is Obstacle.ANSWERS_CHANGE else declared or result, rows)


def _changing_request(model: LoadedModel, samples: Sequence[Tensors]) -> Fault | None:
    """Whether a model that is never batched answers the same request differently each time."""
    request = samples[0] if samples else made_up_request(model)
    if request:
        with suppress(Exception):  # the model may refuse the same request the next time
            return _changing(model, model.run(request), model.run(request))
    return None


def _changing(model: LoadedModel, before: Tensors, after: Tensors) -> Fault | None:
    """How two runs of the same inputs differ; None if they do not. Only tensors count."""
    for name, got in after.items():
        want = before[name]
        if not isinstance(got, np.ndarray) or not isinstance(want, np.ndarray):
            continue
        fault = "its shape differs" if got.shape != want.shape else None
        if fault is None and got.ndim:
            fault = compare_outputs(
                model.signature, {name: got}, {name: want}, range(len(want)), model.rounding
            ).fault
        elif fault is None and got != want and not (got != got and want != want):
            fault = f'output "{name}" is {got}, then {want}'
        if fault is not None:
            return Fault(
                Obstacle.ANSWERS_CHANGE,
                f"the model answers differently each time: {fault} when the same row runs alone again;"
                " it draws random numbers, or remembers earlier requests",
                name,
            )
    return None


def _confirm(model: LoadedModel, rows: Tensors, graph: RowVerdict) -> BatchingProof | Fault:
    """A few rows, alone and together, for a model whose graph mixes no rows."""
    group = _run_alone(model, rows_between(rows, 0, _CONFIRMED_ROWS))
    if isinstance(group, Fault):
        return group
    count = len(group.kept)
    groupings = tuple(grouping for grouping in _CONFIRMING if max(grouping) < count)
    difference = _compare_groupings(model, group, groupings, READ_SLACK)
    if isinstance(difference, Fault):
        return difference
    return _proof(group, range(count), Evidence.GRAPH, graph.reason, groupings, difference)


def _try_to_break(
    model: LoadedModel, rows: Tensors, samples: Sequence[Tensors], graph: RowVerdict
) -> BatchingProof | Fault:
    """Rows in ranges of their own and of several shapes, in several positions and company."""
    added = make_adversarial_rows(model, rows)
    ordinary, others = count_rows(rows), count_rows(added)
    order = _interleaved(ordinary, others)
    joined = {name: np.concatenate([tensor, added[name]])[order] for name, tensor in rows.items()}
    group = _run_alone(model, joined)
    if isinstance(group, Fault):
        return group
    usual = [position for position, kept in enumerate(group.kept) if order[kept] < ordinary]
    unusual = [position for position, kept in enumerate(group.kept) if order[kept] >= ordinary]
    if len(usual) < _FEWEST:
        return Fault(Obstacle.NOTHING_RUNS, "the model runs too few rows to prove it; add golden samples")
    # Before anything is concluded from company: what a model remembers shows after other rows have run.
    again = model.run(rows_between(group.rows, usual[0], usual[0] + 1))
    changing = _changing(model, rows_between(group.alone, usual[0], usual[0] + 1), again)
    if changing is not None:
        return changing
    groupings = _groupings(usual, unusual)
    worst = _compare_groupings(model, group, groupings)
    if isinstance(worst, Fault):
        return worst
    if not any(_tells_apart(tensor) for tensor in group.alone.values()):
        return Fault(
            Obstacle.ROWS_ALIKE,
            "every row that was tried gets the same answer, which proves nothing; add a golden sample",
        )
    for resized in _other_shapes(model, rows, samples):
        other = _run_alone(model, resized)
        if isinstance(other, Fault):
            return other
        positions = tuple(range(len(other.kept)))
        if len(positions) >= _FEWEST:
            difference = _compare_groupings(model, other, (*_in_batches(positions), positions[1::-1]))
            if isinstance(difference, Fault):
                return difference
            worst = max(worst, difference)
    extent = f"{len(unusual)} of {len(group.kept)} rows in ranges of their own"
    reason = f"by runs alone ({graph.reason}), {extent}"
    return _proof(group, usual, Evidence.RUNS, reason, groupings, worst)


def _proof(
    group: _Group,
    ordinary: Sequence[int],
    evidence: Evidence,
    reason: Reason,
    groupings: Sequence[Sequence[int]],
    difference: float,
) -> BatchingProof:
    sizes = ", ".join(map(str, sorted({len(grouping) for grouping in groupings})))
    return BatchingProof(
        f"rows answer the same alone and together: {reason}"
        f" (tried {sizes}; largest relative difference {difference:.1g})",
        evidence=evidence,
        rows=group.rows,
        alone=group.alone,
        magnitudes=group.magnitudes,
        ordinary=tuple(ordinary),
    )


class _Group(NamedTuple):
    """Rows of one shape that ran alone.

    Attributes:
        rows: the rows that the model ran.
        alone: their outputs, joined along the first dimension.
        magnitudes: the sizes of their inputs.
        kept: the position of each row among those that were to run.
    """

    rows: Tensors
    alone: Tensors
    magnitudes: Array
    kept: list[int]


def _run_alone(model: LoadedModel, rows: Tensors) -> _Group | Fault:
    """Run each row alone. Rows that the model refuses are left out.

    Returns the fault of an output that does not follow the rows.
    """
    kept: list[int] = []
    each: list[Tensors] = []
    error: Exception | None = None
    for row in range(count_rows(rows)):
        try:
            each.append(model.run(rows_between(rows, row, row + 1)))
        except OutOfMemory:
            raise
        except Exception as refusal:  # noqa: BLE001 - a made-up row may be nonsense to the model
            error = refusal
            continue
        kept.append(row)
    if not each:
        assert error is not None
        raise error
    alone: Tensors = {}
    for name in each[0]:
        outputs = [answer[name] for answer in each]
        fault = _row_fault(outputs)
        if fault is not None:
            obstacle = Obstacle.ROWS_LOST if isinstance(outputs[0], np.ndarray) else Obstacle.NO_TENSOR
            return Fault(obstacle, f'output "{name}" {fault}', name)
        alone[name] = np.concatenate(outputs)
    ran = {name: tensor[kept] for name, tensor in rows.items()}
    return _Group(ran, alone, input_magnitudes(model.signature, ran), kept)


def _compare_groupings(
    model: LoadedModel, group: _Group, groupings: Sequence[Sequence[int]], slack: float = 1.0
) -> float | Fault:
    """The largest relative difference between rows together and alone, or what is wrong.

    `slack` multiplies what counts as rounding.
    """
    worst = 0.0
    for grouping in groupings:
        outputs = model.run({name: tensor[list(grouping)] for name, tensor in group.rows.items()})
        fault, difference = compare_outputs(
            model.signature,
            outputs,
            group.alone,
            grouping,
            model.rounding,
            group.magnitudes,
            slack,
        )
        if fault is not None:
            return Fault(Obstacle.ROWS_MIXED, f"{fault} when {len(grouping)} rows run together")
        worst = max(worst, difference)
    return worst


def _interleaved(ordinary: int, others: int) -> list[int]:
    """All rows, with those in ranges of their own spread among the ordinary ones."""
    positions = [(position + 0.5) / ordinary for position in range(ordinary)]
    positions += [(position + 0.5) / others for position in range(others)]
    return sorted(range(ordinary + others), key=lambda row: positions[row])


def _groupings(usual: Sequence[int], unusual: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Which rows run together: each unusual row beside an ordinary one, and all in two orders."""
    rng = np.random.default_rng(SEED)
    everyone = sorted((*usual, *unusual))
    pairs = []
    for turn, row in enumerate(unusual):
        partner = usual[turn % len(usual)]
        pairs.append((row, partner) if turn % 2 else (partner, row))
    groupings = [tuple(usual[row % len(usual)] for row in grouping) for grouping in _ORDINARY]
    shuffled = list(map(int, rng.permutation(everyone)))
    return (*groupings, *pairs, *_in_batches(everyone), *_in_batches(shuffled))


def _in_batches(rows: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All rows, as many together as every model is expected to take."""
    for start in range(0, len(rows), ROWS):
        yield tuple(rows[start : start + ROWS])


def _other_shapes(model: LoadedModel, rows: Tensors, samples: Sequence[Tensors]) -> Iterator[Tensors]:
    """Rows of other shapes that the model runs: of golden samples, and with dimensions of other sizes."""
    shapes = [{name: tensor.shape[1:] for name, tensor in rows.items()}]
    few = rows_between(rows, 0, _CONFIRMED_ROWS)
    resized = islice(_runnable(model, resized_rows(model.signature, few)), _OTHER_SIZES)
    sampled = (
        repeat_rows(group, max(_FEWEST, min(count_rows(group), MOST_SAMPLE_ROWS)))
        for group in rows_by_shape(samples)
    )
    for group in (*sampled, *resized):
        shape = {name: tensor.shape[1:] for name, tensor in group.items()}
        if shape not in shapes:
            shapes.append(shape)
            yield group


def _runnable(model: LoadedModel, groups: Iterable[Tensors]) -> Iterator[Tensors]:
    for group in groups:
        try:
            model.run(rows_between(group, 0, 1))
        except OutOfMemory:
            raise
        except Exception:  # noqa: BLE001 - the model may have no such sizes
            continue
        yield group


def _tells_apart(alone: Array) -> bool:
    """Whether an output differs between rows, in a finite number or a text."""
    first = alone[:1]
    if alone.dtype.kind == "f":
        same = (alone == first) | ~np.isfinite(alone)
        return not bool(same.all())
    return not bool((alone == first).all())


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
