"""Explains the rows of one request, in a worker thread: makes coalitions, runs them, and estimates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, Final

import numpy as np

from inferpool.codecs.heat_map import draw_heat_map
from inferpool.errors import DeadlineExceeded, InvalidInput
from inferpool.explain.estimators import (
    KERNEL,
    OCCLUSION,
    Estimate,
    TooFewPasses,
    estimate,
    least_coalitions,
)
from inferpool.explain.integrated_gradients import INTEGRATED_GRADIENTS, USUAL_STEPS, integrate
from inferpool.http.explain.gradients import gradient_bytes, sum_gradients
from inferpool.http.explain.options import AUTO, ExplainQuery
from inferpool.http.explain.passes import IN_FLIGHT, Passes
from inferpool.http.explain.subject import Subject
from inferpool.http.explain.target import Target
from inferpool.http.predict.served_version import ServedVersion
from inferpool.tensors import Array, Tensors

MOST_ENTRY_BYTES: Final = 16 * 2**20
"""Bytes of the rows of an entry; the plan's largest batch may have fewer."""
ADDITIVE_WITHIN: Final = 0.01
"""The largest difference between the sum of contributions and the output, as a share of the output."""
_LEAST_SCALE: Final = 1e-6
_COPIES: Final = 3
"""How often the rows of an entry are in memory while they are made and run."""


class Explanation:
    """An explained row: `document` is its answer, `picture` its heat map as PNG, on demand."""

    def __init__(self, document: dict[str, Any], picture: Callable[[], bytes] | None) -> None:
        self.document = document
        self.picture = picture


