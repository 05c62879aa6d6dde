"""Starts a real server with a fake driver of two GPUs and a fake NVML."""

from __future__ import annotations

import sys
from unittest.mock import patch

from inferpool.cli import main

from tests.fake_gpu import FakeDriver, nvml

if __name__ == "__main__":
    sys.modules["pynvml"] = nvml
    driver = FakeDriver()
    with (
        patch("inferpool.repository.load.loader.cuda_driver", lambda: driver),
        patch("inferpool.server.cuda_driver", lambda: driver),
    ):
        sys.exit(main())
