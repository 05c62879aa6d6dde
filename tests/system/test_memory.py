"""The memory limit of a process, by its cgroup, and what the process does with freed memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from inferpool.system.memory import MemoryLimit, memory_limit, memory_use

from tests.system.test_cpu import make_root

STATUS = "VmRSS:\t  900 kB\nRssAnon:\t  500 kB\nRssShmem:\t  20 kB\nVmData:\t 4000 kB\n"


def make_machine(folder: Path, cgroup: str, **files: str) -> Path:
    root = make_root(folder, cgroup, **files)
    (root / "proc/meminfo").write_text("MemTotal:       1000000 kB\nMemFree: 5 kB\n")
    (root / "proc/self/status").write_text(STATUS)
    return root


def test_the_tightest_limit_up_to_the_root_counts(tmp_path: Path) -> None:
    root = make_machine(
        tmp_path,
        "0::/a/b\n",
        a__b__memory_dot_max="max\n",
        a__memory_dot_max="300000000\n",
        a__memory_dot_current="90000000\n",
        a__memory_dot_stat="anon 40000000\nfile 30000000\nshmem 10000000\n",
        memory_dot_max="400000000\n",
    )
    limit = memory_limit(root)
    assert limit == MemoryLimit(300_000_000, root / "sys/fs/cgroup/a", 2)
    assert limit.held(root) == 70_000_000, "the kernel can take back pages of files"


def test_a_limit_that_throttles_counts(tmp_path: Path) -> None:
    root = make_machine(tmp_path, "0::/\n", memory_dot_max="max\n", memory_dot_high="200000000\n")
    assert memory_limit(root).limit == 200_000_000


def test_cgroups_of_version_1_have_a_limit_too(tmp_path: Path) -> None:
    root = make_machine(
        tmp_path,
        "4:memory:/x\n3:cpu,cpuacct:/x\n0::/\n",
        memory__x__memory_dot_limit_in_bytes="300000000\n",
        memory__x__memory_dot_usage_in_bytes="90000000\n",
        memory__x__memory_dot_stat="total_cache 30000000\ntotal_rss 40000000\ntotal_shmem 10000000\n",
        memory__memory_dot_limit_in_bytes="9223372036854771712\n",
    )
    limit = memory_limit(root)
    assert limit == MemoryLimit(300_000_000, root / "sys/fs/cgroup/memory/x", 1)
    assert limit.held(root) == 70_000_000


@pytest.mark.parametrize("text", ["max\n", "9223372036854771712\n", "nonsense\n"])
def test_without_a_limit_the_memory_of_the_machine_counts(tmp_path: Path, text: str) -> None:
    root = make_machine(tmp_path, "0::/\n", memory_dot_max=text)
    limit = memory_limit(root)
    assert limit == MemoryLimit(1_024_000_000)
    assert limit.held(root) == 520 * 1024, "what files hold the kernel can take back"
    assert memory_use(root).data == 4_096_000


def test_a_cgroup_that_does_not_say_what_is_used_leaves_what_the_process_says(tmp_path: Path) -> None:
    root = make_machine(tmp_path, "0::/\n", memory_dot_max="300000000\n")
    assert memory_limit(root).held(root) == 520 * 1024


def test_beyond_the_data_limit_an_allocation_fails_and_the_process_goes_on() -> None:
    program = """
import numpy as np
from inferpool.system.memory import limit_data, memory_use
before = memory_use()
assert limit_data(before.data + 64 * 2**20)
try:
    np.ones(128 * 2**20, np.uint8)
except MemoryError:
    print("refused")
assert limit_data(None)
np.ones(128 * 2**20, np.uint8)
print("allowed")
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["refused", "allowed"]


def test_freed_memory_goes_back_when_asked_for() -> None:
    program = """
import numpy as np
from inferpool.system.memory import keep_freed_memory, memory_use, release_freed_memory
assert keep_freed_memory()
before = memory_use().held
blocks = [np.ones(2**20, np.uint8) for _ in range(400)]
kept = blocks[::40]
del blocks
assert memory_use().held > before + 300 * 2**20, "the blocks that are kept hold what is between them"
assert release_freed_memory()
assert memory_use().held < before + 40 * 2**20
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_load_leaves_no_large_free_blocks_in_the_heap() -> None:
    """Beside other models no smaller ones either: giving memory back holds the heap's lock for a moment."""
    program = """
import ctypes
import numpy as np
from inferpool.system.memory import keep_freed_memory, large_blocks_mapped, memory_use

def take_and_free(size):
    before = memory_use().held
    blocks = [np.ones(size, np.uint8) for _ in range(2**28 // size)]
    kept = blocks[::8]
    del blocks
    return memory_use().held - before - len(kept) * size

SMALL, LARGE = 4 * 2**20, 16 * 2**20
with large_blocks_mapped(beside=True):
    pass
assert keep_freed_memory()
with large_blocks_mapped(beside=True):
    with large_blocks_mapped(beside=False):
        pass
    assert take_and_free(SMALL) < 8 * 2**20, "mappings go back when they are freed"
with large_blocks_mapped(beside=False):
    assert take_and_free(LARGE) < 8 * 2**20
    assert keep_freed_memory(), "as the load of the first PyTorch model does"
    assert take_and_free(LARGE) < 8 * 2**20
    with large_blocks_mapped(beside=True):
        assert take_and_free(SMALL) < 8 * 2**20
    assert take_and_free(SMALL) > 100 * 2**20, "the heap keeps what is freed of others"
assert take_and_free(LARGE) > 100 * 2**20, "and outside of all"
"""
    subprocess.run([sys.executable, "-c", program], check=True)
