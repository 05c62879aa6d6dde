"""Starts a server as a platform does: with variables, and without the path of the models."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from tests.server import CHAOS, PATCHES, ROOT, Server, free_port


class PlatformServer(Server):
    """`inferpool serve`, with nothing but what the platform gives."""

    def __init__(self, environ: Mapping[str, str], *flags: str, cache_dir: Path) -> None:
        """Run the server with these variables; `PORT` is a free port unless they have one."""
        own = {
            "INFERPOOL_LOG_FORMAT": "json",
            "INFERPOOL_CACHE_DIR": str(cache_dir),
            "INFERPOOL_MEASURE_MS": "0",
            "PYTHONPATH": f"{ROOT}:{CHAOS}:{PATCHES}",
            "PORT": str(free_port()),
        }
        self._start([sys.executable, "-m", "inferpool", "serve", *flags], {**own, **environ})
