"""Entries with more rows than a batch may have: they run in pieces, whose outputs are put together again."""

from __future__ import annotations

from inferpool.errors import InferpoolError, ModelFailed
from inferpool.pool.batch import join
from inferpool.pool.instance import Outcome
from inferpool.pool.ports import Entry, Result
from inferpool.tensors import Tensors


class _Assembly:
    """The outputs that an entry has so far, by their first row."""

    def __init__(self, rows: int) -> None:
        self.missing_rows = rows
        self.parts: dict[int, Tensors] = {}
        self.queue_s = 0.0
        self.compute_s = 0.0


class SplitRequests:
    """The entries that are being put together. Their pool's lock is held by whoever calls."""

    def __init__(self) -> None:
        self._assemblies: dict[int, _Assembly] = {}

    def __contains__(self, entry_id: int) -> bool:
        return entry_id in self._assemblies

    def begin(self, entry: Entry) -> None:
        """An entry waits that will run in pieces."""
        self._assemblies[entry.id] = _Assembly(entry.rows)

    def drop(self, entry_id: int) -> bool:
        """Forget an entry; whether it was here."""
        return self._assemblies.pop(entry_id, None) is not None

    def ids(self) -> list[int]:
        """The ids of all of them."""
        return list(self._assemblies)

    def add(self, outcome: Outcome, queue_s: float, compute_s: float, batch_rows: int) -> Result | None:
        """The entry's result with its last piece, or with the first that fails; None where it goes on.

        `queue_s` is how long this piece waited, `compute_s` how long its batch of `batch_rows` rows ran.
        Where the pieces do not fit together, the result's error has the reason for its cause.
        """
        piece = outcome.piece
        entry_id = piece.entry.id
        assembly = self._assemblies.get(entry_id)
        if assembly is None:  # dropped meanwhile, or another piece has failed: it is answered
            return None
        assembly.queue_s = assembly.queue_s or queue_s
        assembly.compute_s += compute_s
        outputs: Tensors | None = None
        error = outcome.error
        if outcome.outputs is not None:
            assembly.parts[piece.start] = outcome.outputs
            assembly.missing_rows -= piece.rows
            if assembly.missing_rows:
                return None
            try:
                outputs = join([assembly.parts[start] for start in sorted(assembly.parts)])
            except Exception as fault:  # noqa: BLE001 - parts that do not fit together are the model's failure
                error = _failed(fault)
        del self._assemblies[entry_id]
        return Result(entry_id, outputs, error, assembly.queue_s, assembly.compute_s, batch_rows)


def _failed(fault: Exception) -> InferpoolError:
    failure = ModelFailed("the parts of the answer do not fit together")
    # The frames that it was raised in have the parts.
    failure.__cause__ = fault.with_traceback(None)
    return failure
