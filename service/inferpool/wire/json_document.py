"""What the quick ways of reading a JSON body have in common: they may decline, and then word no errors.

Whatever one of them does not decline is what `inferpool.wire.nested_lists` makes of the same body. The caller reads a
declined body the plain way, which finds the fault and words it.
"""

from __future__ import annotations

from typing import Any, Protocol

from inferpool.tensors import Array, TensorSpec


class FallBack(Exception):
    """This way does not take what it found."""


class Document(Protocol):
    """A body that one of the quick ways has opened.

    Attributes:
        fields: the top-level fields as plain values, except for what may hold many numbers, which is left
            for `read`: `inputs`, or its members where it is an object, or their `data` where it is a list of
            objects.
    """

    fields: dict[str, Any]

    def read(self, spec: TensorSpec, value: Any) -> Array:
        """The tensor that `value`, one of those left or plain, spells, in the datatype of `spec`.

        Read the tensors in the body's order. Raises Declined, or InvalidInput which may name another fault
        than the plain way finds first.
        """

    def proven(self) -> bool:
        """Whether every tensor read is regular; ask once all of them are read."""

    def close(self) -> None:
        """Nothing is read afterwards."""
