"""Chooses how many instances of a version run at the same time, and with how many threads each.

The choice is made by measuring. An option that gives other answers than those that are proven is not taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from inferpool.backends.base import LoadedModel
from inferpool.errors import Reason, short_reason
from inferpool.pool.latency_model import Measurement
from inferpool.repository.load.batching_proof import BatchingProof, Disproven
from inferpool.repository.load.plan import PlanConstraints
from inferpool.repository.load.run_timer import RunTimer
from inferpool.repository.load.runnable_rows import count_rows
from inferpool.tensors import Tensors

log = logging.getLogger(__name__)

BETTER: Final = 1.05
"""More instances are taken if they bring at least this many times the rate."""

MUCH_BETTER: Final = 1.3
"""The same if a run of one row is short: the web side then needs more of the cores."""

OVERLAPPING: Final = 2
"""Instances on a GPU if nothing could be measured: one copies while the other runs."""

CLEAR_S: Final = 1e-3
"""A run shorter than this gains nothing from a second thread, because the web side needs the core."""


class InstanceChoice:
    """Chooses the instances and threads of one version."""

    def __init__(
        self, load: Callable[[int], LoadedModel], constraints: PlanConstraints, timer: RunTimer
    ) -> None:
        """`load(threads)` loads one more copy of the model, for that many threads a run."""
        self._load = load
        self._constraints = constraints
        self._timer = timer

    def unmeasured(self) -> tuple[int, int]:
        """Instances, and threads of a run, if nothing was measured."""
        constraints = self._constraints
        if constraints.gpu:
            return constraints.instances or OVERLAPPING, 1
        instances = constraints.instances or 1
        return instances, constraints.threads or max(1, constraints.cores // instances)

    def on_gpu(self, model: LoadedModel, batch: Tensors, proof: BatchingProof) -> tuple[int, float]:
        """Instances on a GPU, where one copies while another runs, and their rate as a multiple of one's."""
        asked = self._constraints.instances
        if asked == 1 or self._timer.is_over:
            return asked or OVERLAPPING, 1.0
        base = self._timer.rate([model], batch)
        others: list[LoadedModel] = []
        try:
            for _ in range((asked or OVERLAPPING) - 1):
                others.append(self._load(1))  # noqa: PERF401 - if one fails, those before it must be closed
            rate = self._timer.rate([model, *others], batch)
            wrong = proof.disagreement([model, *others], count_rows(batch)) if proof.batched else None
            if wrong is not None:
                raise Disproven(f"{wrong} when {1 + len(others)} instances run at the same time")
        except Exception as error:  # there may be no memory for one more copy
            if asked or isinstance(error, Disproven):
                raise
            log.info("one instance a GPU: %s", short_reason(error))
            return 1, 1.0
        finally:
            for other in others:
                other.close()
        instances = asked or (OVERLAPPING if rate > BETTER * base else 1)
        return instances, min(rate / base, instances) if instances > 1 else 1.0

    def on_cpu(
        self, model: LoadedModel, batch: Tensors, table: Sequence[Measurement], proof: BatchingProof
    ) -> tuple[int, int, float]:
        """Instances, threads of a run, and their rate as a multiple of one instance with one thread.

        An option that gives other answers than those that are proven is not taken. Raises Disproven if
        `model.toml` asks for it.
        """
        options = self._options(table[0].seconds, table[-1].seconds)
        late = self._timer.is_over
        if options == [(1, 1)] or (late and not proof.batched):
            return *options[0], 1.0
        if late:
            options = options[:1]
        base = 1.0 if late else self._timer.rate([model], batch)
        rates: dict[tuple[int, int], float] = {}
        wrongs: list[Reason] = []
        # Options with one thread come first, because for others the model must be loaded again.
        for instances, threads in sorted(options, key=lambda option: option[::-1]):
            if rates and self._timer.is_over:
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
                rates[instances, threads] = (
                    base if known else self._timer.rate([candidate] * instances, batch)
                )
            finally:
                if candidate is not model:
                    candidate.close()
        if not rates:
            if self._constraints.instances or self._constraints.threads:
                raise Disproven(wrongs[0])
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