class Explainer:
    """Explains the rows of a request."""

    def __init__(
        self,
        served: ServedVersion,
        query: ExplainQuery,
        outputs: tuple[str, ...] | None,
        passes: Passes,
        clock: Callable[[], float],
    ) -> None:
        """Every call of `explain` runs rows by `passes`, which give `outputs`; `clock` is the predictor's."""
        self._outputs = outputs
        self._served = served
        self._query = query
        self._passes = passes
        self._clock = clock

    def explain(self, subjects: list[Subject], most: int, until: float) -> list[Explanation]:
        """Explain all `subjects` with `most` passes, until the moment `until`.

        Raises InvalidInput if there are too few passes, DeadlineExceeded if there is too little time, and
        what a prediction raises.
        """
        explanations = []
        self._passes.turns.begin(until)
        try:
            for number, subject in enumerate(subjects):
                left = len(subjects) - number
                now = self._clock()
                explanations.append(
                    self._explain(subject, (most - self._passes.rows) // left, now + (until - now) / left)
                )
        finally:
            self._passes.turns.end()
        return explanations

    def _explain(self, subject: Subject, most: int, until: float) -> Explanation:
        target = Target(self._served, self._query, self._outputs)
        before = self._passes.rows
        # A row for the request and one for the baseline: they tell what is to be shared out.
        ends = np.array([[True] * subject.features, [False] * subject.features])
        first = self._evaluate(subject, target, ends, until)
        if len(first) < 2:
            raise _too_late(2 * subject.baselines, 0, self._query.method)
        value, base = float(first[0]), float(first[1])
        coalitions = max(0, most // subject.baselines - 2)
        method = self._method(subject, coalitions)
        least = least_coalitions(method, subject.features) if method != INTEGRATED_GRADIENTS else USUAL_STEPS
        self._passes.turns.least_rows = self._passes.rows + least * subject.baselines
        steps: int | None = None
        try:
            if method == INTEGRATED_GRADIENTS:
                found, steps = integrate(
                    value - base, _tolerance(value), subject.baselines, most - 2 * subject.baselines,
                    sum_gradients(self._served, subject, target, self._passes, until),
                )  # fmt: skip
            else:
                found = estimate(
                    method, base, value, subject.features, coalitions, self._query.seed,
                    lambda masks: self._evaluate(subject, target, masks, until),
                )  # fmt: skip
        except TooFewPasses as error:
            needed = error.needed + 2 * subject.baselines
            if method != INTEGRATED_GRADIENTS:
                needed = (error.needed + 2) * subject.baselines
            if needed > most:
                raise InvalidInput(
                    f"{subject.features} {subject.kind} need {needed} passes by the method {method}, and each"
                    f" row may have {most}; allow more passes, send fewer rows, or choose another method",
                    field="passes",
                    expected=needed,
                    got=most,
                ) from None
            raise _too_late(needed, self._passes.rows - before, method) from None
        return self._answer(subject, target, method, base, value, found, self._passes.rows - before, steps)

    def _method(self, subject: Subject, coalitions: int) -> str:
        if self._query.method != AUTO:
            return self._query.method
        return KERNEL if coalitions >= least_coalitions(KERNEL, subject.features) else OCCLUSION

    def _evaluate(self, subject: Subject, target: Target, masks: Array, until: float) -> Array:
        """Return the numbers of the coalitions in `masks`, or of the first ones if time runs out."""
        numbers: list[Array] = []
        with closing(self._passes.run(self._batches(subject, masks), until)) as results:
            for outputs in results:
                if target.index < 0:
                    target.choose(outputs)
                numbers.append(target.read(outputs))
        if not numbers:
            return np.empty(0)
        found = np.concatenate(numbers)
        complete = len(found) // subject.baselines * subject.baselines
        means: Array = found[:complete].reshape(-1, subject.baselines).mean(axis=1)
        return means

    def _batches(self, subject: Subject, masks: Array) -> Iterator[Tensors]:
        if not self._served.view.batching.enabled:
            yield from self._alone(subject, masks)
            return
        most, start = coalitions_per_entry(self._served, subject), 0
        while start < len(masks):
            size = max(1, self._passes.most_rows(most * subject.baselines) // subject.baselines)
            yield subject.rows(masks[start : start + size])
            start += size

    def _alone(self, subject: Subject, masks: Array) -> Iterator[Tensors]:
        for number in range(len(masks)):
            yield from subject.single_rows(masks[number : number + 1])

    def _answer(
        self,
        subject: Subject,
        target: Target,
        method: str,
        base: float,
        value: float,
        found: Estimate,
        passes: int,
        steps: int | None,
    ) -> Explanation:
        total = base + float(found.contributions.sum())
        difference = abs(total - value)
        document: dict[str, Any] = {
            "output": target.output,
            "index": target.index,
            "label": target.label,
            "scale": "scores" if target.is_score else "outputs",
            "value": value,
            "base": base,
            "baseline": subject.baseline,
            "method": method,
            "passes": passes,
            "exact": found.exact and method != OCCLUSION,
            "complete": found.complete,
            "additivity": {
                "sum": total,
                "difference": difference,
                "holds": difference <= _tolerance(value),
            },
            "kind": subject.kind,
        }
        if steps is not None:
            document["steps"] = steps
        # NaN, an error that is not known, becomes null.
        if subject.grid is None:
            document["contributions"] = [
                {**name, "contribution": contribution, "standard_error": error}
                for name, contribution, error in zip(
                    subject.names,
                    found.contributions.tolist(),
                    found.standard_errors.tolist(),
                    strict=True,
                )
            ]
            return Explanation(document, None)
        numbers, grey = subject.grid.numbers, subject.grid.grey
        shape = (-1, int(numbers[0, -1]) + 1)
        document["heat_map"] = {
            "height": numbers.shape[0],
            "width": numbers.shape[1],
            "patch": subject.grid.side,
            "contributions": found.contributions.reshape(shape).tolist(),
            "standard_errors": found.standard_errors.reshape(shape).tolist(),
        }
        return Explanation(document, lambda: draw_heat_map(grey, found.contributions[numbers]))


def _tolerance(value: float) -> float:
    """Return how far the sum of contributions may be from an output of `value`."""
    return ADDITIVE_WITHIN * max(abs(value), _LEAST_SCALE)


def coalitions_per_entry(served: ServedVersion, subject: Subject) -> int:
    """Return how many coalitions an entry has: the plan's largest batch, if memory allows."""
    rows = min(served.view.batching.max_rows, MOST_ENTRY_BYTES // subject.row_bytes)
    return max(1, rows // subject.baselines)


def working_bytes(served: ServedVersion, subjects: list[Subject], passes: int, method: str) -> int:
    """Return about how many bytes an explanation holds beside the request."""
    if method == INTEGRATED_GRADIENTS:
        return max(gradient_bytes(served, subject, passes) for subject in subjects)
    most = 0
    for subject in subjects:
        entry = coalitions_per_entry(served, subject) * subject.baselines
        rows = min(entry, passes) * subject.row_bytes
        masks = passes * subject.features
        # The fit of KernelSHAP holds its coalitions as numbers, several times.
        most = max(most, (IN_FLIGHT + _COPIES) * rows + 4 * 8 * masks + 4 * 8 * subject.features**2)
    return most


def _too_late(needed: int, ran: int, method: str) -> DeadlineExceeded:
    advice = "larger patches or the method occlusion"
    if method == INTEGRATED_GRADIENTS:
        advice = "fewer passes"
    return DeadlineExceeded(
        f"time was up after {ran} passes of the explanation, which needs {needed}; allow more time, or choose"
        f" {advice}"
    )
