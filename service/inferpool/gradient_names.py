"""Gradients, which a run is asked for like outputs, by names that no output has.

So they pass through queues, batches and channels as outputs do. An entry that asks for gradients runs alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final, NamedTuple

_PREFIX: Final = "\0gradient "
"""Begins the name of every gradient. A client cannot ask for one: outputs are looked up in the signature."""


class Gradient(NamedTuple):
    """The derivative of one number of an output by all numbers of an input, in the shape of the input.

    Attributes:
        output: the output.
        element: the index of the number in a row of the output, all other dimensions counted as one.
        input: the input.
        by_rows: whether the output has rows, each of which depends on its own row of the input alone. The
            gradient then has the derivative for each row. Otherwise the whole output counts as one row.
    """

    output: str
    element: int
    input: str
    by_rows: bool

    @property
    def name(self) -> str:
        """The name by which a run is asked for it."""
        return _PREFIX + json.dumps(self)


def are_gradients(outputs: Sequence[str]) -> bool:
    """Return whether a run is asked for gradients in place of outputs."""
    return len(outputs) > 0 and outputs[0].startswith(_PREFIX)


def read_gradient(name: str) -> Gradient:
    """Return the gradient of a name that `Gradient.name` has made."""
    output, element, input_name, by_rows = json.loads(name.removeprefix(_PREFIX))
    return Gradient(output, element, input_name, by_rows)
