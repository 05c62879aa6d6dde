"""Counts the full garbage collections that code asks for."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def full_collections() -> Iterator[list[int]]:
    """Add what each full collection has freed to the list; within the block Python starts none by itself."""
    freed: list[int] = []

    def note(phase: str, info: dict[str, Any]) -> None:
        if phase == "stop" and info["generation"] == 2:
            freed.append(info["collected"])

    enabled = gc.isenabled()
    gc.disable()
    gc.callbacks.append(note)
    try:
        yield freed
    finally:
        gc.callbacks.remove(note)
        if enabled:
            gc.enable()
