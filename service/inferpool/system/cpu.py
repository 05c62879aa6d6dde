"""The CPU cores that this process may use.

They follow from the affinity mask and the cgroup quota, not from the host.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from inferpool.system.cgroups import ROOT, own_cgroups


def usable_cores(root: Path = ROOT) -> int:
    """The number of cores that may run at once, at least 1: the affinity mask, limited by the CPU quota.

    A fraction of the quota is rounded up. `root` contains `proc` and `sys`. Sources: the kernel's documents
    cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (cpu.cfs_quota_us, version 1).
    """
    cores = affinity_cores()
    quota = cpu_quota(root)
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def affinity_cores() -> int:
    """The number of cores of the affinity mask."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path = ROOT) -> float | None:
    """The tightest CPU quota in cores from this process's cgroup up to the root; None without a quota."""
    quotas = (
        _quota_v2(folder) if version == 2 else _quota_v1(folder)
        for version, folder in own_cgroups("cpu", root)
    )
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
