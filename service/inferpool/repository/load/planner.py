"""How a version is to be served: batched or not, in batches of how many rows, by how many instances.

All of it is found out by running the model at load, within a budget of time; what was found can be kept
(`inferpool.repository.load.plan_cache`), so that the next start need not.
"""

from __future__ import annotations

import logging
import statistics
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from inferpool.backends.base import LoadedModel
from inferpool.pool.buckets import between, rungs
from inferpool.pool.latency_model import Measurement
from inferpool.repository.load.batching_check import Proof, compare, first_line, prove
from inferpool.tensors import Tensors

log = logging.getLogger(__name__)

MOST_ROWS: Final = 256
"""Rows of a batch beyond which none is measured, unless `model.toml` sets more."""

UNMEASURED_ROWS: Final = 32
"""Rows of a batch where nothing could be measured."""

NEARLY: Final = 0.97
"""The batch limit is the fewest rows that bring this share of the best rows a second that was seen."""

FLAT: Final = 1.02
"""A doubling of the rows that brings less than this many times the best rows a second brings nothing."""

TRUST: Final = 8
"""Runs that a measurement at load counts for against those while serving."""

PROOF_S: Final = 1.0
"""Seconds of which half go to the proof even where nothing is to be measured."""

CLIMB: Final = 0.6
"""The share of the time for measuring in which batch sizes are tried; the rest shares out the cores."""

BETTER: Final = 1.05
"""More instances are taken where they bring at least this many times the rows a second."""

MUCH_BETTER: Final = 1.3
"""The same where a run of one row is short: the web side needs cores as well, and more in proportion."""

BATCH_S: Final = 1e-4
"""What a batch costs beside its run (two wake-ups, gather, scatter), which more rows share."""

OVERLAPPING: Final = 2
"""Instances on a GPU where nothing could be measured: one copies while the other runs."""

CLEAR_S: Final = 1e-3
"""A run shorter than this gains nothing from a second thread: the web side needs the core."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What was decided, and what was measured.

    Attributes:
        batched: whether rows of different entries share a run, and `reason` why, or why not.
        max_rows: rows of a batch at the most; 1 where not batched.
        instances: threads that run batches at the same time, on each device.
        threads: threads that the runtime uses within a run.
        table: seconds by batch size.
        rungs: the sizes that batches are rounded up to on a GPU; empty where any size runs as it is.
    """

    batched: bool
    reason: str
    max_rows: int
    instances: int
    threads: int
    table: tuple[Measurement, ...] = ()
    rungs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PlanConstraints:
    """What the owner of the model has set; None is to be found out.

    Attributes:
        batching: False turns it off.
        max_rows: rows of a batch at the most.
        instances: how many.
        threads: threads of a run.
        cores: cores that the model may use in all, at least 1.
        budget_s: seconds that measuring may take; 0 measures nothing.
        gpu: whether it runs on a GPU, where instances share no copy, and cores are not what is scarce.
    """

    cores: int
    budget_s: float
    batching: bool = True
    max_rows: int | None = None
    instances: int | None = None
    threads: int | None = None
    gpu: bool = False


