"""The memory that this process may take, and the memory that it has.

The limit is that of the cgroup, or the memory of the machine. The kernel ends a process that exceeds its
cgroup's limit, without a word and with every request in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from inferpool.system.cgroups import ROOT, own_cgroups

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_LARGEST_KEPT_BYTES: Final = 32 * 2**20
"""The largest M_MMAP_THRESHOLD that glibc allows."""
_KEPT_BYTES: Final = 128 * 2**20
_MAPPED_ALONE_BYTES: Final = 8 * 2**20
"""Blocks from this size on are mapped one by one while a model loads; a smaller size makes loads slower."""
_MAPPED_BESIDE_BYTES: Final = 1 * 2**20
"""The same while a model loads beside others."""
_UNLIMITED: Final = 2**60
"""Version 1 writes about 2**63 if there is no limit."""
_KIB: Final = 1024
_STACK_BYTES: Final = 8 * 2**20
"""Address space of a thread's stack if there is no limit on stacks."""
LEAST_MARGIN_BYTES: Final = 32 * 2**20
"""Memory that requests never get, for what nobody counts: stacks, the interpreter, the kernel's buffers."""
COPIES: Final = 2
"""Bytes of memory for each byte that a request reserves: a batch is a copy of its requests' tensors, and the
outputs of a run exist before they are counted."""
COPIES_APART: Final = 3
"""The same if engines are processes of their own: bodies are received into memory that they share, too."""
LEAST_IN_FLIGHT_BYTES: Final = 1 * 2**20
"""Bytes that requests may hold even if the models leave no memory; small requests are still answered."""
MOST_IN_FLIGHT_BYTES: Final = 4096 * 2**20
"""Bytes that requests may hold at most unless a setting says more; they are seconds of work for any model."""


class MemoryUse(NamedTuple):
    """The memory that this process takes.

    Attributes:
        held: bytes of memory that the kernel cannot take back: not those of files.
        data: bytes of its private writable address space, touched or not; RLIMIT_DATA bounds them.
    """

    held: int
    data: int


class MemoryLimit(NamedTuple):
    """How much memory there is for this process and all others in its cgroup.

    Attributes:
        limit: bytes in total.
        cgroup: the folder of the cgroup whose limit this is; None if it is the memory of the machine.
        version: of the cgroup's hierarchy, 1 or 2.
    """

    limit: int
    cgroup: Path | None = None
    version: int = 2

    def held(self, root: Path = ROOT) -> int:
        """Bytes of the limit that are taken and that the kernel cannot take back.

        Those are this process's, or those of all processes in the cgroup, whichever are more.
        """
        own = memory_use(root).held
        if self.cgroup is None:
            return own
        names = ("memory.current", "file", "shmem")
        if self.version == 1:
            names = ("memory.usage_in_bytes", "total_cache", "total_shmem")
        used, cached, shared = names
        try:
            stat = dict(line.split() for line in (self.cgroup / "memory.stat").read_text().splitlines())
            taken = int((self.cgroup / used).read_text()) - int(stat[cached]) + int(stat.get(shared, 0))
        except (OSError, ValueError, KeyError):
            return own
        return max(own, taken)


def memory_limit(root: Path = ROOT) -> MemoryLimit:
    """The tightest memory limit from this process's cgroup up to the root, or the memory of the machine.

    `root` contains `proc` and `sys`. Sources: the kernel's documents cgroup-v2.rst (memory.max, memory.high)
    and cgroup-v1/memory.rst (memory.limit_in_bytes).
    """
    machine = _bytes_of(_read(root / "proc/meminfo"), b"MemTotal") or _UNLIMITED
    tightest = MemoryLimit(machine)
    for version, folder in own_cgroups("memory", root):
        for name in ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",):
            try:
                limit = int((folder / name).read_text())
            except (OSError, ValueError):  # there is no such file, or it says "max"
                continue
            if limit < tightest.limit:
                tightest = MemoryLimit(limit, folder, version)
    return tightest


def chosen_limit(memory_bytes: int) -> MemoryLimit:
    """A limit of `memory_bytes`; 0 takes the cgroup's or the machine's."""
    return MemoryLimit(memory_bytes) if memory_bytes else memory_limit()


