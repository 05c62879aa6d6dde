"""The method of gradients: whether a request can have it, and its rows, which are points on a path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Final

import numpy as np

from inferpool.errors import InvalidInput, ModelRejected
from inferpool.explain.integrated_gradients import INTEGRATED_GRADIENTS, PathPoints
from inferpool.gradient_names import Gradient
from inferpool.http.explain.options import CONTINUOUS, OTHER_METHODS, ExplainQuery
from inferpool.http.explain.passes import Passes
from inferpool.http.explain.subject import Subject
from inferpool.http.explain.target import Target
from inferpool.http.predict.served_version import ServedVersion
from inferpool.tensors import Array, Tensors, name_text

_MOST_ROWS: Final = 16
_MOST_BYTES: Final = 256 * 1024
"""Points of a run, and bytes of their rows.

The run keeps all that it computes until it has the gradients, and predictions wait until it has ended.
"""


def check_gradients(served: ServedVersion, target: Target, query: ExplainQuery) -> None:
    """Raise InvalidInput if the request wants gradients of an output that has none."""
    if query.method != INTEGRATED_GRADIENTS:
        return
    runtime = served.view.backend.partition(" ")[0]
    if runtime != "torch":
        raise InvalidInput(
            f"the method {INTEGRATED_GRADIENTS} needs a model that PyTorch runs; {runtime} runs this one, and"
            f" computes no gradients; {OTHER_METHODS}",
            field="method",
        )
    if target.is_score:
        raise InvalidInput(
            f"the method {INTEGRATED_GRADIENTS} explains outputs as the model gives them, not scores; leave"
            " scale out, or choose another method",
            field="scale",
        )
    spec = served.signature.outputs_by_name[target.output]
    if spec.datatype not in CONTINUOUS:
        raise InvalidInput(
            f"output {name_text(target.output)} is {spec.datatype}, and gradients need floating-point"
            f" numbers; {OTHER_METHODS}",
            field="output",
        )


def points_per_entry(served: ServedVersion, subject: Subject) -> int:
    """Return how many points an entry has: few, because predictions cannot run before its run has ended."""
    if not served.view.batching.enabled:
        return 1
    rows = min(_MOST_ROWS, served.view.batching.max_rows, _MOST_BYTES // subject.row_bytes)
    return max(1, rows)


def gradient_bytes(served: ServedVersion, subject: Subject, passes: int) -> int:
    """Return about how many bytes the points and gradients of an explanation take, beside the request."""
    # The rows of an entry, as they are sent, as FP64 on the way there and back, and as gradients.
    rows = 4 * 8 * subject.row_bytes * (points_per_entry(served, subject) + 1)
    return rows + 4 * 8 * passes


def sum_gradients(
    served: ServedVersion, subject: Subject, target: Target, passes: Passes, until: float
) -> Callable[[PathPoints], Array | None]:
    """Return the function `sum_up` of `integrate`, which runs points by `passes` until the moment `until`.

    The function raises ModelRejected if the model has no gradients, and what a prediction raises.
    """
    by_rows = served.view.batching.enabled
    names = {
        name: Gradient(target.output, target.index, name, by_rows).name for name in subject.varied_inputs
    }
    size = points_per_entry(served, subject)

    def sum_up(points: PathPoints) -> Array | None:
        total = np.zeros(subject.features)
        batches: Iterator[Tensors] = (subject.path_rows(piece) for piece in points.pieces(size))
        done = 0
        try:
            with closing(passes.run(batches, until, tuple(names.values()))) as results:
                for piece, found in zip(points.pieces(size), results, strict=False):
                    total += subject.path_contributions(piece, {name: found[names[name]] for name in names})
                    done += len(piece.positions)
        except ModelRejected as error:
            raise ModelRejected(f"{error.detail}; {OTHER_METHODS}") from error
        if done < len(points.positions):
            return None
        if not np.isfinite(total).all():
            raise ModelRejected(
                f"the gradients of output {name_text(target.output)} are not finite everywhere"
                f" between the baseline and the row; choose another baseline or target, or {OTHER_METHODS}"
            )
        return total

    return sum_up
