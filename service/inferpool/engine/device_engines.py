"""Which engines a server has, and their names.

Each device has one engine, or several. An engine of a device is called by its device (`cpu`, `cuda:0`), and
the second one `cuda:0-2`. A version that crashes its engine again and again gets one of its own, which is
called by the version (`model/3`), and by its former engine, too (`model/3 on cuda:1`), unless that is the
server's first engine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from inferpool.engine.restart_policy import Version


class DeviceEngine(NamedTuple):
    """An engine that has all versions with instances on a device.

    Attributes:
        name: the name in metrics, logs and `/models`.
        device: the device, as `cpu` or `cuda:0`.
        number: 1 for the first engine of the device.
    """

    name: str
    device: str
    number: int


def is_device(name: str) -> bool:
    """Whether `name` is the CPU or a GPU: what an engine tells may be wrong, because models run there."""
    return name == "cpu" or re.fullmatch(r"cuda:\d{1,3}", name) is not None


def device_engines(devices: Sequence[str], per_device: int) -> list[DeviceEngine]:
    """The engines of `devices`, first the first one of each device."""
    return [
        DeviceEngine(device if number == 1 else f"{device}-{number}", device, number)
        for number in range(1, per_device + 1)
        for device in devices
    ]


def own_engine(version: Version, parent: str, *, first: bool) -> str:
    """The name of the engine that takes `version` from the engine `parent`, the `first` one or not."""
    name = f"{version[0]}/{version[1]}"
    return name if first else f"{name} on {parent}"
