"""The outcome of the check of batching: whether rows may share a run, and the rows that showed it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from inferpool.backends.base import LoadedModel
from inferpool.backends.row_verdict import Evidence
from inferpool.errors import Reason
from inferpool.repository.load.batching_remedies import Obstacle
from inferpool.repository.load.comparison import READ_SLACK, compare_outputs
from inferpool.repository.load.list_outputs import ListsAsTables, has_lists
from inferpool.repository.load.runnable_rows import count_rows, rows_between
from inferpool.tensors import Array, Tensors


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


@dataclass(frozen=True, slots=True)
class BatchingProof:
    """The result of the check, and the rows that it was made with.

    Attributes:
        reason: a sentence for `/models`, whatever the result.
        fault: why rows may not share a run; None if they may.
        evidence: what shows that they may; None if they may not.
        rows: different rows that the model runs, along the first dimension; empty if none were found.
        alone: the outputs of each row alone, joined along the first dimension; empty unless `batched`.
        magnitudes: the sizes of the rows' inputs, by which outputs are compared; None if all are alike.
        ordinary: the indexes of the rows whose runs cost what an ordinary request costs.
    """

    reason: Reason
    fault: Fault | None = None
    evidence: Evidence | None = None
    rows: Tensors = field(default_factory=dict)
    alone: Tensors = field(default_factory=dict)
    magnitudes: Array | None = None
    ordinary: tuple[int, ...] = ()

    @property
    def batched(self) -> bool:
        """Whether rows may share a run."""
        return self.fault is None

    @property
    def timed_rows(self) -> Tensors:
        """The rows whose runs cost what an ordinary request costs: one row if rows share no run."""
        if not self.batched:
            return rows_between(self.rows, 0, 1)
        return {name: tensor[list(self.ordinary)] for name, tensor in self.rows.items()}

    def disagreement(self, models: Sequence[LoadedModel], count: int) -> Reason | None:
        """How the answers of `models` to batches of `count` rows differ from those of the rows alone.

        Each model runs on a thread of its own, at the same time as the others. The batches begin at other
        rows, so that none of the models answers what another does. Raises what a model raises.
        """

        available = count_rows(self.rows)

        def run(number: int) -> Reason | None:
            chosen = [(row + number) % available for row in range(count)]
            model = models[number]
            if has_lists(model.signature):
                model = ListsAsTables(model)
            outputs = model.run({name: tensor[chosen] for name, tensor in self.rows.items()})
            slack = READ_SLACK if self.evidence is Evidence.GRAPH else 1.0
            return compare_outputs(
                model.signature, outputs, self.alone, chosen, model.rounding, self.magnitudes, slack
            ).fault

        if len(models) == 1:
            return run(0)
        with ThreadPoolExecutor(len(models)) as threads:
            return next(filter(None, threads.map(run, range(len(models)))), None)


class Disproven(Exception):
    """Runs of the plan give other answers than the rows alone; the text says which."""


def refuted(fault: Fault, rows: Tensors | None = None) -> BatchingProof:
    """The result for a model whose rows may not share a run; it runs `rows` one by one."""
    return BatchingProof(fault.reason, fault, rows=rows or {})
