"""Which versions of the models folder this process serves: an engine may have some of them only."""

from __future__ import annotations

from collections.abc import Collection

from inferpool.pool.ports import VersionKey


class VersionFilter:
    """The versions to serve, and those to leave out.

    Attributes:
        only: the versions to serve, whether they are found or not; None for all.
    """

    def __init__(self, only: Collection[VersionKey] | None, skip: Collection[VersionKey]) -> None:
        """Serve the versions of `only`, or all of them if that is None, but for those of `skip`."""
        self.only = None if only is None else frozenset(only)
        self._skip = set(skip)

    def takes(self, key: VersionKey) -> bool:
        """Whether this process serves a version."""
        return key not in self._skip and (self.only is None or key in self.only)

    def take_new(self) -> None:
        """Serve versions beside `only` too from now on."""
        self.only = None

    def stop_skipping(self, model: str, version: int | None) -> None:
        """Serve a version that was left out; None for all of the model."""
        self._skip = {key for key in self._skip if key.model != model or version not in (None, key.version)}
