"""Keeps the capture of a CUDA graph apart from work on other threads: either would break the other.

ONNX Runtime captures in CUDA's global mode. During such a capture no thread of the process may load a kernel
or wait for the whole device. cuDNN builds the plan of a convolution with threads of its own, whenever a
convolution meets another shape; on an H200 such a run failed with error 900 ("operation not permitted when
stream is capturing") if another instance was capturing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final


class CaptureGate:
    """Lets one thread capture, or any number of threads do other work on GPUs."""

    def __init__(self) -> None:
        self._opens = threading.Lock()
        self._changed = threading.Condition()
        self._working = 0
        self._waiting = 0
        self._capturer: int | None = None

    @property
    def capturing(self) -> bool:
        """Whether a thread captures."""
        return self._capturer is not None

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Wait until no other work is in progress, and hold it up until the context ends."""
        with self._opens, self._capture():
            yield

    @contextmanager
    def open(self) -> Iterator[None]:
        """Keep captures away while a session is opened, which waits for the whole device.

        That takes seconds, so other work goes on meanwhile, whether a capture waits or not.
        """
        with self._opens:
            yield

    @contextmanager
    def _capture(self) -> Iterator[None]:
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._working and self._capturer is None)
            self._waiting -= 1
            self._capturer = threading.get_ident()
        try:
            yield
        finally:
            with self._changed:
                self._capturer = None
                self._changed.notify_all()

    @contextmanager
    def work(self) -> Iterator[None]:
        """Wait until no thread captures or waits to capture. The capturing thread itself goes on at once."""
        if self._capturer == threading.get_ident():
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: self._capturer is None and not self._waiting)
            self._working += 1
        try:
            yield
        finally:
            with self._changed:
                self._working -= 1
                if not self._working:
                    self._changed.notify_all()


DEVICE_GATE: Final = CaptureGate()
"""The gate of all GPUs of this process."""
