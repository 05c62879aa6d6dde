"""The CPU cores that this process may use, and the memory that it keeps.

The cores follow from the affinity mask and the cgroup quota, not from the host.
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
"""The largest M_MMAP_THRESHOLD that glibc allows."""
_KEPT_BYTES = 128 * 2**20


def keep_freed_memory(most_bytes: int = _KEPT_BYTES) -> bool:
    """Make glibc keep up to `most_bytes` of freed memory for the next request.

    By default glibc maps every block of 128 KiB or more from the kernel and returns it when it is freed. Each
    body or batch of that size then costs page faults, which for a request of 600 KB take longer than
    everything else. Source: mallopt(3).

    Returns False, and changes nothing, if a `MALLOC_*` variable is set or the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES) and mallopt(_M_TRIM_THRESHOLD, most_bytes))


def usable_cores(root: Path = _ROOT) -> int:
    """The number of cores that may run at once, at least 1: the affinity mask, limited by the CPU quota.

    A fraction of the quota is rounded up. `root` contains `proc` and `sys`. Sources: the kernel's documents
    cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (cpu.cfs_quota_us, version 1).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def cpu_quota(root: Path = _ROOT) -> float | None:
    """The tightest CPU quota in cores from this process's cgroup up to the root; None without a quota."""
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
        # Without a cgroup namespace the path is the host's and may not exist here; then the top of the mount
        # is the cgroup of this process.
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
