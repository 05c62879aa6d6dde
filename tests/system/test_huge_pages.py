"""Memory that was mapped is copied into huge pages, if it is all there and the kernel has some."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from inferpool.system import huge_pages
from inferpool.system.huge_pages import (
    Extent,
    anonymous_mappings,
    collapse_since,
    free_pages,
    new_parts,
)

from tests.huge_pages import missing

PROGRAM = """
import mmap, re
from pathlib import Path
from inferpool.system.huge_pages import anonymous_mappings, collapse_since

def rollup(field):
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(rf"^{field}: +(\\d+)", text, re.MULTILINE)[1]) * 1024

def take(size):
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

MIB = 2**20
old = take(32 * MIB)
old.write(b"o" * len(old))
before = anonymous_mappings()
whole = take(32 * MIB)
whole.write(b"w" * len(whole))
sparse = take(64 * MIB)
for offset in range(0, len(sparse), 2 * MIB):
    sparse[offset] = 1
huge, held = rollup("AnonHugePages"), rollup("Rss")
done = collapse_since(before)
assert rollup("AnonHugePages") - huge == done, "nothing else was copied"
assert rollup("Rss") < held + 4 * MIB, "pages that were not in memory are not there now"
assert whole[:] == b"w" * len(whole)
print(done // MIB)
"""


def test_what_was_mapped_is_copied_into_huge_pages() -> None:
    done = int(subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True).stdout)
    if done < 24 and (reason := missing()):
        pytest.skip(reason)
    assert 24 <= done <= 34, "huge pages at the ends may be in old mappings in part"


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ([(0, 10)], []),
        ([(0, 12), (30, 40)], [(10, 12), (30, 40)]),
        ([(5, 35)], [(10, 20)]),
        ([(15, 18), (25, 26), (50, 60)], [(15, 18), (50, 60)]),
    ],
)
def test_the_new_parts_of_mappings_are_told(
    now: list[tuple[int, int]], expected: list[tuple[int, int]]
) -> None:
    before = [Extent(0, 10), Extent(20, 30), Extent(30, 30), Extent(30, 35)]
    if (30, 40) in now:
        before.pop()
    assert list(new_parts([Extent(*each) for each in now], before)) == expected


def make_machine(root: Path, mode: str | None, free: str) -> Path:
    """A `root` with the kernel's files about huge pages of 2 MiB; `mode` None leaves its file out."""
    folder = root / "sys/kernel/mm/transparent_hugepage"
    folder.mkdir(parents=True)
    (folder / "hpage_pmd_size").write_text("2097152\n")
    if mode is not None:
        (folder / "enabled").write_text(mode)
    (root / "proc").mkdir()
    (root / "proc/buddyinfo").write_text(free)
    return root


MANY = "Node 0, zone   Normal  9 9 9 9 9 9 9 9 9 7 30\n"
FEW = "Node 0, zone   Normal  9999 9999 9999 9999 9999 9999 9999 9999 9999 7 5\n"
OTHER = "Node 1, zone   Normal  9999 9999 9999 9999 9999 9999 9999 9999 9999 0 0\n"
ADVISED = "always [madvise] never"


@pytest.mark.parametrize(
    ("free", "expected"), [(MANY, 67), (FEW, 17), (MANY + MANY, 134), (MANY + OTHER, 0), ("", 0)]
)
def test_free_huge_pages_are_counted_on_the_poorest_node(tmp_path: Path, free: str, expected: int) -> None:
    assert free_pages(2**21, make_machine(tmp_path, ADVISED, free)) == expected


@pytest.mark.parametrize("refuses_all", [True, False])
def test_a_kernel_that_refuses_is_asked_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses_all: bool
) -> None:
    """It refuses pages that are in use at the moment, and may take the next ones."""
    asked: list[Extent] = []

    def collapse(extent: Extent) -> bool:
        asked.append(extent)
        return len(asked) > 1 and not refuses_all

    mappings = iter([Extent(0, 2**30)])
    monkeypatch.setattr(huge_pages, "_resident", lambda mapped, size: mappings)
    monkeypatch.setattr(huge_pages, "_collapse", collapse)
    collapsed = collapse_since([], make_machine(tmp_path, ADVISED, MANY))
    assert (collapsed, len(asked)) == ((0, 5) if refuses_all else (2**30 - 2**24, 64))


@pytest.mark.parametrize(("mode", "free"), [("always madvise [never]", MANY), (None, MANY), (ADVISED, FEW)])
def test_without_free_huge_pages_nothing_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None, free: str
) -> None:
    """To make free ones, the kernel moves pages that threads which serve may need."""
    monkeypatch.setattr(huge_pages, "_resident", lambda mapped, size: [Extent(0, 1000 * size)])
    monkeypatch.setattr(huge_pages, "_collapse", lambda extent: pytest.fail("the kernel was asked"))
    assert anonymous_mappings()
    assert collapse_since([], make_machine(tmp_path, mode, free)) == 0
