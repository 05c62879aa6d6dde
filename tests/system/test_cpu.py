"""The cores that a process may use, by the quota of its cgroup."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from inferpool.system.cpu import cpu_quota, usable_cores


def make_root(folder: Path, cgroup: str, **files: str) -> Path:
    """A root with this `/proc/self/cgroup` and these files of cgroups, whose paths have `__` for `/`."""
    (folder / "proc" / "self").mkdir(parents=True)
    (folder / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        file = folder / "sys/fs/cgroup" / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_the_tightest_quota_up_to_the_root_counts(tmp_path: Path) -> None:
    root = make_root(
        tmp_path,
        "0::/a/b\n",
        a__b__cpu_dot_max="max 100000\n",
        a__cpu_dot_max="150000 100000\n",
        cpu_dot_max="400000 100000\n",
    )
    assert cpu_quota(root) == 1.5
    assert usable_cores(root) == min(2, len(os.sched_getaffinity(0)))


def test_a_path_of_the_host_that_does_not_exist_here_leaves_the_top(tmp_path: Path) -> None:
    root = make_root(tmp_path, "0::/kubepods/pod1\n", cpu_dot_max="50000 100000\n")
    assert cpu_quota(root) == 0.5
    assert usable_cores(root) == 1


@pytest.mark.parametrize(("quota", "expected"), [("250000\n", 2.5), ("-1\n", None)])
def test_cgroups_of_version_1_have_a_quota_too(tmp_path: Path, quota: str, expected: float | None) -> None:
    root = make_root(
        tmp_path,
        "4:memory:/x\n3:cpu,cpuacct:/x\n",
        cpu__x__cpu_dot_cfs_quota_us=quota,
        cpu__x__cpu_dot_cfs_period_us="100000\n",
    )
    assert cpu_quota(root) == expected


def test_without_cgroups_the_affinity_counts(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))
