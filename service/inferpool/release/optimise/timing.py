"""Times several forms of a model on this machine, in rounds that all of them share."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from inferpool.backends.base import LoadedModel, LoadOptions
from inferpool.backends.onnx.backend import OnnxBackend
from inferpool.errors import LoadError
from inferpool.tensors import Array, Tensors

SIZES: Final = (1, 8, 64)
"""Rows of the batches that are timed."""
ROUNDS: Final = 9
_ROUND_S: Final = 0.03
LEAST_GAIN: Final = 1.05
SLOW_ROUNDS: Final = 3
"""Rounds for a form that takes more than twice as long in all of them: it cannot win."""


class Timing(NamedTuple):
    """How long runs of one form take.

    Attributes:
        run_ms: for each number of rows, the time of a run: the median of all rounds.
        gains: for each of its rounds, how many times as fast as the original it was: the geometric mean of
            all sizes.
    """

    run_ms: Mapping[int, float]
    gains: Sequence[float]

    @property
    def gain(self) -> float:
        """The median of `gains`."""
        return statistics.median(self.gains)

    @property
    def is_faster(self) -> bool:
        """Whether it is at least 5 % faster in most rounds, and not slower in three of four."""
        return self.gain >= LEAST_GAIN and float(np.quantile(self.gains, 0.25)) > 1


def time_forms(
    files: Mapping[str, Path],
    original: str,
    batches: Mapping[int, Tensors],
    threads: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time each of `files`, one of which is the `original`, with `batches` by their number of rows.

    Returns the timings, and a reason for each file that cannot be loaded or run. Raises LoadError if the
    original is one of them.
    """
    models: dict[str, LoadedModel] = {}
    failed: dict[str, str] = {}
    for name, file in files.items():
        try:
            models[name] = model = OnnxBackend().load(file, LoadOptions(threads=threads))
            for batch in batches.values():
                model.run(batch)
        except Exception as error:  # noqa: BLE001 - the runtime raises a type of its own for every fault
            models.pop(name, None)
            failed[name] = str(error)
    if original in failed:
        raise LoadError(f"the model cannot be timed: {failed[original]}")
    times: dict[str, dict[int, list[float]]] = {name: {size: [] for size in batches} for name in models}
    base = times[original]

    def gains(name: str) -> list[float]:
        own = times[name]
        rounds = len(own[min(batches)])
        return [
            statistics.geometric_mean(base[size][number] / own[size][number] for size in batches)
            for number in range(rounds)
        ]

    order = list(models)
    for number in range(ROUNDS):
        if number == SLOW_ROUNDS:
            order = [name for name in order if max(gains(name)) > 0.5]
        # Another one begins in each round, so that none always follows the same one.
        first = number % len(order)
        for size, batch in batches.items():
            for name in order[first:] + order[:first]:
                times[name][size].append(_run_s(models[name], batch, clock))
    found = {
        name: Timing({size: 1000 * statistics.median(own[size]) for size in batches}, gains(name))
        for name, own in times.items()
    }
    return found, failed


def _run_s(model: LoadedModel, batch: Tensors, clock: Callable[[], float]) -> float:
    """Return the seconds of the quickest run of as many as fit a thirtieth of a second.

    The others may have waited for other programs. A run of less than a second is repeated at least once.
    """
    began = ended = clock()
    quickest, runs = math.inf, 0
    while runs == 0 or ended < began + _ROUND_S or (runs == 1 and quickest < 1):
        started = ended
        model.run(batch)
        ended = clock()
        quickest = min(quickest, ended - started)
        runs += 1
    return quickest


def batches_of(rows: Sequence[Mapping[str, Array]]) -> dict[int, Tensors]:
    """Return a batch of each size of `SIZES`: the rows of the first of `rows`, repeated."""
    first = rows[0]
    return {
        size: {
            name: np.ascontiguousarray(array[np.arange(size) % len(array)]) for name, array in first.items()
        }
        for size in SIZES
    }
