"""A plan: how a version is served, and the settings that the plan must respect."""

from __future__ import annotations

from dataclasses import dataclass

from inferpool.backends.row_verdict import Evidence
from inferpool.errors import Reason
from inferpool.pool.latency_model import Measurement
from inferpool.pool.row_cost import RowCost
from inferpool.repository.load.batching_proof import Fault
from inferpool.repository.load.declared_shapes import NO_CORRECTIONS, ShapeCorrections


@dataclass(frozen=True, slots=True)
class Plan:
    """The decisions and the measurements.

    Attributes:
        batched: whether rows of different requests share a run; `reason` says why, or why not.
        max_rows: the most rows of a batch; 1 if not batched.
        instances: threads that run batches at the same time, on each device.
        threads: threads that the runtime uses within a run.
        table: seconds by batch size.
        buckets: the sizes that batches are rounded up to on a GPU; empty if any size runs as it is.
        fault: why rows share no run, by which the remedy is found; None if they do.
        evidence: what shows that rows may share a run; None if they do not.
        row_cost: what a row costs by its elements; None if all rows cost the same, or no other size runs.
        row_bytes: bytes of the inputs of a row that was measured; 0 if none was.
        shapes: what the model's file says of shapes, though runs show it to be otherwise.
        waited: the share of the time in which the thread that measured waited for a core.
    """

    batched: bool
    reason: Reason
    max_rows: int
    instances: int
    threads: int
    table: tuple[Measurement, ...] = ()
    buckets: tuple[int, ...] = ()
    fault: Fault | None = None
    evidence: Evidence | None = None
    row_cost: RowCost | None = None
    row_bytes: int = 0
    shapes: ShapeCorrections = NO_CORRECTIONS
    waited: float = 0.0


@dataclass(frozen=True, slots=True)
class PlanConstraints:
    """The owner's settings that a plan must respect; the planner decides whatever is None.

    Attributes:
        cores: cores that the model may use in all, at least 1.
        budget_s: seconds that measuring may take; 0 measures nothing.
        batching: False turns batching off.
        max_rows: the most rows of a batch.
        instances: the number of instances.
        threads: threads of a run.
        gpu: whether the model runs on a GPU, where instances share no copy and cores are not scarce.
        weighed: False if rows of several sizes are weighed elsewhere, as texts are by their tokens.
    """

    cores: int
    budget_s: float
    batching: bool = True
    max_rows: int | None = None
    instances: int | None = None
    threads: int | None = None
    gpu: bool = False
    weighed: bool = True
