"""Background threads leave the CPU quota to the others, and go on all the same."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
from inferpool.system.cpu import affinity_cores
from inferpool.system.cpu_pace import NICE, CpuPace, quota_to_keep, yield_to_others


class Machine:
    """Clocks of a process; `others` is the CPU time a second of its other threads."""

    def __init__(self, quota: float | None, others: float) -> None:
        self.now = self.used = self.slept = 0.0
        self.others = others
        self.pace = CpuPace(quota, lambda: self.now, lambda: self.used, self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds
        self.used += self.others * seconds

    def work(self, seconds: float) -> None:
        """Let one background thread run for so long."""
        self.now += seconds
        self.used += (1 + self.others) * seconds

    def work_until(self, end: float) -> None:
        while self.now < end:
            self.pace.step()
            self.work(0.002)


@pytest.mark.parametrize(("quota", "others"), [(1, 0.5), (1, 0), (0.5, 0.2), (1.5, 1)])
def test_the_process_stays_below_its_quota(quota: float, others: float) -> None:
    machine = Machine(quota, others)
    machine.work_until(10)
    assert 0.85 * quota < machine.used / machine.now < 0.93 * quota


def test_each_period_of_the_kernel_stays_below_the_quota() -> None:
    machine, used = Machine(1, 0.6), 0.0
    for period in range(1, 100):
        machine.work_until(period / 10)
        assert machine.used - used < 0.1
        used = machine.used


def test_a_pause_may_be_shorter_than_the_debt() -> None:
    machine = Machine(1, 0)
    machine.work(0.5)
    machine.pace.step(0.005)
    assert 0.005 <= machine.slept < 0.01


def test_without_a_quota_no_thread_pauses() -> None:
    machine = Machine(None, 3)
    machine.work_until(1)
    assert not machine.slept


def test_a_thread_goes_on_even_if_the_others_use_the_whole_quota() -> None:
    machine = Machine(1, 1)
    machine.pace.step()
    for _ in range(20):
        before = machine.slept
        machine.work(0.002)
        machine.pace.step()
        assert machine.slept - before <= 0.2
    assert machine.now < 5


def test_only_a_quota_that_the_cores_could_exceed_counts(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    cores = affinity_cores()
    found = {}
    for written in ("max", str(cores * 100_000), str(cores * 50_000)):
        (tmp_path / "sys/fs/cgroup/cpu.max").write_text(f"{written} 100000\n")
        found[written] = quota_to_keep(tmp_path)
    assert list(found.values()) == [None, None, cores / 2]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_only_the_calling_thread_yields() -> None:
    found = []

    def work() -> None:
        yield_to_others()
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    before = os.getpriority(os.PRIO_PROCESS, os.getpid())
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [min(19, before + NICE)]
    assert os.getpriority(os.PRIO_PROCESS, os.getpid()) == before
