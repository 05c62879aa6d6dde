"""Decides which versions may load at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from inferpool.backends.registry import backends_by_suffix, find_backend
from inferpool.errors import LoadError
from inferpool.repository.version_source import VersionSource
from inferpool.system.memory import chosen_limit

COPIES_DURING_LOAD: Final = 3
"""Bytes of memory for each byte of a version's files while it loads: runtimes parse and repack weights."""


def fits_beside(source: VersionSource, others: Sequence[VersionSource], memory_bytes: int) -> bool:
    """Whether a version may load while `others` do: there is memory, and its backend can.

    `memory_bytes` is the memory of the server; 0 for that of the machine or the container. PyTorch cannot
    load two files at once: what it traces is state of the process.
    """
    backend = _backend_name(source)
    if backend in map(_backend_name, others) and not _loads_at_once(backend):
        return False
    memory = chosen_limit(memory_bytes)
    needed = sum(size for each in (source, *others) for _, size, _ in each.files)
    return COPIES_DURING_LOAD * needed <= memory.limit - memory.held()


def _backend_name(source: VersionSource) -> str:
    """The name of the backend that loads a version."""
    return source.config.backend or backends_by_suffix().get(source.file.suffix, "")


def _loads_at_once(backend: str) -> bool:
    """Whether several threads may load files by a backend at the same time."""
    try:
        return find_backend(backend).loads_at_once
    except LoadError:
        return True  # the load will say so
