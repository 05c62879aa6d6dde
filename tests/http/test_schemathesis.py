"""The server does what its OpenAPI document says, as schemathesis sees it with every check it has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.server import Server

SECONDS = int(os.environ.get("SCHEMATHESIS_SECONDS", "10"))
"""How long requests are generated; `scripts/test --full` sets more."""


@pytest.mark.timeout(SECONDS + 130)
def test_the_server_is_as_its_document_says(bundled: Server, tmp_path: Path) -> None:
    folder = Path(__file__).parent
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"]
    command += ["--config-file", str(folder / "schemathesis.toml"), "run", f"{bundled.url}/openapi.json"]
    command += ["--checks", "all", "--max-time", str(SECONDS), "--seed", "4", "--request-timeout", "30"]
    # Without a key, a route of the admin side says nothing of its methods: 403 comes before 405. The tests
    # connection/test_protocol.py and access/test_route_scopes.py ask with other methods.
    command += ["--exclude-checks", "unsupported_method"]
    command += ["--generation-database", "none", "--continue-on-failure", "--no-color"]
    environ = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.http.schemathesis_hooks", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False, timeout=SECONDS + 100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Tested: " in done.stdout
    assert bundled.get("/health/ready").status_code == 200
