"""Models that are built for a test, as a user builds them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.docs.pages import PAGES
from tests.server import Server


def build(repository: Path, *arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `inferpool build` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "inferpool", "build", "--repository", str(repository), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def documented_request(model: str, server: Server, folder: Path) -> Any:
    """Return the answer to the request that the documents show for `model`, sent from `folder`."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    (line,) = re.findall(rf"^(curl .*localhost:8000/predict/{model}\b.*)$", text, re.MULTILINE)
    command = shlex.split(line.replace("localhost:8000", f"127.0.0.1:{server.port}"))
    run = subprocess.run([*command, "-sS"], cwd=folder, capture_output=True, check=True)
    return json.loads(run.stdout)


def assert_batched(server: Server, model: str) -> None:
    """Reading the graph has proven that rows are independent, so that requests share runs."""
    batching = server.get(f"/models/{model}/1").json()["batching"]
    assert batching["enabled"], batching["reason"]
    assert batching["evidence"] == "graph", batching["reason"]