def in_flight_bytes(limit: int, held: int, copies: int = COPIES) -> int:
    """Bytes that requests may hold together in a process that holds `held` of `limit` bytes without them."""
    room = limit - held - max(LEAST_MARGIN_BYTES, limit // 10)
    return max(LEAST_IN_FLIGHT_BYTES, min(MOST_IN_FLIGHT_BYTES, room // copies))


def memory_use(root: Path = ROOT) -> MemoryUse:
    """Return the memory that this process takes now; zeros if the kernel does not say."""
    status = _read(root / "proc/self/status")
    anonymous = _bytes_of(status, b"RssAnon")
    held = anonymous + _bytes_of(status, b"RssShmem") if anonymous else _bytes_of(status, b"VmRSS")
    return MemoryUse(held, _bytes_of(status, b"VmData"))


def family_held(parent: int, root: Path = ROOT) -> int:
    """Bytes that `parent` and its children hold, without memory that they share; 0 if unknown."""
    children = _read(root / f"proc/{parent}/task/{parent}/children").decode().split()
    return sum(_bytes_of(_read(root / f"proc/{pid}/status"), b"RssAnon") for pid in (parent, *children))


def keep_freed_memory(most_bytes: int = _KEPT_BYTES) -> bool:
    """Make glibc keep up to `most_bytes` of freed memory for the next request, or less if there is little.

    By default glibc maps every block of 128 KiB or more from the kernel and returns it when it is freed. Each
    body or batch of that size then costs page faults, which for a request of 600 KB take longer than
    everything else. Source: mallopt(3).

    All threads share one heap. Of the heaps that glibc gives to threads it never returns the last free block
    before that block has grown to the bytes that are kept, whatever `release_freed_memory` asks for. So call
    this before the first thread starts.

    What is kept is no other block's. So at most a 32nd of the memory limit is kept at the end of each heap,
    and blocks of a 64th are returned.

    Returns False, and changes nothing, if a `MALLOC_*` variable is set or the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    limit = memory_limit().limit
    block = min(_LARGEST_KEPT_BYTES, limit // 64)
    kept = bool(
        mallopt(_M_ARENA_MAX, 1)
        and mallopt(_M_MMAP_THRESHOLD, block)
        and mallopt(_M_TRIM_THRESHOLD, min(most_bytes, limit // 32))
    )
    if kept:
        _mapping.use(block)
    return kept


class _Mapping:
    """The sizes from which the callers within `large_blocks_mapped` want blocks to be mapped.

    Attributes:
        usual_bytes: the size outside; 0 before `keep_freed_memory`.
    """

    def __init__(self) -> None:
        self.usual_bytes = 0
        self._lock = threading.Lock()
        self._wanted: list[int] = []

    def use(self, usual_bytes: int) -> None:
        """Let blocks of `usual_bytes` be mapped if no caller wants smaller ones: a load may call this."""
        with self._lock:
            self.usual_bytes = usual_bytes
            self._apply()

    def enter(self, size: int) -> None:
        """Let blocks of `size` bytes or more be mapped, and smaller ones if another caller wants that."""
        with self._lock:
            self._wanted.append(size)
            self._apply()

    def leave(self, size: int) -> None:
        """Take back what `enter` did."""
        with self._lock:
            self._wanted.remove(size)
            self._apply()

    def _apply(self) -> None:
        if self.usual_bytes:
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, min([self.usual_bytes, *self._wanted]))


_mapping: Final = _Mapping()


@contextlib.contextmanager
def large_blocks_mapped(*, beside: bool) -> Iterator[None]:
    """Within the block, let large allocations be mappings, each of which goes back when it is freed.

    For the load of a model. Otherwise the heap keeps the room that its largest weights took for a moment:
    blocks of 8 MiB or more are mapped. If it loads `beside` others, blocks of 1 MiB are. Otherwise its
    weights would leave hundreds of megabytes of free blocks in the heap. `release_freed_memory` holds the
    heap's lock while it gives them back: threads that serve would wait 10 to 20 ms for an allocation. Such a
    load takes longer, because the pages of each mapping are new. Without `keep_freed_memory`, nothing
    changes.
    """
    size = _MAPPED_BESIDE_BYTES if beside else _MAPPED_ALONE_BYTES
    _mapping.enter(size)
    try:
        yield
    finally:
        _mapping.leave(size)


def release_freed_memory() -> bool:
    """Give freed memory back to the kernel; False if there was none or the C library is not glibc.

    The interpreter's lock is released meanwhile. The heap's lock is not: see `large_blocks_mapped`.
    Source: malloc_trim(3).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))


def limit_data(most_bytes: int | None) -> bool:
    """Make allocations fail that would give this process more than `most_bytes` of data; None allows all.

    The bound is on private writable memory (RLIMIT_DATA), not on the address space (RLIMIT_AS). CUDA, PyTorch
    and glibc reserve addresses by the gigabyte that they never write to. Only the soft limit is set, so it
    may be raised again. Returns False if the system refuses. Source: setrlimit(2).
    """
    try:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = resource.RLIM_INFINITY if most_bytes is None else most_bytes
        if hard != resource.RLIM_INFINITY:
            wanted = hard if wanted == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
    except (OSError, ValueError):
        return False
    return True


def stack_bytes() -> int:
    """Address space that the C library maps for the stack of a thread."""
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return _STACK_BYTES if soft == resource.RLIM_INFINITY else soft


def _read(file: Path) -> bytes:
    """The first 64 KiB of a file in `proc`; nothing if it cannot be read.

    An idle process reads some of them every second, and a file object would cost it more than reading.
    """
    try:
        opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(opened, 2**16)
    except OSError:  # the process has ended
        return b""
    finally:
        os.close(opened)


def _bytes_of(status: bytes, field: bytes) -> int:
    """The bytes of the line `field: N kB`; 0 if there is none."""
    _, found, rest = (b"\n" + status).partition(b"\n" + field + b":")
    words = rest[:40].split(maxsplit=1)
    return int(words[0]) * _KIB if found and words and words[0].isdigit() else 0
