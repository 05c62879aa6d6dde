"""The start of the server, before it answers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.server import COVERAGE_VARIABLES


def test_an_address_in_use_is_reported_before_anything_about_the_models(models: Path) -> None:
    """Four of the bundled models are not built yet, which is no news to a user whose server cannot start."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "inferpool", "serve", str(models), "--port", str(port)]
        run = subprocess.run(
            [*command, "--host", "127.0.0.1", "--log-level", "info"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert run.returncode != 0
    assert (
        f"cannot listen on 127.0.0.1:{port}: Address already in use; --host and --port choose" in run.stderr
    )
    assert "skipped" not in run.stderr


def test_a_start_imports_nothing_that_only_some_servers_need() -> None:
    code = """
import sys
import inferpool.__main__
from inferpool import cli
cli._parser(whole=False)
import inferpool.launch, inferpool.app
print(*sys.modules)
"""
    # A measurement of coverage would import some of them itself.
    environ = {name: value for name, value in os.environ.items() if name not in COVERAGE_VARIABLES}
    imported = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ
    )
    modules = set(imported.stdout.split())
    assert "inferpool.http.connection.protocol" in modules
    unneeded = {
        # The command line of uvicorn.
        *("click", "multiprocessing", "uvicorn.main", "watchfiles"),
        # Those of other commands, of routes that are no predictions, of pictures, and of samples.
        *("inferpool.other_commands", "fastapi", "starlette", "prometheus_client", "PIL", "sqlite3"),
        # Those of measurements, of models of PyTorch, and of explanations.
        *("numpy.random", "torch", "inferpool.backends.row_analysis", "inferpool.http.explain"),
    }
    assert not modules & unneeded


def test_a_lookup_of_backends_parses_no_packages_if_none_adds_one() -> None:
    code = """
import importlib.metadata
def parse(**options):
    raise AssertionError("every package is parsed")
importlib.metadata.entry_points = parse
from inferpool.backends.registry import backends_by_suffix
print(*backends_by_suffix())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == [".onnx", ".pt", ".pt2"]


def test_a_backend_of_another_package_is_found(tmp_path: Path) -> None:
    package = tmp_path / "added-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: added\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[inferpool.backends]\nadded = added_backend:Added\n")
    (tmp_path / "added_backend.py").write_text("class Added:\n    suffixes = ('.added',)\n")
    code = "from inferpool.backends.registry import backends_by_suffix; print(*backends_by_suffix())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert ".added" in found.stdout.split()
