"""Rows of different lengths: what they cost, which of them share a batch, and how they get one length.

Pure policy and plain arithmetic. A row of text is some tokens. A batch of such rows has the length of the
longest, and the others are padded. Rows share a batch if `span` rounds their lengths up to the same number,
so that no row is padded by more than one step of `span`. We also tried to fill batches in the queue's order
while padding adds at most an eighth. That padded more (10.7 % against 2.3 %), and its speed could not be told
apart.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from inferpool.tensors import Array, Tensors

STEP: Final = 8
"""Lengths up to eight times this are rounded up to its multiples; longer ones grow by an eighth at most."""


@dataclass(frozen=True, slots=True)
class Padding:
    """How a version treats rows of different lengths.

    Attributes:
        fills: the inputs whose second dimension counts tokens, and the value of padding in each.
        ids: the input whose length is the number of tokens.
        mask: the input that is 1 for every token and 0 for padding; None if the model has none.
        rounded: whether lengths are rounded up to lengths that repeat, as batch sizes are on GPUs.
        unit: tokens of the rows that were measured at load.
        longest: tokens of the longest row that a text can become.
        proven: whether padding changes no answer, so that rows of different lengths may share a batch.
        axes: for each output with such axes, the axes that count tokens.
        reason: one sentence for `/models` that says why padding is proven, or why not.
    """

    fills: Mapping[str, float]
    ids: str
    unit: int
    longest: int
    proven: bool = False
    axes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    reason: str = ""
    mask: str | None = None
    rounded: bool = False

    def length(self, inputs: Tensors) -> int:
        """Return how many tokens each row of an entry's inputs has."""
        return int(inputs[self.ids].shape[1])

    def sharing(self, inputs: Tensors) -> tuple[Hashable, float]:
        """Return the group of an entry with these inputs, and a row's cost in rows of `unit` tokens."""
        length = self.length(inputs)
        # A client's own mask may hide some or all tokens, and padding may then change the answer.
        exact = not self.proven or (self.mask is not None and not (inputs[self.mask] == 1).all())
        shared = length if exact else span(length)
        # A short row costs as much as one of `unit` tokens, so that limits on load also limit rows.
        return (length,) if exact else shared, max(1.0, shared / self.unit)

    def run_length(self, length: int) -> int:
        """Return the length to which rows of `length` tokens are padded for a run."""
        if not (self.rounded and self.proven):
            return length
        return max(length, min(span(length), self.longest))

    def run_lengths(self) -> list[int]:
        """Return every length that a run can have; empty unless lengths are rounded."""
        if not (self.rounded and self.proven):
            return []
        return sorted({self.run_length(length) for length in range(1, self.longest + 1)})

    def may_grow(self, parts: Sequence[Tensors]) -> bool:
        """Whether the mask hides no token of any row, so that padding changes no answer."""
        return self.mask is None or all(bool((part[self.mask] == 1).all()) for part in parts)

    def gather(self, parts: Sequence[Tensors]) -> Tensors:
        """Return the inputs of all parts, concatenated; rows are padded to the longest's `run_length`."""
        lengths = list(map(self.length, parts))
        longest = self.run_length(max(lengths))
        rows = sum(len(part[self.ids]) for part in parts)
        gathered: Tensors = {}
        for name, first in parts[0].items():
            padded = np.full((rows, longest, *first.shape[2:]), self.fills[name], first.dtype)
            start = 0
            for part, length in zip(parts, lengths, strict=True):
                tensor = part[name]
                padded[start : start + len(tensor), :length] = tensor
                start += len(tensor)
            gathered[name] = padded
        return gathered

    def cut(self, outputs: Tensors, length: int) -> Tensors:
        """Return outputs of rows that were padded from `length` tokens, without the values of the padding."""
        if not self.axes:
            return outputs
        return {name: self._cut(tensor, self.axes.get(name, ()), length) for name, tensor in outputs.items()}

    @staticmethod
    def _cut(tensor: Array, axes: tuple[int, ...], length: int) -> Array:
        for axis in axes:
            tensor = tensor[(slice(None),) * axis + (slice(length),)]
        return tensor


def span(length: int) -> int:
    """Return `length` rounded up to a multiple of `STEP`, or above 8 × `STEP` of a larger power of two.

    The span rises with `length` and is never below it. It exceeds `length` by less than `STEP`, or by at most
    an eighth of `length`, whichever is larger.
    """
    step = max(STEP, 1 << max(0, (length - 1).bit_length() - 4))
    return -(-length // step) * step
