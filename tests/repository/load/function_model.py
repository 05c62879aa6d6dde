"""A model that is a Python function, for tests of what a load finds out about a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from inferpool.backends.base import LoadedModel
from inferpool.tensors import Signature, Tensors, TensorSpec


class Clock:
    """A clock that a test moves, so that no measurement depends on the machine."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class FunctionModel(LoadedModel):
    """A model that answers a Python function of "x"; `runs` has the rows of each run."""

    def __init__(
        self,
        function: Callable[[np.ndarray], Any],
        shape: tuple[int, ...] = (-1, 4),
        datatype: str = "FP32",
        out: tuple[str, tuple[int, ...] | None] = ("FP32", None),
    ) -> None:
        self.signature = Signature((TensorSpec("x", datatype, shape),), (TensorSpec("y", *out),))
        self.runs: list[int] = []
        self._function = function

    def run(self, inputs: Tensors, outputs: object = None) -> Tensors:
        self.runs.append(len(inputs["x"]))
        return {"y": self._function(inputs["x"])}

    def close(self) -> None:
        pass
