"""What ran on an instance whose thread died: it runs once more, each entry alone."""

from __future__ import annotations

from collections import deque

from inferpool.errors import ModelFailed
from inferpool.pool.drop_reasons import DROPPED
from inferpool.pool.instance import Batch, Outcome
from inferpool.pool.ports import Entry


class Retries:
    """Batches of one piece that wait to be run again. Their pool's lock is held by whoever calls."""

    def __init__(self) -> None:
        self._waiting: deque[Batch] = deque()
        # What is run for the second time, by its entry's id and its first row.
        self._tried: set[tuple[int, int]] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, batch: Batch, now: float) -> list[Outcome]:
        """Have the pieces of a batch run again; the outcomes of those that do not.

        They end where it was their second time, or their deadline has passed.
        """
        ended: list[Outcome] = []
        for piece in batch.pieces:
            run = (piece.entry.id, piece.start)
            if run in self._tried:
                self._tried.discard(run)
                failure = ModelFailed("the model ended its instance on this request")
                ended.append(Outcome(piece, None, failure))
            elif piece.entry.deadline <= now:
                ended.append(Outcome(piece, None, DROPPED["deadline"]()))
            else:
                self._tried.add(run)
                self._waiting.append(Batch([piece], batch.batched, "retry", now, batch.padding))
        return ended

    def take(self) -> Batch | None:
        """The one that has waited longest."""
        return self._waiting.popleft() if self._waiting else None

    def ran(self, batch: Batch) -> None:
        """A batch has run to its end, whether it was one of these or not."""
        if self._tried:
            self._tried.difference_update((piece.entry.id, piece.start) for piece in batch.pieces)

    def cancel(self, entry_id: int) -> Entry | None:
        """Take an entry out that waits here as a whole; None if it does not."""
        for batch in self._waiting:
            piece = batch.pieces[0]
            if piece.entry.id == entry_id and piece.whole:
                self._waiting.remove(batch)
                return piece.entry
        return None

    def clear(self) -> list[Batch]:
        """All that waits, which does so no longer."""
        waiting = list(self._waiting)
        self._waiting.clear()
        return waiting