class Planner:
    """Proves and measures one version. `load(threads)` loads the model for so many threads a run."""

    def __init__(
        self, load: Callable[[int], LoadedModel], wishes: PlanConstraints, clock: Callable[[], float]
    ) -> None:
        self._load = load
        self._wishes = wishes
        self._clock = clock
        self._ends = 0.0

    def make(self, model: LoadedModel, samples: Sequence[Tensors] = ()) -> Plan:
        """Find the plan with `model`, which was loaded for one thread a run; `samples` help the proof."""
        wishes = self._wishes
        proof = Proof(False, "turned off in model.toml")
        if wishes.batching:
            proof = prove(model, samples, max(wishes.budget_s, PROOF_S) / 2, self._clock)
        began = self._clock()
        self._ends = began + CLIMB * wishes.budget_s
        rows = proof.rows or (samples[0] if samples else {})
        if proof.rows and not proof.batched:
            rows = rows_of(rows, 1)
        if not rows or not wishes.budget_s:
            most = (wishes.max_rows or UNMEASURED_ROWS) if proof.batched else 1
            instances, threads = self._unmeasured()
            return Plan(proof.batched, proof.reason, most, instances, threads, rungs=self._rungs((), most))
        table, fault = self._climb(model, proof, rows)
        if fault:
            proof = Proof(False, fault, rows)
            rows, table = rows_of(rows, 1), table[:1]
        if not table:
            instances, threads = self._unmeasured()
            return Plan(False, proof.reason, 1, instances, threads)
        max_rows = (wishes.max_rows or int(table[-1].rows)) if proof.batched else 1
        batch = rows_of(rows, max_rows) if proof.batched else rows
        if wishes.gpu:
            if proof.batched:
                table += self._between(model, rows, table)
            instances, gain = self._overlap(model, batch)
            threads = 1
        else:
            self._ends = began + wishes.budget_s
        instances, threads, gain = self._share_cores(model, batch, table)
        shared = tuple(line._replace(seconds=line.seconds * instances / gain) for line in sorted(table))
        sizes = self._rungs(table, max_rows) if proof.batched else ()
        return Plan(proof.batched, proof.reason, max_rows, instances, threads, shared, sizes)

    def _unmeasured(self) -> tuple[int, int]:
        """Instances and threads of a run where nothing was measured."""
        wishes = self._wishes
        if wishes.gpu:
            return wishes.instances or OVERLAPPING, 1
        return wishes.instances or 1, wishes.threads or max(1, wishes.cores // (wishes.instances or 1))

    def _rungs(self, table: Sequence[Measurement], most: int) -> tuple[int, ...]:
        """The ladder of a model on a GPU; without measurements all powers of two."""
        if not self._wishes.gpu:
            return ()
        if table:
            return rungs(table, most)
        return tuple(sorted({*(1 << power for power in range(most.bit_length())), most}))

    def _climb(self, model: LoadedModel, proof: Proof, rows: Tensors) -> tuple[list[Measurement], str]:
        """Time batches of 1, 2, 4, … rows until more no longer pay, and hold each against the proof.

        Returns the measurements, and what was wrong with a batch's outputs if anything was.
        """
        table: list[Measurement] = []
        rates: list[float] = []
        size = 1
        most = self._wishes.max_rows or MOST_ROWS
        while not table or (proof.batched and size <= most and not self._late()):
            batch = rows_of(rows, size) if proof.batched else rows
            try:
                outputs = model.run(batch)
            except Exception as error:  # noqa: BLE001 - too many rows for it, or for the machine
                log.info("batches end at %d rows: %s", size // 2, first_line(error))
                break
            if proof.batched:
                fault, _ = compare(model.signature, outputs, proof.alone, _places(rows, size), model.rounding)
                if fault:
                    return table, f"{fault} when {size} rows run together"
            quickest, typical = self._time(model, batch)
            table.append(Measurement(size, typical, TRUST))
            rates.append(size / (quickest + BATCH_S))
            if self._wishes.max_rows is None and len(rates) > 2 and max(rates[-2:]) < FLAT * max(rates[:-2]):
                # Two doublings in a row that bring nothing: one alone may be the machine's noise.
                break
            size *= 2
        if self._wishes.max_rows is not None or not rates:
            return table, ""  # with a limit that was set, every size up to it is of use
        enough = next(place for place, rate in enumerate(rates) if rate >= NEARLY * max(rates))
        return table[: enough + 1], ""

    def _time(self, model: LoadedModel, batch: Tensors) -> tuple[float, float]:
        """The quickest and the median of a few runs, in seconds."""
        times: list[float] = []
        stop = min(self._ends, self._clock() + self._wishes.budget_s / 20)
        while len(times) < 3 or (len(times) < 30 and self._clock() < stop):
            began = self._clock()
            model.run(batch)
            times.append(self._clock() - began)
            if times[-1] > self._wishes.budget_s / 10:
                break  # a slow model is timed by one run: more would not change the decision
        return max(min(times), 1e-9), statistics.median(times)

    def _between(self, model: LoadedModel, rows: Tensors, table: Sequence[Measurement]) -> list[Measurement]:
        """Time sizes between those of `table` where that may spare padding."""
        found = []
        for size in between(table):
            if self._late():
                break
            batch = rows_of(rows, size)
            model.run(batch)
            found.append(Measurement(size, self._time(model, batch)[1], TRUST))
        return found

    def _overlap(self, model: LoadedModel, batch: Tensors) -> tuple[int, float]:
        """Instances on a GPU, and how many times the rate of one they have: one copies while another runs."""
        wished = self._wishes.instances
        if wished == 1 or self._late():
            return wished or OVERLAPPING, 1.0
        base = self._rate([model], batch)
        others: list[LoadedModel] = []
        try:
            for _ in range((wished or OVERLAPPING) - 1):
                others.append(self._load(1))  # noqa: PERF401 - those before one that fails are to be closed
            rate = self._rate([model, *others], batch)
        except Exception as error:  # memory for one more copy may be lacking
            if wished:
                raise
            log.info("one instance a GPU: %s", first_line(error))
            return 1, 1.0
        finally:
            for other in others:
                other.close()
        instances = wished or (OVERLAPPING if rate > BETTER * base else 1)
        return instances, min(rate / base, instances) if instances > 1 else 1.0

    def _share_cores(
        self, model: LoadedModel, batch: Tensors, table: Sequence[Measurement]
    ) -> tuple[int, int, float]:
        """Instances, threads a run, and how many times the rate of one instance of one thread they have."""
        options = self._options(table[0].seconds, table[-1].seconds)
        if options == [(1, 1)] or self._late():
            return *options[0], 1.0
        base = self._rate([model], batch)
        rates: dict[tuple[int, int], float] = {}
        # Those of one thread first: the model is there, and for others it must be loaded anew.
        for instances, threads in sorted(options, key=lambda option: option[::-1]):
            if rates and self._late():
                break
            candidate = model if threads == 1 else self._load(threads)
            alone = (instances, threads) == (1, 1)
            try:
                rates[instances, threads] = base if alone else self._rate([candidate] * instances, batch)
            finally:
                if candidate is not model:
                    candidate.close()
        enough = max(rates.values()) / (BETTER if table[0].seconds >= CLEAR_S else MUCH_BETTER)
        best = next(option for option in options if rates.get(option, 0.0) >= enough)
        # What no number of cores can bring is noise in one of the two rates.
        return *best, min(rates[best] / base, best[0] * best[1])

    def _options(self, single_s: float, full_s: float) -> list[tuple[int, int]]:
        """Instances and threads worth trying, fewest instances first: those answer a lone request soonest.

        `single_s` is what a run of one row takes, `full_s` one of a full batch.
        """
        wishes, cores = self._wishes, self._wishes.cores
        if wishes.instances:
            return [(wishes.instances, wishes.threads or max(1, cores // wishes.instances))]
        if wishes.threads:
            return sorted({(1, wishes.threads), (max(1, cores // wishes.threads), wishes.threads)})
        if cores == 1 or full_s < CLEAR_S:
            return [(1, 1)]
        if single_s < CLEAR_S:
            # Many instances would share out the batches of a model that lives by large ones.
            return [(1, 1), (1, cores), (2, 1)]
        halves = {(2, cores // 2), (cores // 2, 2)} if cores >= 4 else set()
        return sorted({(1, cores), (cores, 1)} | halves)

    def _rate(self, models: Sequence[LoadedModel], batch: Tensors) -> float:
        """Batches a second of threads, one for each of `models`, which run `batch` over and over."""
        for model in dict.fromkeys(models):
            model.run(batch)
        stop = self._clock() + self._wishes.budget_s / 10
        runs = [0] * len(models)

        def work(number: int) -> None:
            while runs[number] < 2 or self._clock() < stop:
                models[number].run(batch)
                runs[number] += 1

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(models))]
        began = self._clock()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(runs) / (self._clock() - began)

    def _late(self) -> bool:
        return self._clock() >= self._ends


def rows_of(rows: Tensors, count: int) -> Tensors:
    """`count` rows: those of `rows`, over and over."""
    chosen = _places(rows, count)
    return {name: tensor[chosen] for name, tensor in rows.items()}


def _places(rows: Tensors, count: int) -> list[int]:
    available = len(next(iter(rows.values())))
    return [row % available for row in range(count)]
