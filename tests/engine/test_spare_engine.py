"""The spare engine: when one is started, and what happens if none can be."""

from __future__ import annotations

from inferpool.engine.child_loop import ChildLoop
from inferpool.engine.spare_engine import LATE_PAUSE_S, PAUSE_S, SpareEngine
from inferpool.engine.spawn import Child


def test_without_a_process_to_be_had_the_server_goes_on_and_tries_again_later() -> None:
    now = 0.0
    tries: list[float] = []

    def spawn() -> Child:
        tries.append(now)
        raise BlockingIOError("Resource temporarily unavailable")

    loop = ChildLoop(lambda: now)
    spare = SpareEngine(loop, spawn)
    spare.plan()
    for _ in range(2):
        now += LATE_PAUSE_S + PAUSE_S
        loop.turn([])
    assert len(tries) == 2
    assert spare.child is None
    assert spare.take() is None
