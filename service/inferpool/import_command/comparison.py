"""Whether the converted model answers as the framework does."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from inferpool.errors import InvalidInput
from inferpool.tensors import Array


def compare_answers(
    got: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float, framework: str
) -> float:
    """Return the largest difference of the answers.

    A number may differ by `tolerance`, or by that share of the framework's answer, as in golden samples.
    Raises InvalidInput if one differs by more, or an output is missing or has another shape.
    """
    worst = 0.0
    for name, values in expected.items():
        answer = got.get(name)
        if answer is None or answer.shape != values.shape:
            shape = "missing" if answer is None else f"of shape {list(answer.shape)}"
            raise InvalidInput(f'output "{name}" is {shape}; {framework} answers {list(values.shape)}')
        if values.dtype.kind in "US":
            if answer.astype(str).tolist() != values.tolist():
                raise InvalidInput(f'output "{name}" has other strings than {framework} answers')
            continue
        ours, theirs = answer.astype(float), values.astype(float)
        with np.errstate(invalid="ignore"):
            differences = np.nan_to_num(np.abs(ours - theirs))
        difference = float(differences.max()) if values.size else 0.0
        if not np.allclose(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise InvalidInput(
                f'output "{name}" differs from {framework} by {difference:g}, more than {tolerance:g}'
            )
        worst = max(worst, difference)
    return worst
