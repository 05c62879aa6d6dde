"""Looks at a file of the operator once a second, in a thread, so that a change of it needs no restart."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Final

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
"""How often the thread looks whether the file has changed."""

Signature = tuple[int, ...]
"""What changes whenever a file does; the number of the error if there is no file."""


class FileWatch(ABC):
    """Watches one file.

    Kubernetes replaces the files of a mounted secret by changing a link; the file that the path leads to is
    then another one, which is noticed like any other change.
    """

    def __init__(self, path: Path, name: str) -> None:
        """`name` is that of the thread. The subclass has read the file, or reads it now."""
        self._path = path
        self._loop: Any = None
        self._seen = self._sign()
        self._closed = threading.Event()
        self._worker = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self, loop: Any) -> None:
        """Start the thread; changes take effect on the event loop `loop`."""
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
        if signature == self._seen:
            self.unchanged()
            return
        self._seen = signature
        self.changed(is_empty=len(signature) > 1 and not signature[2])

    @abstractmethod
    def changed(self, *, is_empty: bool) -> None:
        """Read the file again, in the thread. It may be missing or wrong."""

    def unchanged(self) -> None:  # noqa: B027 - few subclasses need it
        """Take note that the file is as before."""

    def _run(self) -> None:
        while not self._closed.wait(LOOK_S):
            try:
                self.look()
            except Exception:
                log.exception("looking at %s failed", self._path)

    def _sign(self) -> Signature:
        try:
            found = self._path.stat()
        except OSError as error:
            return (error.errno or 0,)
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
