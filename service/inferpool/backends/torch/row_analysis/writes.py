"""Operations that write to a tensor in place, though other tensors may lie in the same memory."""

from __future__ import annotations

from typing import Final

from inferpool.backends.row_analysis.values import Kind, Value, mixed, unknown
from inferpool.backends.torch.row_analysis.rules import VIEWS


class Memory:
    """Which tensors may lie in the memory of which other ones.

    A write is harmless if each row of the target gets what that row alone decides: then the same holds for
    every tensor in the same memory, because views of rows keep the rows apart. Any other write spoils the
    whole analysis, and `spoiled` says why.
    """

    def __init__(self, state: set[str]) -> None:
        """`state` are the names of the parameters and buffers."""
        self.spoiled: Value | None = None
        self._state: Final = state
        self._roots: dict[str, str] = {}
        self._spread: set[str] = set()

    def note(self, operation: str, source: str | None, outputs: list[str], *, writes: bool) -> None:
        """Note that a call with `source` as its first tensor made `outputs`."""
        if source is None or not (writes or operation in VIEWS):
            return
        for output in outputs:
            self._roots[output] = self._root(source)
            if operation in ("expand", "expand_as", "broadcast_to", "as_strided", "unfold") or (
                source in self._spread
            ):
                self._spread.add(output)

    def write(self, label: str, target: str, before: Value, after: Value, root: Value | None) -> None:
        """Note that a call wrote `after` to `target`, which was `before`; `root` has its memory."""
        if self.spoiled is not None:
            return
        if self._root(target) in self._state:
            self.spoiled = mixed(f"{label} changes the state of the model with each run")
        elif not after.is_decided:
            self.spoiled = after
        elif target in self._spread:
            self.spoiled = unknown(f"{label} writes to memory that several elements share")
        elif before.kind is Kind.SHARED and after.kind is Kind.SHARED:
            if any(each is not None and each.elements is not None for each in (before, root)):
                self.spoiled = unknown(f"{label} writes to a size")
        elif before.kind is not Kind.ROWED or root is None or root.kind is not Kind.ROWED:
            self.spoiled = unknown(f"{label} writes rows to memory without rows")
        elif after.kind is Kind.ROWED and (after.axis != before.axis or not after.lies_as(before)):
            self.spoiled = unknown(f"{label} writes rows to other places than theirs")

    def root_of(self, name: str) -> str:
        """Return the name of the tensor whose memory the tensor `name` may lie in."""
        return self._root(name)

    def _root(self, name: str) -> str:
        return self._roots.get(name, name)
