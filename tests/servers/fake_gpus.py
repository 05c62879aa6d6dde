"""The command with a fake driver of two GPUs and a fake NVML."""

from __future__ import annotations

import sys

from tests.servers import run


def patch() -> None:
    """Replace the driver and NVML before a module imports one of them."""
    from inferpool.system import gpus

    from tests.fake_gpu import FakeDriver, nvml

    driver = FakeDriver()
    gpus.cuda_driver = lambda: driver  # type: ignore[assignment]
    sys.modules["pynvml"] = nvml


if __name__ == "__main__":
    run("fake_gpus")
