"""Decides how a version is served: batched or not, the rows of a batch, instances and threads.

The planner measures by running the model at load, within a budget of time. `PlanCache` keeps the plan, so
that the next start need not measure.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

from inferpool.backends.base import LoadedModel
from inferpool.backends.row_verdict import Independence, RowVerdict
from inferpool.errors import short_reason
from inferpool.pool.buckets import choose_buckets, sizes_between
from inferpool.pool.latency_model import Measurement
from inferpool.repository.lifecycle import MEASURE, PROVE, Phase
from inferpool.repository.load.batching_check import UNREAD, check_batching
from inferpool.repository.load.batching_proof import BatchingProof, Disproven, Fault, refuted
from inferpool.repository.load.batching_remedies import Obstacle
from inferpool.repository.load.declared_shapes import (
    ShapeCorrections,
    free_names,
    output_corrections,
    without_names,
)
from inferpool.repository.load.free_sizes import bytes_of, free_axes, made_up_request
from inferpool.repository.load.instance_choice import InstanceChoice
from inferpool.repository.load.list_outputs import ListsAsTables, NoTableError, has_lists
from inferpool.repository.load.plan import Plan, PlanConstraints
from inferpool.repository.load.row_cost_fit import RowCostFit
from inferpool.repository.load.run_timer import PrepareRun, RunTimer, prepare_run
from inferpool.repository.load.runnable_rows import count_rows, repeat_rows, rows_between
from inferpool.tensors import ANY, Tensors

log = logging.getLogger(__name__)

MOST_ROWS: Final = 256
"""The largest batch that is measured, in rows, unless `model.toml` sets a larger one."""

UNMEASURED_ROWS: Final = 32
"""The largest batch in rows if nothing could be measured."""

NEARLY: Final = 0.97
"""The batch limit is the smallest batch that reaches this share of the best rate seen, in rows a second."""

FLAT: Final = 1.02
"""Doubling the rows brings nothing if the rate rises to less than this many times the best before."""

TRUST: Final = 8
"""A measurement at load weighs as much as this many runs while serving."""

MOST_BATCH_BYTES: Final = 256 << 20
"""Batches whose inputs take more memory are not measured, unless `model.toml` sets the number of rows."""

GROWING: Final = 0.6
"""The share of the budget in which batch sizes are tried; the rest tries instances and threads."""

WEIGHING: Final = 0.15
"""The share of the budget in which rows of other sizes are timed, if the model takes any."""

BATCH_S: Final = 1e-4
"""The cost of a batch in addition to its run: two wake-ups, gather, scatter. More rows share it."""


class Planner:
    """Checks and measures one version."""

    def __init__(
        self,
        load: Callable[[int], LoadedModel],
        constraints: PlanConstraints,
        clock: Callable[[], float],
        prepare: PrepareRun = prepare_run,
        enter: Callable[[Phase], None] = lambda phase: None,
    ) -> None:
        """`load(threads)` loads one more copy of the model, for that many threads a run.

        `prepare` prepares the runs that are timed if rows share runs, on the thread that makes the runs.
        `enter` is told when the planner begins to prove, and to measure.
        """
        self._load = load
        self._enter = enter
        self._prepare = prepare
        self._constraints = constraints
        self._clock = clock
        self._timer = RunTimer(clock, constraints.budget_s, prepare)
        self._instances = InstanceChoice(load, constraints, self._timer)

    def make(self, model: LoadedModel, samples: Sequence[Tensors] = (), graph: RowVerdict = UNREAD) -> Plan:
        """Make the plan with `model`, which was loaded for one thread a run.

        `samples` are inputs that the model is known to take; the check of batching prefers them. `graph`
        is what reading the model's graph has shown of its rows.
        """
        constraints = self._constraints
        checked = model
        if graph.independence is Independence.INDEPENDENT and has_lists(model.signature):
            checked = ListsAsTables(model)
        self._enter(PROVE)
        proof = refuted(Fault(Obstacle.TURNED_OFF, "turned off in model.toml"))
        if constraints.batching:
            try:
                proof = check_batching(checked, samples, graph)
            except NoTableError:
                proof = check_batching(model, samples, graph)
        unproven = samples[0] if samples else {}
        self._enter(MEASURE)
        try:
            plan, table = self._choose(model, proof, proof.timed_rows or unproven)
        except Disproven as error:
            proof = refuted(Fault(Obstacle.ROWS_MIXED, str(error)), proof.timed_rows)
            plan, table = self._choose(model, proof, proof.timed_rows)
        one = rows_between(proof.timed_rows, 0, 1) or unproven
        return self._weigh(plan, model, one or made_up_request(model), table, sampled=bool(samples))

    def _choose(
        self, model: LoadedModel, proof: BatchingProof, rows: Tensors
    ) -> tuple[Plan, list[Measurement]]:
        """Decide batches, instances and threads; also returns the times of batches in one instance.

        Raises Disproven if runs of the plan give other answers than the rows alone.
        """
        constraints = self._constraints
        budget_s = constraints.budget_s
        if constraints.weighed and any(ANY in (spec.shape or ())[1:] for spec in model.signature.inputs):
            budget_s *= 1 - WEIGHING
        began = self._clock()
        self._timer.ends = began + GROWING * budget_s
        self._timer.prepare = self._prepare if proof.batched else prepare_run
        if not rows or not constraints.budget_s:
            return self._unmeasured_plan(model, proof), []
        table = self._grow_batch(model, proof, rows)
        if not table:
            instances, threads = self._instances.unmeasured()
            fault = proof.fault or Fault(Obstacle.NOTHING_RUNS, proof.reason)
            return Plan(False, proof.reason, 1, instances, threads, fault=fault), []
        max_rows = 1
        if proof.batched:
            max_rows = self._provable_rows([model], proof, constraints.max_rows or int(table[-1].rows))
        batch = repeat_rows(rows, max_rows) if proof.batched else rows
        grown = list(table)
        if constraints.gpu:
            if proof.batched:
                table += self._measure_between(model, rows, table)
            instances, gain = self._instances.on_gpu(model, batch, proof)
            threads = 1
        else:
            self._timer.ends = began + budget_s
            instances, threads, gain = self._instances.on_cpu(model, batch, table, proof)
        shared = tuple(line._replace(seconds=line.seconds * instances / gain) for line in sorted(table))
        sizes = self._buckets(table, max_rows) if proof.batched else ()
        plan = Plan(
            proof.batched,
            proof.reason,
            max_rows,
            instances,
            threads,
            table=shared,
            buckets=sizes,
            fault=proof.fault,
            evidence=proof.evidence,
        )
        return plan, grown

    def _weigh(
        self, plan: Plan, model: LoadedModel, request: Tensors, table: Sequence[Measurement], *, sampled: bool
    ) -> Plan:
        """Add to `plan` what runs of other sizes show, beginning with `request`, which the model takes.

        `table` has the times of batches. With `sampled`, `request` is a golden sample, and requests may well
        be smaller.
        """
        constraints = self._constraints
        names = free_names(model, request, batched=plan.batched) if constraints.weighed else ()
        if not request:
            return replace(plan, shapes=ShapeCorrections(names))
        cost, fit = None, RowCostFit(model, self._clock, constraints.budget_s * WEIGHING)
        axes = free_axes(without_names(model.signature, names), request, int(plan.batched))
        if axes and constraints.weighed:
            least = 1.0
            if constraints.max_rows is None and not constraints.gpu:
                least = plan.max_rows / MOST_ROWS
            cost = fit.fit(request, axes, table, least, smaller=sampled)
        runs = [model.run(request), *fit.outputs]
        if plan.batched:
            with suppress(Exception):  # the model may refuse what it takes alone
                runs.append(model.run(repeat_rows(request, 2)))
        shapes = output_corrections(model.signature, runs, batched=plan.batched)
        row_bytes = bytes_of(request)
        return replace(plan, row_cost=cost, row_bytes=row_bytes, shapes=ShapeCorrections(names, shapes))

    def _unmeasured_plan(self, model: LoadedModel, proof: BatchingProof) -> Plan:
        instances, threads = self._instances.unmeasured()
        most = 1
        if proof.batched:
            served = model if threads == 1 else self._load(threads)
            copies = 1 if self._constraints.gpu else instances
            try:
                wanted = self._constraints.max_rows or _affordable_rows(proof.timed_rows, UNMEASURED_ROWS)
                most = self._provable_rows([served] * copies, proof, wanted)
            finally:
                if served is not model:
                    served.close()
        buckets = self._buckets((), most)
        return Plan(
            proof.batched,
            proof.reason,
            most,
            instances,
            threads,
            buckets=buckets,
            fault=proof.fault,
            evidence=proof.evidence,
        )

    def _buckets(self, table: Sequence[Measurement], most: int) -> tuple[int, ...]:
        """The batch sizes of a model on a GPU; without measurements, all powers of two."""
        if not self._constraints.gpu:
            return ()
        if table:
            return choose_buckets(table, most)
        return tuple(sorted({*(1 << power for power in range(most.bit_length())), most}))

    def _grow_batch(self, model: LoadedModel, proof: BatchingProof, rows: Tensors) -> list[Measurement]:
        """Time batches of 1, 2, 4, … rows until more rows no longer pay, and check the answers of each.

        Raises Disproven if a batch's outputs differ from those of its rows alone.
        """
        table: list[Measurement] = []
        rates: list[float] = []
        size = 1
        most = self._constraints.max_rows or _affordable_rows(rows, MOST_ROWS)
        while not table or (proof.batched and size <= most and not self._timer.is_over):
            batch = repeat_rows(rows, size) if proof.batched else rows
            try:
                if proof.batched:
                    wrong = proof.disagreement([model], size)
                else:
                    wrong = None
                    model.run(batch)
            except Exception as error:  # noqa: BLE001 - too many rows for the model, or for the machine
                log.info("batches end at %d rows: %s", size // 2, short_reason(error))
                break
            if wrong is not None:
                raise Disproven(f"{wrong} when {size} rows run together")
            quickest, typical = self._timer.time(model, batch)
            table.append(Measurement(size, typical, TRUST))
            rates.append(size / (quickest + BATCH_S))
            if (
                self._constraints.max_rows is None
                and len(rates) > 2
                and max(rates[-2:]) < FLAT * max(rates[:-2])
            ):
                # Two doublings in a row that bring nothing: a single one may be the machine's noise.
                break
            size *= 2
        if self._constraints.max_rows is not None or not rates:
            return table  # with a limit from model.toml, every size up to it is of use
        enough = next(index for index, rate in enumerate(rates) if rate >= NEARLY * max(rates))
        return table[: enough + 1]

    def _provable_rows(self, models: Sequence[LoadedModel], proof: BatchingProof, rows: int) -> int:
        """The most rows, at most `rows`, that `models` run together, each on a thread, as they are proven.

        Raises Disproven if the answers differ.
        """
        while True:
            try:
                wrong = proof.disagreement(models, rows)
            except Exception as error:  # too many rows for the model, or for the machine
                log.info("batches end below %d rows: %s", rows, short_reason(error))
                if rows == 1:
                    raise
                rows = rows // 2
                continue
            if wrong is not None:
                raise Disproven(f"{wrong} when {rows} rows run together")
            return rows

    def _measure_between(
        self, model: LoadedModel, rows: Tensors, table: Sequence[Measurement]
    ) -> list[Measurement]:
        """Time sizes between those of `table` if such buckets may save padding."""
        found = []
        for size in sizes_between(table):
            if self._timer.is_over:
                break
            batch = repeat_rows(rows, size)
            model.run(batch)
            found.append(Measurement(size, self._timer.time(model, batch)[1], TRUST))
        return found


def _affordable_rows(rows: Tensors, most: int) -> int:
    """The rows of the largest batch that made-up inputs may take memory for."""
    row_bytes = bytes_of(rows) / max(1, count_rows(rows))
    return max(1, min(most, int(MOST_BATCH_BYTES / max(1.0, row_bytes))))
