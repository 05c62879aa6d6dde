"""The record of what the tests of CatBoost and TensorFlow last passed with.

Their packages take a gigabyte, which uv fetches. `scripts/test` skips these tests if nothing that they depend
on has changed since they passed; `scripts/test --full` skips none. To run them and renew the record:

    python -m tests.import_command.record

An outdated record makes the tests run again; it never skips them.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.models.record import FULL

ROOT: Final = Path(__file__).parents[2]
RECORD: Final = Path(__file__).with_name("record.json")
CODE: Final = (
    "service/inferpool/import_command",
    "service/inferpool/release/importers",
    "tests/import_command",
)
"""The folders whose Python files count."""


def needs_to_run() -> None:
    """Skip the calling test unless something has changed."""
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if not os.environ.get(FULL) and recorded.get("digest") == digest():
        pytest.skip("nothing has changed since this test passed; scripts/test --full runs it")


def digest(root: Path = ROOT) -> str:
    """Return a SHA-256 of the files that the tests depend on, in hexadecimal digits."""
    found = hashlib.sha256()
    for folder in CODE:
        for file in sorted((root / folder).glob("*.py")):
            found.update(f"{folder}/{file.name}\0".encode() + file.read_bytes() + b"\0")
    return found.hexdigest()


def main() -> int:
    """Run the tests, and renew the record if they pass."""
    before = digest()
    tests = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).with_name("test_large_frameworks.py"))]
    status = subprocess.run(tests, env={**os.environ, FULL: "1"}, cwd=ROOT, check=False).returncode
    if status == 0:
        RECORD.write_text(json.dumps({"digest": before}) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
