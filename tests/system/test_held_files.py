"""Files that are mapped: what has been read of them stays, whatever becomes of the files."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
from inferpool.errors import LoadError
from inferpool.system.held_files import hold_files

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mappings are held on Linux only")
PAGES = 3 * mmap.PAGESIZE


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of weights beside a model."""
    file = tmp_path / "1" / "data" / "weights.bin"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"w" * PAGES)
    return file


def private(file: Path, prot: int = mmap.PROT_READ) -> mmap.mmap:
    """A private mapping of a file, as runtimes make it."""
    with file.open("rb") as opened:
        return mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE, prot)


@pytest.mark.parametrize("prot", [mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE])
def test_what_was_mapped_stays_when_the_file_is_written_over_and_cut(weights: Path, prot: int) -> None:
    mapped = private(weights, prot)
    assert hold_files(weights.parent.parent / "model.onnx") == PAGES
    with weights.open("r+b") as opened:
        opened.write(b"x" * PAGES)
    os.truncate(weights, 0)
    assert mapped[:] == b"w" * PAGES
    if prot & mmap.PROT_WRITE:
        mapped[0] = 1
    mapped.close()
    assert hold_files(weights.parent.parent / "model.onnx") == 0


def test_files_elsewhere_are_left_alone(weights: Path, tmp_path: Path) -> None:
    mapped = private(weights)
    other = tmp_path / "12" / "model.onnx"
    other.parent.mkdir()
    assert hold_files(other) == 0
    mapped.close()


def test_a_file_that_is_cut_before_it_is_held_is_an_error(weights: Path) -> None:
    """Reading the mapping would end the process with SIGBUS."""
    mapped = private(weights)
    os.truncate(weights, 0)
    with pytest.raises(LoadError, match=r"weights\.bin was cut off"):
        hold_files(weights.parent.parent / "model.onnx")
    mapped.close()


def test_a_file_that_is_not_held_ends_the_process(weights: Path) -> None:
    """This is what holding prevents; if it passes otherwise, the tests above show nothing."""
    program = (
        "import mmap, os, sys\n"
        "mapped = mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)\n"
        "os.truncate(sys.argv[1], 0)\n"
        "mapped[0]\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(weights)], check=False)
    assert run.returncode == -7
