"""Tells files that are complete from files that are still being copied, by whether they stand still."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from inferpool.errors import Reason
from inferpool.pool.ports import VersionKey
from inferpool.repository.version_source import VersionSource

SETTLE_S: Final = 1.0
"""For how long the files of a version stand still before they count as complete."""


class SettledSources:
    """Remembers what each version was when it was looked at last.

    Files that have not changed for `SETTLE_S` by their own times are complete at once: a folder that is
    renamed into place does not wait. All others wait until two looks, `SETTLE_S` apart, find the same.
    """

    def __init__(self, clock: Callable[[], float], wall_clock: Callable[[], float]) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._seen: dict[object, tuple[object, float]] = {}

    def is_settled(self, key: VersionKey, source: VersionSource | Reason | None) -> bool:
        """Whether a version is what it seems: `source`, a sentence why it cannot be loaded, or deleted."""
        changed_at = source.changed_at if isinstance(source, VersionSource) else None
        return self._stands_still(key, source, changed_at)

    def is_config_settled(self, model: str, stamp: Any, known: Any) -> bool:
        """Whether a `model.toml` is complete: it is the `known` one, or has not changed for a while.

        A stamp is the size of the file and the moment of its last change; None if there is no file.
        """
        if stamp == known:
            self._seen.pop(model, None)
            return True
        return self._stands_still(model, stamp, None if stamp is None else stamp[1])

    def _stands_still(self, name: object, found: object, changed_at: float | None) -> bool:
        now = self._clock()
        before = self._seen.get(name)
        if before is None or before[0] != found:
            self._seen[name] = (found, now)
            return changed_at is not None and self._wall_clock() - changed_at >= SETTLE_S
        if changed_at is not None and self._wall_clock() - changed_at >= SETTLE_S:
            return True
        return now - before[1] >= SETTLE_S
