"""Processes that exist and do nothing are found; those that have an excuse are not."""

from __future__ import annotations

import os
import signal

import pytest
from inferpool.engine.liveness import START_S, Liveness

from tests.conftest import MakeChaos, Serve
from tests.engine.processes import ENGINE, WEB, find
from tests.server import Server, wait_until

A, B = 11, 22
TIMEOUT_S = 5.0


@pytest.fixture
def liveness() -> Liveness:
    return Liveness(TIMEOUT_S, 2.0)


def test_a_process_that_stops_to_beat_is_found_after_the_timeout(liveness: Liveness) -> None:
    found = {now: liveness.look(now, {A: min(now, 3.0), B: now}) for now in map(float, range(1, 12))}
    assert [now for now, silent in found.items() if silent] == [9.0, 10.0, 11.0]
    assert found[9.0] == {A: 6.0}


def test_a_process_may_take_longer_until_its_first_beat(liveness: Liveness) -> None:
    assert not any(liveness.look(float(now), {A: 0.0}) for now in range(int(START_S) + 1))
    assert liveness.look(START_S + 2, {A: 0.0}) != {}


def test_nobody_is_silent_while_the_whole_server_is_frozen(liveness: Liveness) -> None:
    liveness.look(1.0, {A: 1.0})
    assert liveness.look(1000.0, {A: 1.0}) == {}
    assert liveness.look(1001.0, {A: 1001.0}) == {}


def test_a_process_that_was_left_out_begins_anew(liveness: Liveness) -> None:
    for now in range(1, 6):
        liveness.look(float(now), {A: 1.0})
    liveness.look(6.0, {})
    assert not any(liveness.look(float(now), {A: 1.0}) for now in range(7, 13))
    assert liveness.look(13.0, {A: 1.0}) == {A: 6.0}


def test_without_a_timeout_nothing_is_found() -> None:
    liveness = Liveness(0.0, 2.0)
    assert not any(liveness.look(float(now), {A: 1.0}) for now in range(1000))


@pytest.fixture(scope="module")
def server(module_serve: Serve, module_make_chaos: MakeChaos) -> Server:
    flags = ("--engine", "process", "--web-processes", "1", "--silence-timeout-s", "3")
    return module_serve(module_make_chaos("m"), *flags)


@pytest.mark.parametrize("module", [ENGINE, WEB])
def test_a_process_that_is_stopped_is_ended_and_replaced(server: Server, module: str) -> None:
    before = find(server, module)
    os.kill(before[0], signal.SIGSTOP)
    wait_until(lambda: before[0] not in find(server, module), "the stopped process is ended")
    wait_until(lambda: len(find(server, module)) == len(before), "another process has its place")
    server.wait_for(rf"process {before[0]}\) has shown no sign of life for [\d.]+ s, and is ended")
    answer = server.post("/predict/m", json={"inputs": [[1, 2, 3, 4]]})
    assert answer.json()["outputs"] == {"sum": [31.0]}
