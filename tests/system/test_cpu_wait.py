"""A thread knows for how long it waited for a core."""

from __future__ import annotations

from pathlib import Path

import pytest
from inferpool.system.cpu_wait import CpuWait, waited_share


def write(root: Path, ran: int, waited: int, stolen: int) -> None:
    """What the kernel says, with a thousand ticks of all cores for each call."""
    folder = root / "proc" / "thread-self"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "schedstat").write_text(f"{ran} {waited} 7\n")
    (root / "proc" / "stat").write_text(f"cpu  {1000 - stolen} 0 0 0 0 0 0 {stolen} 0 0\ncpu0 1\n")


@pytest.mark.parametrize(
    ("ran", "waited", "share"), [(100, 0, 0.0), (300, 100, 0.25), (0, 100, 1.0), (0, 0, 0.0)]
)
def test_the_share_is_that_of_the_time_since_the_beginning(
    tmp_path: Path, ran: int, waited: int, share: float
) -> None:
    write(tmp_path, 5000, 7000, 0)
    wait = CpuWait(tmp_path)
    write(tmp_path, 5000 + ran, 7000 + waited, 0)
    assert wait.share() == share


def test_what_the_host_takes_away_counts(tmp_path: Path) -> None:
    write(tmp_path, 0, 0, 0)
    (tmp_path / "proc" / "stat").write_text("cpu  0 0 0 0 0 0 0 0 0 0\n")
    wait = CpuWait(tmp_path)
    write(tmp_path, 100, 10, 400)
    assert wait.share() == 0.4


def test_a_system_that_tells_nothing_counts_as_quiet(tmp_path: Path) -> None:
    assert CpuWait(tmp_path).share() == 0.0


def test_this_machine_gives_a_share() -> None:
    assert 0.0 <= waited_share() <= 1.0
