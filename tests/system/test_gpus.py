"""The choice of devices for a model, and the check of the driver's CUDA version."""

from __future__ import annotations

from pathlib import Path

import pytest
from inferpool.errors import LoadError
from inferpool.system.gpus import check_cuda, check_devices, choose_devices, gpu_support

from tests.fake_gpu import FakeDriver
from tests.server import Server


@pytest.mark.parametrize(
    ("devices", "text"),
    [
        (["gpu"], '"gpu" is no device'),
        (["cuda"], '"cuda" is no device'),
        (["cuda:01"], '"cuda:01" is no device'),
        (["cuda:0", "cpu"], "cannot be combined"),
        (["auto", "cuda:0"], "cannot be combined"),
        (["cuda:1", "cuda:1"], "twice"),
        ([], "no device is given"),
    ],
)
def test_a_list_of_devices_that_makes_no_sense_is_refused(devices: list[str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_devices(devices)


@pytest.mark.parametrize(
    ("wanted", "driver", "reason", "devices"),
    [
        (("auto",), FakeDriver(2), None, ("cuda:0", "cuda:1")),
        (("auto",), FakeDriver(0, "no driver"), None, ("cpu",)),
        (("auto",), FakeDriver(2), "it cannot", ("cpu",)),
        (("cpu",), FakeDriver(2), None, ("cpu",)),
        (("cuda:1",), FakeDriver(2), None, ("cuda:1",)),
        (("cuda:1", "cuda:0"), FakeDriver(2), None, ("cuda:1", "cuda:0")),
    ],
)
def test_auto_means_all_gpus_and_a_named_gpu_is_taken(
    wanted: tuple[str, ...], driver: FakeDriver, reason: str | None, devices: tuple[str, ...]
) -> None:
    check_devices(wanted)
    assert choose_devices(wanted, driver, lambda: reason) == devices


@pytest.mark.parametrize(
    ("driver", "reason", "text"),
    [
        (FakeDriver(2), "the runtime is for CPUs", "is configured for cuda:2, but the runtime is for CPUs"),
        (FakeDriver(0, "there is no driver"), None, "is configured for cuda:2, but there is no driver"),
        (FakeDriver(2), None, "no cuda:2: this process sees cuda:0, cuda:1; CUDA_VISIBLE_DEVICES is '4,7'"),
    ],
)
def test_a_named_gpu_that_is_missing_raises_the_reason(
    driver: FakeDriver, reason: str | None, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    with pytest.raises(LoadError) as error:
        choose_devices(("cuda:2",), driver, lambda: reason)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("driver", "text"),
    [
        (FakeDriver(0, "no driver"), "no driver"),
        (FakeDriver(1, cuda=(12, 8)), r"up to 12\.8, but it is built for CUDA 13\.0: install driver 580"),
    ],
)
def test_an_old_driver_and_a_missing_driver_have_different_reasons(driver: FakeDriver, text: str) -> None:
    with pytest.raises(LoadError, match=text):
        check_cuda(driver, "13.0", "it")
    check_cuda(FakeDriver(1, cuda=(13, 0)), "13.0", "it")
    check_cuda(FakeDriver(1, cuda=(13, 2)), "12.8", "it")


def test_a_missing_gpu_folder_is_a_load_error() -> None:
    with pytest.raises(LoadError, match="GPU support is not part of this installation"), gpu_support():
        raise ModuleNotFoundError("no module", name="inferpool.backends.onnx.gpu")


def test_any_other_missing_module_is_still_an_import_error() -> None:
    with pytest.raises(ModuleNotFoundError), gpu_support():
        raise ModuleNotFoundError("no module", name="onnx")


def test_a_setting_that_names_no_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="cannot be combined"):
        Server(tmp_path, ["--devices", "cpu,cuda:0"])
