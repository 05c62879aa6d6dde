"""The metrics of GPUs, from a fake NVML and from the real one without a driver."""

from __future__ import annotations

import pytest
from inferpool.observe.gpu_metrics import GpuReadings, gpu_readings
from inferpool.system.gpus import Gpu, cuda_driver

from tests.fake_gpu import nvml

has_driver = cuda_driver().unavailable_reason() is None
without_driver = pytest.mark.skipif(has_driver, reason="this machine has an NVIDIA driver")


def test_what_a_mig_device_does_not_tell_is_absent() -> None:
    """Memory is its own; the rest is the whole card's. Of what NVML does not know there is nothing."""
    gpus = [Gpu(0, "a slice", "uuid-2", 1), Gpu(1, "unknown", "uuid-9", 1)]
    told = {(name, labels) for name, labels, _ in GpuReadings(nvml, gpus)()}
    assert told == {("gpu_memory_used_bytes", ("cuda:0",)), ("gpu_memory_total_bytes", ("cuda:0",))}


@without_driver
def test_without_a_driver_there_are_no_readings_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """The real NVML, which does not find its library."""
    assert gpu_readings([Gpu(0, "none", "uuid-0", 1)]) is None
    assert "GPU metrics are off: NVML did not start: NVML Shared Library Not Found" in caplog.text
