"""Whether rows of different lengths may share a run, padded to the longest: checked once, at load.

Rows of several lengths run one by one as they are, and together, each padded to the longest. The padding is
cut off the outputs again. Padding is safe if the rest is the same, within the datatype's rounding. A model
without a mask fails the check if padding changes its answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final, NamedTuple

import numpy as np

from inferpool.backends.base import LoadedModel
from inferpool.errors import Reason, short_reason
from inferpool.pool.padding import Padding
from inferpool.repository.load.comparison import compare_outputs
from inferpool.repository.load.runnable_rows import rows_between
from inferpool.tensors import Tensors, shape_text

_SHORTEST: Final = 1
_ROWS: Final = 8
_GROUPINGS: Final = ((0, 1, 2, 3, 4, 5, 6, 7), (7, 0), (4, 2, 6))


class _Result(NamedTuple):
    """The fault, or None; the largest relative difference; by output, the axes that tokens lie along."""

    fault: Reason | None
    difference: float = 0.0
    axes: Mapping[str, tuple[int, ...]] = {}


def check_padding(model: LoadedModel, rows: Tensors, padding: Padding) -> Padding:
    """Find out whether padding changes answers of `model`; returns `padding` with the result.

    `rows` are eight rows of `padding.unit` tokens.
    """
    longest = padding.unit
    if longest <= _SHORTEST:
        return replace(padding, reason="rows are too short to be padded")
    lengths = [longest - row * (longest - _SHORTEST) // (_ROWS - 1) for row in range(_ROWS)]
    requests = [
        {name: tensor[row : row + 1, :length] for name, tensor in rows.items()}
        for row, length in enumerate(lengths)
    ]
    try:
        result = _compare(model, requests, lengths, padding)
    except Exception as error:  # noqa: BLE001 - whatever the model raises, such rows do not share a batch
        result = _Result(f"the model raised {short_reason(error)!r} when they were padded")
    if result.fault is not None:
        return replace(padding, reason=f"rows of different lengths never share a batch: {result.fault}")
    return replace(
        padding,
        proven=True,
        axes=result.axes,
        reason=(
            f"so do rows of different lengths, padded to the longest (tried {min(lengths)} to {longest}"
            f" tokens; largest relative difference {result.difference:.1g})"
        ),
    )


def _compare(model: LoadedModel, requests: list[Tensors], lengths: list[int], padding: Padding) -> _Result:
    alone = [model.run(request) for request in requests]
    axes: dict[str, tuple[int, ...]] = {}
    for name in alone[0]:
        shapes = [outputs[name].shape for outputs in alone]
        varying = [axis for axis in range(1, len(shapes[0])) if len({shape[axis] for shape in shapes}) > 1]
        if any([shape[axis] for shape in shapes] != lengths for axis in varying):
            return _Result(
                f'output "{name}" is {shape_text(shapes[0])} for {lengths[0]} tokens and'
                f" {shape_text(shapes[-1])} for {lengths[-1]}"
            )
        if varying:
            axes[name] = tuple(varying)
    joined = {name: np.concatenate([out[name] for out in alone]) for name in alone[0] if name not in axes}
    padding = replace(padding, axes=axes)
    worst = 0.0
    for grouping in _GROUPINGS:
        together = model.run(padding.gather([requests[index] for index in grouping]))
        for row, index in enumerate(grouping):
            got = padding.cut(rows_between(together, row, row + 1), lengths[index])
            for name, tensor in got.items():
                reference, chosen = ({name: alone[index][name]}, 0) if name in axes else (joined, index)
                fault, difference = compare_outputs(
                    model.signature, {name: tensor}, reference, [chosen], model.rounding
                )
                if fault is not None:
                    return _Result(f"{fault} when {lengths[index]} tokens are padded")
                worst = max(worst, difference)
    return _Result(None, worst, axes)
