"""Fits what a row costs to timed runs of rows of several sizes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from inferpool.backends.base import LoadedModel
from inferpool.errors import short_reason
from inferpool.pool.latency_model import Measurement
from inferpool.pool.row_cost import QUADRATIC, CostPoint, RowCost
from inferpool.repository.load.free_sizes import MOST_BYTES, Axis, bytes_of, resized, scaled_sizes
from inferpool.tensors import Tensors

log = logging.getLogger(__name__)

STEP: Final = 4
"""Elements of a row grow about so many times from one measured size to the next."""

SIZES: Final = 8
"""Sizes that are measured at most, in each direction."""

RUNS: Final = 5
"""Runs of each size: the quickest is its time, because other work on the machine only makes runs slower."""


class RowCostFit:
    """Times a model at several sizes of a row.

    Attributes:
        outputs: the outputs of each size that was run, for a look at their shapes.
    """

    def __init__(self, model: LoadedModel, clock: Callable[[], float], budget_s: float) -> None:
        """`budget_s` seconds may be used in all; a run that takes a quarter of them is the last."""
        self._model = model
        self._clock = clock
        self._budget_s = budget_s
        self.outputs: list[Tensors] = []

    def fit(
        self,
        request: Tensors,
        axes: Sequence[tuple[Axis, ...]],
        table: Sequence[Measurement],
        least: float,
        *,
        smaller: bool,
    ) -> RowCost | None:
        """Return the cost of rows by their elements; None if the model takes no other size.

        `request` is one row, `axes` are the dimensions that are open, and `table` has the seconds of batches
        of such rows. `least` is the least cost of a row. With `smaller`, smaller rows are timed as well.
        Without a budget, or if one row alone takes an eighth of it, larger rows are taken to cost in
        proportion to their elements.
        """
        reference = _elements(request)
        if not reference:
            return None
        if not self._budget_s:
            return RowCost((CostPoint(reference, 0.0, 1.0),), least)
        slow = bool(table) and table[0].seconds > self._budget_s / 8
        own = table[0].seconds if slow else self._seconds(request)
        ends = self._clock() + self._budget_s
        times = {reference: own}
        if smaller:
            self._measure(request, axes, 1 / STEP, ends - self._budget_s / 2, times)
        if not slow:
            axes = self._growing(request, axes)
            self._measure(request, axes, STEP, ends, times)
        if len(times) < 2 and not slow:
            return None
        # Both are times of one row, but those of the table were taken with more runs.
        scale = table[0].seconds / own if table else 1.0
        return RowCost(_points(times, reference, scale, table), least)

    def _growing(self, request: Tensors, axes: Sequence[tuple[Axis, ...]]) -> list[tuple[Axis, ...]]:
        """Return the dimensions that the model lets grow: all together, or else each that may by itself."""
        if self._run(resized(request, scaled_sizes(request, axes, 2))) is not None:
            return list(axes)
        alone = [
            one for one in axes if self._run(resized(request, scaled_sizes(request, [one], 2))) is not None
        ]
        if len(alone) > 1 and self._run(resized(request, scaled_sizes(request, alone, 2))) is None:
            return alone[:1]
        return alone

    def _measure(
        self,
        request: Tensors,
        axes: Sequence[tuple[Axis, ...]],
        step: float,
        ends: float,
        times: dict[int, float],
    ) -> None:
        """Time rows of `step`, `step`², … times the elements of `request`; adds the seconds to `times`."""
        if not axes:
            return
        for sizes in _sizes(request, axes, step):
            if self._clock() >= ends:
                return
            larger = resized(request, sizes)
            elements = _elements(larger)
            if elements in times or bytes_of(larger) > MOST_BYTES:
                return
            outputs = self._run(larger)
            if outputs is None:
                return
            self.outputs.append(outputs)
            times[elements] = self._seconds(larger)
            if times[elements] > self._budget_s / 4 or bytes_of(outputs) > MOST_BYTES:
                return

    def _run(self, request: Tensors) -> Tensors | None:
        try:
            return self._model.run(request)
        except Exception as error:  # noqa: BLE001 - a model need not take every size
            log.debug("a size is not taken: %s", short_reason(error))
            return None

    def _seconds(self, request: Tensors) -> float:
        """Return the time of the quickest of a few runs; of one, if that is slow."""
        taken: list[float] = []
        while len(taken) < RUNS:
            began = self._clock()
            self._model.run(request)
            taken.append(self._clock() - began)
            if taken[-1] > self._budget_s / 8:
                break
        return max(min(taken), 1e-9)


def _elements(request: Tensors) -> int:
    return sum(tensor.size for tensor in request.values())


def _sizes(request: Tensors, axes: Sequence[tuple[Axis, ...]], step: float) -> Iterator[dict[Axis, int]]:
    """Yield sizes at which a row has about `step`, `step`², … times its elements."""
    inputs: dict[str, int] = {}
    for alike in axes:
        for name, _ in alike:
            inputs[name] = inputs.get(name, 0) + 1
    each = step ** (1 / max(inputs.values()))
    for power in range(1, SIZES + 1):
        yield scaled_sizes(request, axes, each**power)


def _points(
    times: dict[int, float], reference: int, scale: float, table: Sequence[Measurement]
) -> tuple[CostPoint, ...]:
    own = scale * times[reference]
    points: list[CostPoint] = []
    for elements, seconds in sorted(times.items()):
        # Noise can make a larger row look quicker than a smaller one.
        seconds = max(scale * seconds, points[-1].seconds if points else 0.0)
        load = _load(seconds, own, table)
        if elements > reference:
            # Batches that take hardly longer than one row say little about the cost of a row.
            load = min(load, max(seconds / own, (elements / reference) ** QUADRATIC))
        points.append(CostPoint(elements, seconds, max(load, points[-1].load if points else 0.0)))
    return tuple(points)


def _load(seconds: float, own: float, table: Sequence[Measurement]) -> float:
    """Return of how many rows a batch takes `seconds`, if one row takes `own` and a part of one less."""
    largest = table[-1] if table else Measurement(1, own, 0)
    if seconds <= own:
        return seconds / own
    if seconds < largest.seconds:
        return 1 + (largest.rows - 1) * (seconds - own) / (largest.seconds - own)
    return largest.rows * seconds / max(own, largest.seconds)
