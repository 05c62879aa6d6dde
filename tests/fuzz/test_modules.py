"""A short run of the fuzzer over the installed modules; `scripts/fuzz` runs it with sanitizers."""

from __future__ import annotations

import importlib
import os
import random
from types import ModuleType

import pytest

from tests.fuzz import json_cases, socket_cases
from tests.fuzz.__main__ import NAMES
from tests.fuzz.leaks import check_leaks


def installed(name: str) -> ModuleType:
    """The module in C; skips the test if the project was installed without a C compiler, fails it in CI."""
    if "CI" in os.environ:
        return importlib.import_module(name)
    module: ModuleType = pytest.importorskip(name, reason="the project was installed without a C compiler")
    return module


@pytest.fixture
def numbers() -> ModuleType:
    importlib.import_module("inferpool.wire.json_numbers")  # prepares the module
    return installed(NAMES[0])


@pytest.fixture
def sockets() -> ModuleType:
    return installed(NAMES[1])


def test_random_bodies_are_read_as_orjson_reads_them(numbers: ModuleType) -> None:
    chance = random.Random(1)
    taken = 0
    for _ in range(2000):
        taken += json_cases.check_json(numbers, chance)
        json_cases.check_count(numbers, chance)
        json_cases.check_odd_arguments(numbers, chance)
    assert taken > 500, "most random bodies are refused, so the comparison means little"


def test_random_sockets_get_every_byte_once_and_in_order(sockets: ModuleType) -> None:
    chance = random.Random(2)
    for _ in range(20):
        socket_cases.check_receive(sockets, chance)
        socket_cases.check_send(sockets, chance)
        socket_cases.check_odd_arguments(sockets, chance)


def test_calls_leave_no_memory_and_no_references_behind(numbers: ModuleType, sockets: ModuleType) -> None:
    check_leaks(numbers, sockets, repeats=5)
