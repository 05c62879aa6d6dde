"""Keeps what a runtime has mapped of a model's files, whatever becomes of the files.

A runtime may map weights instead of reading them. If such a file is written over while the model serves, the
answers change; if it is cut off, the next run ends the process with SIGBUS. So each mapping is exchanged for
memory with the same content at the same address, in one step of the kernel. Weights are in memory once, as if
they had been read. Weights that the runtime has repacked are no longer mapped and cost nothing.

This needs Linux. On other systems nothing is exchanged.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from inferpool.errors import LoadError

_MAPPING: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (r[w-]-p) \S+ \S+ [1-9]\d* +(/.*)")
"""A line of /proc/self/maps: a private mapping of a file that is neither shared nor run as code."""
_PROT_READ: Final = 1
_PROT_WRITE: Final = 2
_MAP_PRIVATE: Final = 2
_MAP_ANONYMOUS: Final = 0x20
_MREMAP_TO_ADDRESS: Final = 3
"""MREMAP_MAYMOVE and MREMAP_FIXED: the mapping moves to an address, over what is mapped there."""
_FAILED: Final = ctypes.c_void_p(-1).value
_HOLDING: Final = threading.Lock()


class _Mapping(NamedTuple):
    """Memory that has a file's content; `path` is absolute and has no links."""

    address: int
    size: int
    writable: bool
    path: str


def hold_files(file: Path) -> int:
    """Exchange all mappings of files beside the model `file`, and below, for memory with the same content.

    Returns the bytes of memory that this takes. The model has just been loaded by this thread, and
    nothing unmaps its files meanwhile. Raises LoadError if a file was cut off just now, or memory is short.
    """
    if sys.platform != "linux":
        return 0
    folders = {f"{folder}{os.sep}" for folder in (file.absolute().parent.resolve(), file.resolve().parent)}
    held = 0
    with _HOLDING:
        for mapping in _mappings():
            if any(mapping.path.startswith(folder) for folder in folders):
                _exchange(mapping)
                held += mapping.size
    return held


def _mappings() -> Iterator[_Mapping]:
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        found = _MAPPING.fullmatch(line)
        if found is not None:
            start, end = int(found[1], 16), int(found[2], 16)
            yield _Mapping(start, end - start, found[3][1] == "w", found[4])


def _exchange(mapping: _Mapping) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
    ]  # fmt: skip
    libc.mremap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
    ]  # fmt: skip
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    size = mapping.size
    copy = libc.mmap(None, size, _PROT_READ | _PROT_WRITE, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
    if copy == _FAILED:
        raise LoadError(f"{Path(mapping.path).name} cannot be held in memory: {_reason()}")
    moved = False
    try:
        _read(mapping, memoryview((ctypes.c_char * size).from_address(copy)).cast("B"))
        if not mapping.writable and libc.mprotect(copy, size, _PROT_READ):
            raise LoadError(f"{Path(mapping.path).name} cannot be held in memory: {_reason()}")
        moved = libc.mremap(copy, size, size, _MREMAP_TO_ADDRESS, mapping.address) != _FAILED
        if not moved:
            raise LoadError(f"{Path(mapping.path).name} cannot be held in memory: {_reason()}")
    finally:
        if not moved:
            libc.munmap(copy, size)


def _read(mapping: _Mapping, target: memoryview) -> None:
    """Copy a mapping's content; a file that was cut off raises LoadError here, and not SIGBUS."""
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        done = 0
        while done < mapping.size:
            done += os.preadv(memory, [target[done:]], mapping.address + done) or mapping.size + 1
    except OSError:
        done = mapping.size + 1
    finally:
        os.close(memory)
    if done > mapping.size:
        raise LoadError(f"{Path(mapping.path).name} was cut off while it was loaded; copy the whole file")


def _reason() -> str:
    return os.strerror(ctypes.get_errno())
