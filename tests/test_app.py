"""The start of the server, before it answers."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path


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
