"""Whether rows of different lengths may share a run, padded to the longest: the proof, made once at load.

Rows of several lengths are run one by one as they are, and together, each filled up to the longest. If what
is left after the padding's part has been cut off is the same, within the datatype's rounding, then padding
changes no answer. A model without a mask that lets padding through does not pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import numpy as np

from inferpool.backends.base import LoadedModel
from inferpool.pool.padding import Padding
from inferpool.repository.load.batching_check import compare, first_line
from inferpool.tensors import Tensors, shape_text

_SHORTEST: Final = 1
_ROWS: Final = 8
_GROUPINGS: Final = ((0, 1, 2, 3, 4, 5, 6, 7), (7, 0), (4, 2, 6))


def prove_padding(model: LoadedModel, rows: Tensors, padding: Padding) -> Padding:
    """`padding` with the verdict on `model`, reached with `rows`: eight of `padding.unit` tokens."""
    longest = padding.unit
    if longest <= _SHORTEST:
        return replace(padding, reason="rows are too short to be padded")
    lengths = [longest - place * (longest - _SHORTEST) // (_ROWS - 1) for place in range(_ROWS)]
    parts = [
        {name: tensor[place : place + 1, :length] for name, tensor in rows.items()}
        for place, length in enumerate(lengths)
    ]
    try:
        fault, worst, axes = _compare(model, parts, lengths, padding)
    except Exception as error:  # noqa: BLE001 - whatever a model raises, such rows do not share a batch
        fault, worst, axes = f"the model raised {first_line(error)!r} when they were padded", 0.0, {}
    if fault:
        return replace(padding, reason=f"rows of different lengths never share a batch: {fault}")
    return replace(
        padding,
        proven=True,
        axes=axes,
        reason=(
            f"so do rows of different lengths, padded to the longest (tried {min(lengths)} to {longest}"
            f" tokens; largest relative difference {worst:.1g})"
        ),
    )


def _compare(
    model: LoadedModel, parts: list[Tensors], lengths: list[int], padding: Padding
) -> tuple[str, float, Mapping[str, tuple[int, ...]]]:
    """What is wrong ("" if nothing is), the largest relative difference, and the outputs' axes of tokens."""
    alone = [model.run(part) for part in parts]
    axes: dict[str, tuple[int, ...]] = {}
    for name in alone[0]:
        shapes = [outputs[name].shape for outputs in alone]
        varying = [axis for axis in range(1, len(shapes[0])) if len({shape[axis] for shape in shapes}) > 1]
        if any([shape[axis] for shape in shapes] != lengths for axis in varying):
            return f'output "{name}" is {shape_text(shapes[0])} for {lengths[0]} tokens and' \
                   f" {shape_text(shapes[-1])} for {lengths[-1]}", 0.0, {}  # fmt: skip
        if varying:
            axes[name] = tuple(varying)
    whole = {name: np.concatenate([out[name] for out in alone]) for name in alone[0] if name not in axes}
    padding = replace(padding, axes=axes)
    worst = 0.0
    for grouping in _GROUPINGS:
        together = model.run(padding.gather([parts[place] for place in grouping]))
        for row, place in enumerate(grouping):
            got = padding.cut(
                {name: tensor[row : row + 1] for name, tensor in together.items()}, lengths[place]
            )
            for name, tensor in got.items():
                reference, chosen = ({name: alone[place][name]}, 0) if name in axes else (whole, place)
                fault, difference = compare(
                    model.signature, {name: tensor}, reference, [chosen], model.rounding
                )
                if fault:
                    return f"{fault} when {lengths[place]} tokens are padded", worst, {}
                worst = max(worst, difference)
    return "", worst, axes
