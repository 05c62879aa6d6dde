"""Times runs of a model within a budget: single runs, and those of several threads at the same time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier, BrokenBarrierError
from typing import TypeAlias

from inferpool.backends.base import LoadedModel
from inferpool.tensors import Tensors

PrepareRun: TypeAlias = Callable[[LoadedModel, Tensors], Callable[[], object]]
"""Prepares runs of a model with these inputs, and returns the function that makes one."""


def prepare_run(model: LoadedModel, inputs: Tensors) -> Callable[[], object]:
    """Prepare nothing: a run on a CPU is the same every time."""
    return partial(model.run, inputs)


class RunTimer:
    """Times runs.

    Attributes:
        prepare: prepares the runs, on the thread that makes them.
        ends: the moment at which the budget is used up.
    """

    def __init__(self, clock: Callable[[], float], budget_s: float, prepare: PrepareRun) -> None:
        self._clock = clock
        self._budget_s = budget_s
        self.prepare = prepare
        self.ends = 0.0

    @property
    def is_over(self) -> bool:
        """Whether the budget is used up."""
        return self._clock() >= self.ends

    def time(self, model: LoadedModel, batch: Tensors) -> tuple[float, float]:
        """The quickest and the median of a few runs, in seconds."""
        times: list[float] = []
        run = self.prepare(model, batch)
        stop = min(self.ends, self._clock() + self._budget_s / 20)
        while len(times) < 3 or (len(times) < 30 and self._clock() < stop):
            began = self._clock()
            run()
            times.append(self._clock() - began)
            if times[-1] > self._budget_s / 10:
                break  # a slow model is timed by one run: more would not change the decision
        return max(min(times), 1e-9), statistics.median(times)

    def rate(self, models: Sequence[LoadedModel], batch: Tensors) -> float:
        """Batches a second if one thread for each of `models` runs `batch` over and over."""
        for model in dict.fromkeys(models):
            model.run(batch)
        began = stop = 0.0
        runs = [0] * len(models)

        def begin() -> None:
            nonlocal began, stop
            began = self._clock()
            stop = began + self._budget_s / 10

        prepared = Barrier(len(models), begin)

        def work(number: int) -> None:
            try:
                run = self.prepare(models[number], batch)
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
