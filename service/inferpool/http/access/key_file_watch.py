"""Reads the file of keys again when it changes, so that a new or revoked key needs no restart."""

from __future__ import annotations

import logging
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from inferpool.errors import ConfigError
from inferpool.http.access.gate import Gate
from inferpool.http.access.key_file import KeyRecord, callers_of, read_key_file
from inferpool.observe.metrics import Metrics, Sample

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
"""How often a thread looks whether the file has changed."""

_MOST_STEP_S: Final = 1.0
"""Seconds by which the time of day may drift from the server's clock until expiry is reckoned again."""

_Signature = tuple[int, ...]


class KeyFileWatch:
    """The keys of one file. A thread looks at the file once a second.

    Kubernetes replaces the files of a mounted secret by changing a link; the file that the path leads to is
    then another one, which is noticed like any other change.
    """

    def __init__(self, path: Path, gate: Gate, clock: Callable[[], float], metrics: Metrics) -> None:
        """Give the keys in the file `path` to `gate`; raises ConfigError if the file cannot be read."""
        self._path = path
        self._gate = gate
        self._clock = clock
        self._records: list[KeyRecord] = []
        self._wall_offset = 0.0
        self._stale = False
        self._closed = threading.Event()
        self._worker = threading.Thread(target=self._run, name="keys", daemon=True)
        self._signature = self._sign()
        self._use(read_key_file(path))
        metrics.add_source(self._readings)

    def start(self, loop: Any) -> None:
        """Start the thread; new keys take effect on the event loop `loop`."""
        self._loop = loop
        self._worker.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._worker.is_alive():
            self._worker.join()

    def look(self) -> None:
        """Read the file again if it has changed since it was read last."""
        signature = self._sign()
        if signature == self._signature:
            if abs(time.time() - self._clock() - self._wall_offset) > _MOST_STEP_S:
                # The clock of the machine was set, or the machine slept: keys expire at another moment now.
                self._loop.call_soon_threadsafe(self._use, self._records)
            return
        self._signature = signature
        try:
            if len(signature) > 1 and not signature[2]:
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

    def _run(self) -> None:
        while not self._closed.wait(LOOK_S):
            try:
                self.look()
            except Exception:
                log.exception("looking at the file of keys failed")

    def _sign(self) -> _Signature:
        """What changes whenever the file does; the number of the error if there is no file."""
        try:
            found = self._path.stat()
        except OSError as error:
            return (error.errno or 0,)
        if found.st_mode & stat.S_IWOTH:
            log.warning("%s: everybody on this machine may write this file, and so add keys", self._path)
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def _readings(self) -> list[Sample]:
        return [("stale_keys", ("keys_file",), float(self._stale))]
