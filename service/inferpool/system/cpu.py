"""What this process has of the machine: the cores that it may really use, and the memory that it keeps.

Cores are those of its affinity and its cgroup's quota, not the host's.
"""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path

_ROOT = Path("/")
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_KEPT_BYTES = 32 * 2**20
"""The most that glibc allows as M_MMAP_THRESHOLD."""
_KEPT_BYTES = 128 * 2**20


def keep_freed_memory() -> bool:
    """Keep what is freed for the next request; False where the C library is not glibc.

    Of its own accord glibc maps a body or a batch of 128 KiB or more from the kernel and gives it back when
    it is freed, so that every one of them is paid for page by page: for a request of 600 KB that is more than
    all else it costs. With this at most 128 MiB that are free stay with the process. Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))


def usable_cores(root: Path = _ROOT) -> int:
    """Cores that may run at once, at least 1: the affinity mask, cut down to the CPU quota rounded up.

    `root` is where `proc` and `sys` are. Sources: cpu.max in the kernel's cgroup-v2.rst, and
    cpu.cfs_quota_us in its scheduler/sched-bwc.rst for version 1.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def cpu_quota(root: Path = _ROOT) -> float | None:
    """The tightest CPU quota on the way from this process's cgroup to the top, in cores; None without one."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            mount, read = root / "sys/fs/cgroup", _quota_v2
        elif "cpu" in controllers.split(","):
            mount, read = root / "sys/fs/cgroup/cpu", _quota_v1
        else:
            continue
        # Without a cgroup namespace the path is the host's and may not exist here: the mount's top is ours.
        parts = Path(path.lstrip("/"))
        quotas += [read(mount / folder) for folder in (parts, *parts.parents)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
