"""Decoding a picture takes no more memory than was asked for before."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.conftest import ROOT
from tests.record import needs_to_run

SLACK_BYTES = 4 * 2**20
"""Buffers of a fixed size, and what the allocator keeps."""


def test_decoding_takes_no_more_memory_than_it_asks_for() -> None:
    needs_to_run("memory-of-pictures")
    # glibc then returns large blocks at once, so that every picture begins with the same memory.
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.codecs.picture_memory"],
        cwd=ROOT, env=environ, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == 60
    for line in found:
        assert line["peak"] <= line["taken"] + SLACK_BYTES, line
        assert line["taken"] < 4 * line["peak"] + SLACK_BYTES, (
            f"{line}: far more was asked for than was taken"
        )
