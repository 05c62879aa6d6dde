"""Decides how a version is served: batched or not, the rows of a batch, instances and threads.

The planner measures by running the model at load, within a budget of time. `PlanCache` keeps the plan, so
that the next start need not measure.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from threading import Barrier, BrokenBarrierError
from typing import Final, TypeAlias

from inferpool.backends.base import LoadedModel
from inferpool.backends.row_verdict import Independence, RowVerdict
from inferpool.errors import Reason, short_reason
from inferpool.pool.buckets import choose_buckets, sizes_between
from inferpool.pool.latency_model import Measurement
from inferpool.repository.lifecycle import MEASURE, PROVE, Phase
from inferpool.repository.load.batching_check import UNREAD, check_batching
from inferpool.repository.load.batching_proof import BatchingProof, Fault, refuted
from inferpool.repository.load.batching_remedies import Obstacle
from inferpool.repository.load.declared_shapes import (
    ShapeCorrections,
    free_names,
    output_corrections,
    without_names,
)
from inferpool.repository.load.free_sizes import bytes_of, free_axes, made_up_request
from inferpool.repository.load.list_outputs import ListsAsTables, has_lists
from inferpool.repository.load.plan import Plan, PlanConstraints
from inferpool.repository.load.row_cost_fit import RowCostFit
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

BETTER: Final = 1.05
"""More instances are taken if they bring at least this many times the rate."""

MUCH_BETTER: Final = 1.3
"""The same if a run of one row is short: the web side then needs more of the cores."""

BATCH_S: Final = 1e-4
"""The cost of a batch in addition to its run: two wake-ups, gather, scatter. More rows share it."""

OVERLAPPING: Final = 2
"""Instances on a GPU if nothing could be measured: one copies while the other runs."""

CLEAR_S: Final = 1e-3
"""A run shorter than this gains nothing from a second thread, because the web side needs the core."""


PrepareRun: TypeAlias = Callable[[LoadedModel, Tensors], Callable[[], object]]
"""Prepares runs of a model with these inputs, and returns the function that makes one."""


def prepare_run(model: LoadedModel, inputs: Tensors) -> Callable[[], object]:
    """Prepare nothing: a run on a CPU is the same every time."""
    return partial(model.run, inputs)


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
        self._prepare_run = prepare
        self._constraints = constraints
        self._clock = clock
        self._ends = 0.0

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
            proof = check_batching(checked, samples, graph)
        unproven = samples[0] if samples else {}
        self._enter(MEASURE)
        try:
            plan, table = self._choose(model, proof, proof.timed_rows or unproven)
        except _Disproven as error:
            proof = refuted(Fault(Obstacle.ROWS_MIXED, str(error)), proof.timed_rows)
            plan, table = self._choose(model, proof, proof.timed_rows)
        one = rows_between(proof.timed_rows, 0, 1) or unproven
        return self._weigh(plan, model, one or made_up_request(model), table, sampled=bool(samples))

    def _choose(
        self, model: LoadedModel, proof: BatchingProof, rows: Tensors
    ) -> tuple[Plan, list[Measurement]]:
        """Decide batches, instances and threads; also returns the times of batches in one instance.

        Raises _Disproven if runs of the plan give other answers than the rows alone.
        """
        constraints = self._constraints
        budget_s = constraints.budget_s
        if constraints.weighed and any(ANY in (spec.shape or ())[1:] for spec in model.signature.inputs):
            budget_s *= 1 - WEIGHING
        began = self._clock()
        self._ends = began + GROWING * budget_s
        self._prepare_run = self._prepare if proof.batched else prepare_run
        if not rows or not constraints.budget_s:
            return self._unmeasured_plan(model, proof), []
        table = self._grow_batch(model, proof, rows)
        if not table:
            instances, threads = self._unmeasured_instances()
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
            instances, gain = self._overlap(model, batch, proof)
            threads = 1
        else:
            self._ends = began + budget_s
            instances, threads, gain = self._share_cores(model, batch, table, proof)
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
        instances, threads = self._unmeasured_instances()
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

    def _unmeasured_instances(self) -> tuple[int, int]:
        """Instances, and threads of a run, if nothing was measured."""
        constraints = self._constraints
        if constraints.gpu:
            return constraints.instances or OVERLAPPING, 1
        instances = constraints.instances or 1
        return instances, constraints.threads or max(1, constraints.cores // instances)

    def _buckets(self, table: Sequence[Measurement], most: int) -> tuple[int, ...]:
        """The batch sizes of a model on a GPU; without measurements, all powers of two."""
        if not self._constraints.gpu:
            return ()
        if table:
            return choose_buckets(table, most)
        return tuple(sorted({*(1 << power for power in range(most.bit_length())), most}))

    def _grow_batch(self, model: LoadedModel, proof: BatchingProof, rows: Tensors) -> list[Measurement]:
        """Time batches of 1, 2, 4, … rows until more rows no longer pay, and check the answers of each.

        Raises _Disproven if a batch's outputs differ from those of its rows alone.
        """
        table: list[Measurement] = []
        rates: list[float] = []
        size = 1
        most = self._constraints.max_rows or _affordable_rows(rows, MOST_ROWS)
        while not table or (proof.batched and size <= most and not self._late()):
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
                raise _Disproven(f"{wrong} when {size} rows run together")
            quickest, typical = self._time(model, batch)
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

        Raises _Disproven if the answers differ.
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
                raise _Disproven(f"{wrong} when {rows} rows run together")
            return rows

    def _time(self, model: LoadedModel, batch: Tensors) -> tuple[float, float]:
        """The quickest and the median of a few runs, in seconds."""
        times: list[float] = []
        run = self._prepare_run(model, batch)
        stop = min(self._ends, self._clock() + self._constraints.budget_s / 20)
        while len(times) < 3 or (len(times) < 30 and self._clock() < stop):
            began = self._clock()
            run()
            times.append(self._clock() - began)
            if times[-1] > self._constraints.budget_s / 10:
                break  # a slow model is timed by one run: more would not change the decision
        return max(min(times), 1e-9), statistics.median(times)

    def _measure_between(
        self, model: LoadedModel, rows: Tensors, table: Sequence[Measurement]
    ) -> list[Measurement]:
        """Time sizes between those of `table` if such buckets may save padding."""
        found = []
        for size in sizes_between(table):
            if self._late():
                break
            batch = repeat_rows(rows, size)
            model.run(batch)
            found.append(Measurement(size, self._time(model, batch)[1], TRUST))
        return found

    def _overlap(self, model: LoadedModel, batch: Tensors, proof: BatchingProof) -> tuple[int, float]:
        """Instances on a GPU, where one copies while another runs, and their rate as a multiple of one's."""
        asked = self._constraints.instances
        if asked == 1 or self._late():
            return asked or OVERLAPPING, 1.0
        base = self._rate([model], batch)
        others: list[LoadedModel] = []
        try:
            for _ in range((asked or OVERLAPPING) - 1):
                others.append(self._load(1))  # noqa: PERF401 - if one fails, those before it must be closed
            rate = self._rate([model, *others], batch)
            wrong = proof.disagreement([model, *others], count_rows(batch)) if proof.batched else None
            if wrong is not None:
                raise _Disproven(f"{wrong} when {1 + len(others)} instances run at the same time")
        except Exception as error:  # there may be no memory for one more copy
            if asked or isinstance(error, _Disproven):
                raise
            log.info("one instance a GPU: %s", short_reason(error))
            return 1, 1.0
        finally:
            for other in others:
                other.close()
        instances = asked or (OVERLAPPING if rate > BETTER * base else 1)
        return instances, min(rate / base, instances) if instances > 1 else 1.0

    def _share_cores(
        self, model: LoadedModel, batch: Tensors, table: Sequence[Measurement], proof: BatchingProof
    ) -> tuple[int, int, float]:
        """Instances, threads of a run, and their rate as a multiple of one instance with one thread.

        An option that gives other answers than those that are proven is not taken. Raises _Disproven if
        `model.toml` asks for it.
        """
        options = self._options(table[0].seconds, table[-1].seconds)
        late = self._late()
        if options == [(1, 1)] or (late and not proof.batched):
            return *options[0], 1.0
        if late:
            options = options[:1]
        base = 1.0 if late else self._rate([model], batch)
        rates: dict[tuple[int, int], float] = {}
        wrongs: list[Reason] = []
        # Options with one thread come first, because for others the model must be loaded again.
        for instances, threads in sorted(options, key=lambda option: option[::-1]):
            if rates and self._late():
                break
            candidate = model if threads == 1 else self._load(threads)
            alone = (instances, threads) == (1, 1)
            try:
                wrong = None
                if proof.batched and not alone:
                    wrong = proof.disagreement([candidate] * instances, count_rows(batch))
                if wrong is not None:
                    wrongs.append(f"{wrong} when {instances} × {threads} threads run at the same time")
                    continue
                # Without time to measure, an option only has to give the proven answers.
                known = late or alone
                rates[instances, threads] = base if known else self._rate([candidate] * instances, batch)
            finally:
                if candidate is not model:
                    candidate.close()
        if not rates:
            if self._constraints.instances or self._constraints.threads:
                raise _Disproven(wrongs[0])
            return 1, 1, 1.0
        enough = max(rates.values()) / (BETTER if table[0].seconds >= CLEAR_S else MUCH_BETTER)
        best = next(option for option in options if rates.get(option, 0.0) >= enough)
        # A gain beyond the number of threads is noise in one of the two rates.
        return *best, min(rates[best] / base, best[0] * best[1])

    def _options(self, single_s: float, full_s: float) -> list[tuple[int, int]]:
        """Instances and threads worth trying. Few instances come first: they answer a lone request soonest.

        `single_s` is the time of a run of one row, `full_s` that of a full batch.
        """
        asked, cores = self._constraints, self._constraints.cores
        if asked.instances:
            return [(asked.instances, asked.threads or max(1, cores // asked.instances))]
        if asked.threads:
            return sorted({(1, asked.threads), (max(1, cores // asked.threads), asked.threads)})
        if cores == 1 or full_s < CLEAR_S:
            return [(1, 1)]
        if single_s < CLEAR_S:
            # A model that gains by large batches loses if many instances share the rows among them.
            return [(1, 1), (1, cores), (2, 1)]
        halves = {(2, cores // 2), (cores // 2, 2)} if cores >= 4 else set()
        return sorted({(1, cores), (cores, 1)} | halves)

    def _rate(self, models: Sequence[LoadedModel], batch: Tensors) -> float:
        """Batches a second if one thread for each of `models` runs `batch` over and over."""
        for model in dict.fromkeys(models):
            model.run(batch)
        began = stop = 0.0
        runs = [0] * len(models)

        def begin() -> None:
            nonlocal began, stop
            began = self._clock()
            stop = began + self._constraints.budget_s / 10

        prepared = Barrier(len(models), begin)

        def work(number: int) -> None:
            try:
                run = self._prepare_run(models[number], batch)
                prepared.wait()
                while runs[number] < 2 or self._clock() < stop:
                    run()
                    runs[number] += 1
            except BaseException:
                prepared.abort()  # nobody waits for this thread
                raise

        with ThreadPoolExecutor(len(models)) as threads:
            faults = [each.exception() for each in [threads.submit(work, n) for n in range(len(models))]]
        ended = self._clock()
        for fault in sorted(filter(None, faults), key=lambda fault: isinstance(fault, BrokenBarrierError)):
            raise fault
        return sum(runs) / (ended - began)

    def _late(self) -> bool:
        return self._clock() >= self._ends


class _Disproven(Exception):
    """Runs of the plan give other answers than the rows alone; the text says which."""


def _affordable_rows(rows: Tensors, most: int) -> int:
    """The rows of the largest batch that made-up inputs may take memory for."""
    row_bytes = bytes_of(rows) / max(1, count_rows(rows))
    return max(1, min(most, int(MOST_BATCH_BYTES / max(1.0, row_bytes))))
