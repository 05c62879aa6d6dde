"""The number that is explained: one element of an output, or the score of a label."""

from __future__ import annotations

import numpy as np

from inferpool.errors import InvalidInput, ModelFailed, ModelRejected
from inferpool.http.explain.options import ExplainQuery
from inferpool.http.predict.served_version import ServedVersion
from inferpool.tensors import JSON, Array, Tensors, bf16_to_fp32, name_text, names_text


class Target:
    """Reads the number that is explained from outputs.

    Attributes:
        output: the name of the output.
        index: the index of the number in a row of the output, all dimensions counted as one; -1 until it is
            chosen.
        label: the name of the number, if the output has labels.
        is_score: whether the number is the score of a label, and not the output itself.
    """

    def __init__(self, served: ServedVersion, query: ExplainQuery, outputs: tuple[str, ...] | None) -> None:
        """Find the output, among those that the body names as `outputs`, if any; raises InvalidInput."""
        self._served = served
        self._wanted = query.target
        classes = served.view.classes
        named = query.output or (outputs[0] if outputs else None)
        self.output = named or (classes.output if classes is not None else _first_numbers(served))
        spec = served.signature.outputs_by_name.get(self.output)
        if spec is None or spec.datatype in ("BYTES", JSON):
            what = "has no numbers" if spec is not None else "is no output"
            known = names_text(served.signature.outputs_by_name)
            raise InvalidInput(
                f"{name_text(self.output)} {what}; the model gives {known}",
                field="output",
            )
        self._labels = classes if classes is not None and classes.output == self.output else None
        self.is_score = self._labels is not None and query.takes_scores
        self.index = -1
        self.label: str | None = None

    def choose(self, outputs: Tensors) -> None:
        """Choose the number by the outputs for the request itself, its first row; raises InvalidInput."""
        row = self._numbers(outputs)[0]
        names = self._labels.names if self._labels is not None else ()
        if self._wanted is None:
            self.index = int(np.argmax(np.where(np.isnan(row), -np.inf, row))) if row.size else -1
        elif self._wanted in names:
            self.index = names.index(self._wanted)
        elif self._wanted.isdecimal() and len(self._wanted) < 19:
            self.index = int(self._wanted)
        if not 0 <= self.index < row.size:
            has = f"{row.size} numbers" + (f", labelled {names_text(names)}" if names else "")
            raise InvalidInput(
                f'"target" is {name_text(self._wanted or "")}; a row of {name_text(self.output)} has {has}',
                field="target",
            )
        if self.index < len(names):
            self.label = names[self.index]

    def read(self, outputs: Tensors) -> Array:
        """Return the number for each row, FP64; raises ModelRejected if it is not finite."""
        rows = self._numbers(outputs)
        if self.index >= rows.shape[1]:
            raise ModelFailed(f"the rows of output {name_text(self.output)} differ in their size")
        numbers = rows[:, self.index].astype(np.float64)
        if not np.isfinite(numbers).all():
            raise ModelRejected(
                f"output {name_text(self.output)} is not a finite number for some inputs of the explanation;"
                " choose another target or baseline"
            )
        return numbers

    def _numbers(self, outputs: Tensors) -> Array:
        """Return the numbers of each row, as they are explained: `[rows, numbers]`."""
        numbers = outputs[self.output]
        if self.is_score and self._labels is not None:
            numbers = self._labels.scores(outputs)
        elif self.output in self._served.bf16:
            numbers = bf16_to_fp32(numbers)
        rows = len(numbers) if self._served.view.batching.enabled else 1
        return numbers.reshape(rows, -1)


def _first_numbers(served: ServedVersion) -> str:
    for spec in served.signature.outputs:
        if spec.datatype not in ("BYTES", JSON):
            return spec.name
    raise InvalidInput("the model has no output of numbers, so there is nothing to explain")
