"""Reads the file of keys again when it changes, so that a new or revoked key needs no restart."""

from __future__ import annotations

import logging
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from inferpool.errors import ConfigError
from inferpool.http.access.file_watch import FileWatch
from inferpool.http.access.gate import Gate
from inferpool.http.access.key_file import KeyRecord, callers_of, read_key_file
from inferpool.observe.metrics import Metrics, Sample

log = logging.getLogger(__name__)

_MOST_STEP_S: Final = 1.0
"""Seconds by which the time of day may drift from the server's clock until expiry is reckoned again."""


class KeyFileWatch(FileWatch):
    """The keys of one file."""

    def __init__(self, path: Path, gate: Gate, clock: Callable[[], float], metrics: Metrics) -> None:
        """Give the keys in the file `path` to `gate`; raises ConfigError if the file cannot be read."""
        super().__init__(path, "keys")
        self._gate = gate
        self._clock = clock
        self._records: list[KeyRecord] = []
        self._wall_offset = 0.0
        self._stale = False
        self._warn_if_open()
        self._use(read_key_file(path))
        metrics.add_source(self._readings)

    def unchanged(self) -> None:
        """Reckon the expiry of keys again if the clock of the machine was set, or the machine slept."""
        if abs(time.time() - self._clock() - self._wall_offset) > _MOST_STEP_S:
            self._loop.call_soon_threadsafe(self._use, self._records)

    def changed(self, *, is_empty: bool) -> None:
        """Read the keys again."""
        self._warn_if_open()
        try:
            if is_empty:
                # An editor that empties the file before it writes must not lock everybody out.
                raise ConfigError(
                    f"{self._path}: the file is empty; to revoke every key, leave a comment in it"
                )
            records = read_key_file(self._path)
        except ConfigError as error:
            self._stale = True
            log.error("the keys could not be read again, and the former keys stay valid: %s", error.detail)
            return
        self._stale = False
        self._loop.call_soon_threadsafe(self._use, records)
        log.info("the keys were read again: %d keys", len(records))

    def _use(self, records: list[KeyRecord]) -> None:
        if not records:
            log.warning("%s has no keys: requests that need one are refused", self._path)
        self._records = records
        self._wall_offset = time.time() - self._clock()
        self._gate.use(callers_of(records, self._clock, time.time))

    def _warn_if_open(self) -> None:
        try:
            mode = self._path.stat().st_mode
        except OSError:
            return  # whoever reads the file says so
        if mode & stat.S_IWOTH:
            log.warning("%s: everybody on this machine may write this file, and so add keys", self._path)

    def _readings(self) -> list[Sample]:
        return [("stale_keys", ("keys_file",), float(self._stale))]
