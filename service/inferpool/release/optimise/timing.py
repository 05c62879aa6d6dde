"""Times several forms of a model on this machine, in rounds that all of them share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
LEAST_ROUNDS: Final = 3
"""No form leaves earlier: three rounds that are not faster than the original decide."""
FAR_SLOWER: Final = 4
"""A form is not timed with its largest batch if each smaller one takes more than so many times as long."""
_UNBEATABLE: Final = 1e6
"""The gain that rounds to come are taken to have at best."""


class Timing(NamedTuple):
    """How long runs of one form take.

    Attributes:
        p50_ms: by the number of rows, the median of the times of all runs. The largest batch is missing if
            the form was far slower with the smaller ones in every round.
        gains: for each of its rounds, how many times as fast as the original it was: the geometric mean of
            all batches that it ran in the round, each by its quickest run.
    """

    p50_ms: Mapping[int, float]
    gains: Sequence[float]

    @property
    def rows_per_s(self) -> dict[int, float]:
        """By the number of rows, how many a second come out of runs of the median time."""
        return {size: 1000 * size / took for size, took in self.p50_ms.items()}

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
    done: Callable[[int], object] = lambda count: None,
    load: Callable[[str, Path, LoadOptions], LoadedModel] = lambda name, file, options: OnnxBackend().load(
        file, options
    ),
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time each of `files`, one of which is the `original`, with `batches` by their number of rows.

    A form leaves as soon as no result of the rounds that are left could make it faster than the original.
    `done` is told how many of `ROUNDS` measurements for each file and batch are over. `load` loads the form
    of a name.

    Returns the timings, and a reason for each file that cannot be loaded or run. Raises LoadError if the
    original is one of them.
    """
    models: dict[str, LoadedModel] = {}
    failed: dict[str, str] = {}
    for name, file in files.items():
        try:
            models[name] = load(name, file, LoadOptions(threads=threads))
        except Exception as error:  # noqa: BLE001 - the runtime raises a type of its own for every fault
            failed[name] = str(error)
            done(ROUNDS * len(batches))
    times: dict[str, list[dict[int, float]]] = {name: [] for name in models}
    runs: dict[str, dict[int, list[float]]] = {name: {} for name in models}
    if original in failed:
        raise LoadError(f"the model cannot be timed: {failed[original]}")
    for number in range(ROUNDS):
        for name in set(models) - {original}:
            if not _may_be_faster(_gains(times[name], times[original])):
                del models[name]
                done((ROUNDS - number) * len(batches))
        if number >= LEAST_ROUNDS and list(models) == [original]:
            done((ROUNDS - number) * len(batches))
            break
        for name in models:
            times[name].append({})
        order = list(models)
        # Another one begins in each round, so that none always follows the same one.
        first = number % len(order)
        for size, batch in batches.items():
            for name in order[first:] + order[:first]:
                done(1)
                if name in failed or _is_far_slower(times[name][number], times[original][number]):
                    continue
                try:
                    if not any(size in each for each in times[name]):
                        models[name].run(batch)  # The first run of a size also allocates its memory.
                    took = _run_s(models[name], batch, clock)
                    # The slower runs of a round may have waited for other programs.
                    times[name][number][size] = min(took)
                    runs[name].setdefault(size, []).extend(took)
                except Exception as error:
                    if name == original:
                        raise LoadError(f"the model cannot be timed: {error}") from error
                    failed[name] = str(error)
                    del models[name], times[name]
                    done((ROUNDS - number - 1) * len(batches))
    base = times[original]
    found = {name: Timing(_medians(runs[name], batches), _gains(own, base)) for name, own in times.items()}
    return found, failed


def _gains(own: Sequence[Mapping[int, float]], base: Sequence[Mapping[int, float]]) -> list[float]:
    """Return the gain of each round over the original's times in the same round."""
    return [
        statistics.geometric_mean(before[size] / took[size] for size in took)
        for took, before in zip(own, base, strict=False)
    ]


def _may_be_faster(gains: Sequence[float]) -> bool:
    """Whether a form with these gains would count as faster if all other rounds were as good as can be."""
    return Timing({}, [*gains, *[_UNBEATABLE] * (ROUNDS - len(gains))]).is_faster


def _is_far_slower(own: Mapping[int, float], base: Mapping[int, float]) -> bool:
    """Whether several batches were timed, and each took over `FAR_SLOWER` times as long as the original's."""
    return len(own) > 1 and all(took > FAR_SLOWER * base[size] for size, took in own.items())


def _medians(runs: Mapping[int, Sequence[float]], sizes: Iterable[int]) -> dict[int, float]:
    """Return the median of the runs of each size that was timed, in milliseconds."""
    return {size: 1000 * statistics.median(runs[size]) for size in sizes if size in runs}


def _run_s(model: LoadedModel, batch: Tensors, clock: Callable[[], float]) -> list[float]:
    """Return the seconds of each run of as many as fit a thirtieth of a second.

    A run of less than a second is repeated at least once.
    """
    began = ended = clock()
    took: list[float] = []
    while not took or ended < began + _ROUND_S or (len(took) == 1 and took[0] < 1):
        started = ended
        model.run(batch)
        ended = clock()
        took.append(ended - started)
    return took


def batches_of(rows: Sequence[Mapping[str, Array]]) -> dict[int, Tensors]:
    """Return a batch of each size of `SIZES`: the rows of the first of `rows`, repeated."""
    first = rows[0]
    return {
        size: {
            name: np.ascontiguousarray(array[np.arange(size) % len(array)]) for name, array in first.items()
        }
        for size in SIZES
    }
