"""Which engines a server has for its devices."""

from __future__ import annotations

import pytest
from inferpool.engine.device_engines import device_engines, is_device, own_engine


def test_each_device_has_its_engines_the_first_ones_first() -> None:
    assert device_engines(["cpu"], 1) == [("cpu", "cpu", 1)]
    assert device_engines(["cuda:0", "cuda:1"], 2) == [
        ("cuda:0", "cuda:0", 1),
        ("cuda:1", "cuda:1", 1),
        ("cuda:0-2", "cuda:0", 2),
        ("cuda:1-2", "cuda:1", 2),
    ]


def test_no_two_engines_of_one_version_have_the_same_name() -> None:
    parents = [engine.name for engine in device_engines(["cpu", "cuda:0", "cuda:1"], 3)]
    names = [own_engine(("m", 1), parent, first=parent == parents[0]) for parent in parents]
    assert names[0] == "m/1"
    assert len({*names, *parents}) == 2 * len(parents)


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:0\n", "cuda:0-2", "cuda:9999", "../cpu"])
def test_what_an_engine_calls_a_device_has_to_be_one(name: str) -> None:
    assert is_device("cpu")
    assert is_device("cuda:12")
    assert not is_device(name)
