"""What a crash of an engine leaves: entries run in its successor, in another engine, or are answered."""

from __future__ import annotations

import os

import numpy as np
import pytest
from inferpool.errors import (
    DeadlineExceeded,
    ModelCrashed,
    NotReady,
    QueueFull,
)
from inferpool.pool.ports import Entry, Part, Result
from inferpool.pool.splitting import split_entry

from tests.engine.channel_ends import KEY, Engine, Web, entry_of, floats


def test_waiting_entries_run_in_the_successor_and_running_ones_alone_one_at_a_time() -> None:
    web, first, second = Web(), Engine(), Engine()
    web.attach(first)
    for entry_id in range(1, 7):
        web.client.offer(entry_of(entry_id, {"x": floats(1, 4) + entry_id}))
    web.loop.turn()
    first.inbox.wait(6)
    first.answer(first.inbox.take(1))
    web.until(1)
    for entry_id in (2, 3):
        first.run(first.inbox.take(entry_id))
    assert web.crash(first) == ([KEY], [])
    web.client.offer(entry_of(7, {"x": floats(1, 4) + 7}))
    web.attach(second)
    web.loop.turn()
    for suspect in (2, 3):
        entry = second.inbox.take(suspect)
        assert not second.inbox.entries
        assert (entry.inputs["x"] == floats(1, 4) + suspect).all()
        second.answer(entry)
        web.until(suspect)
    for entry_id in (4, 5, 6, 7):
        second.answer(second.inbox.take(entry_id))
    web.until(*range(1, 8))
    for entry_id in range(1, 8):
        assert (web.results.outputs(entry_id)["x"] == floats(1, 4) + entry_id).all()
    assert web.used == 0


def test_an_entry_that_runs_in_two_crashes_is_not_run_again(caplog: pytest.LogCaptureFixture) -> None:
    web = Web()
    engines = [Engine() for _ in range(3)]
    web.attach(engines[0])
    web.client.offer(entry_of(1, {"x": floats(1, 4)}, request_id="poison"))
    web.client.offer(entry_of(2, {"x": floats(1, 4)}))
    web.loop.turn()
    for entry_id in (1, 2):
        engines[0].run(engines[0].inbox.take(entry_id))
    assert web.crash(engines[0]) == ([KEY], [])
    web.attach(engines[1])
    web.loop.turn()
    engines[1].run(engines[1].inbox.take(1))
    assert web.crash(engines[1]) == ([KEY], [KEY])
    assert isinstance(web.results.error(1), ModelCrashed)
    assert "poison" in caplog.text
    assert "x <f4 ['rows', 4]" in caplog.text
    web.attach(engines[2])
    web.loop.turn()
    engines[2].answer(engines[2].inbox.take(2))
    web.until(2)
    assert web.used == 0


def test_a_crash_with_another_cause_is_not_held_against_the_entries() -> None:
    web = Web()
    engines = [Engine() for _ in range(4)]
    for engine in engines[:3]:
        web.attach(engine)
        if engine is engines[0]:
            web.client.offer(entry_of(1, {"x": floats(1, 4)}))
        web.loop.turn()
        engine.run(engine.inbox.take(1))
        engine.port.disconnect(0)
        web.loop.until(lambda: web.lost and web.lost[-1][0] == web.epoch)
        web.client.detach(web.epoch, blame=False)
    web.attach(engines[3])
    web.loop.turn()
    engines[3].answer(engines[3].inbox.take(1))
    web.until(1)


def test_a_suspect_waits_until_the_entries_of_other_web_processes_have_ended() -> None:
    web, other, first, second = Web(), Web(1), Engine(), Engine()
    web.attach(first)
    web.client.offer(entry_of(1, {"x": floats(1, 4)}))
    web.loop.turn()
    first.run(first.inbox.take(1))
    other.attach(second)
    other.client.offer(entry_of(50, {"x": floats(1, 4)}))
    other.loop.turn()
    busy = second.inbox.take(50)
    web.crash(first)
    web.attach(second)
    web.loop.until(lambda: second.port.unanswered == 2)
    other.client.offer(entry_of(51, {"x": floats(1, 4)}))
    other.loop.turn()
    other.loop.until(lambda: second.port.unanswered == 3)
    assert not second.inbox.entries
    second.answer(busy)
    suspect = second.inbox.take(1)
    assert not second.inbox.entries
    second.answer(suspect)
    second.answer(second.inbox.take(51))
    web.until(1)
    other.until(50, 51)


def test_entries_wait_for_an_engine_that_is_expected() -> None:
    web, engine = Web(), Engine()
    with pytest.raises(NotReady):
        web.client.offer(entry_of(1, {"x": floats(1, 4)}))
    web.client.expect(os.dup(web.arena))
    web.client.refuse_early(KEY, 0)
    web.client.offer(entry_of(1, {"x": floats(1, 4)}))
    web.attach(engine)
    web.loop.turn()
    engine.answer(engine.inbox.take(1))
    web.until(1)
    assert (web.results.outputs(1)["x"] == floats(1, 4)).all()


def test_a_full_queue_does_not_refuse_what_was_accepted_before_the_crash() -> None:
    web, first, second = Web(), Engine(), Engine()
    web.attach(first)
    for entry_id in (1, 2):
        web.client.offer(entry_of(entry_id, {"x": floats(1, 4)}))
    web.loop.turn()
    first.inbox.wait(2)
    web.crash(first)
    web.attach(second)
    web.loop.turn()
    entry = second.inbox.take(1)
    second.inbox.take(2)
    web.crash(second)

    third = Engine()
    offer = third.inbox.offer

    def offer_one(entry: Entry) -> None:
        if third.inbox.entries:
            raise QueueFull("full")
        offer(entry)

    third.inbox.offer = offer_one  # type: ignore[method-assign]
    web.attach(third)
    web.loop.turn()
    for entry_id in (1, 2):
        entry = third.inbox.take(entry_id)
        third.answer(entry)
        web.until(entry_id)
    assert {each.error for each in web.results.by_entry.values()} == {None}


def test_blocks_of_answered_entries_are_free_when_the_engine_that_read_them_is_dead() -> None:
    web, engine = Web(), Engine()
    web.attach(engine)
    web.client.offer(entry_of(1, {"x": floats(1, 4)}))
    web.loop.turn()
    entry = engine.inbox.take(1)
    engine.run(entry)
    web.client.cancel(KEY, 1, "deadline")
    engine.port.put([Result(entry.id, None, DeadlineExceeded("late"), 0.0, runs_on=True)])
    web.loop.turn()
    assert web.used > 0
    web.crash(engine)
    assert web.used == 0


def test_entries_move_with_their_version_to_another_engine() -> None:
    """After a crash the version runs in an engine of its own, whose client has another arena."""
    web, own = Web(), Web(1)
    first, second, third = Engine(), Engine(), Engine()
    web.attach(first)
    parts = [Part(entry_of(12, {"x": floats(1, 3)}, group=(3,)), [0])]
    for entry_id in (1, 2):
        web.client.offer(entry_of(entry_id, {"x": floats(1, 4) + entry_id, "s": np.array(["ä"], object)}))
    web.client.offer(split_entry(11, parts))
    web.loop.turn()
    first.run(first.inbox.take(1))
    first.inbox.wait(2)
    web.crash(first)
    # The successor does not have the version, whose engine is still being started.
    second.inbox.refusal = NotReady("elsewhere")
    web.routes = {KEY: [own.client]}
    web.client.offer(entry_of(3, {"x": floats(1, 4)}))
    web.attach(second)
    web.loop.turn()
    web.loop.until(lambda: all(each.refusal for each in web.client._blocks.pending.values()))
    own.attach(third)
    web.client.reroute({KEY: [own.client]})
    assert web.used == 0
    own.loop.turn()
    suspect = third.inbox.take(1)
    assert not third.inbox.entries
    assert (suspect.inputs["x"] == floats(1, 4) + 1).all()
    assert suspect.inputs["s"].tolist() == ["ä"]
    third.answer(suspect)
    third.answer(third.inbox.take(2))
    split = third.inbox.take(11)
    assert (split.parts[0].entry.inputs["x"] == floats(1, 3)).all()
    third.answer(split, {"y": floats(1)})
    third.answer(third.inbox.take(3))
    own.until(1, 2, 3, 11)
    assert own.used == 0
    assert not web.results.by_entry


def test_an_entry_that_its_engine_goes_on_refusing_gets_the_refusal() -> None:
    """The version may have failed to load in the successor; nobody tells the web process anything more."""
    web, first, second = Web(), Engine(), Engine()
    web.attach(first)
    web.client.offer(entry_of(1, {"x": floats(1, 4)}))
    web.loop.turn()
    first.inbox.wait(1)
    web.crash(first)
    second.inbox.refusal = NotReady("failed")
    web.attach(second)
    web.until(1)
    assert web.results.error(1).detail == "failed"
    assert web.used == 0


def test_an_entry_whose_version_is_nowhere_gets_the_refusal() -> None:
    web, first, second = Web(), Engine(), Engine()
    web.attach(first)
    for entry_id in (1, 2):
        web.client.offer(entry_of(entry_id, {"x": floats(1, 4)}))
    web.loop.turn()
    first.inbox.wait(2)
    web.crash(first)
    second.inbox.refusal = NotReady("failed twice")
    web.routes = {KEY: [Web(1).client]}  # whose engine is still being started
    web.attach(second)
    web.loop.turn()
    web.loop.until(lambda: all(each.refusal for each in web.client._blocks.pending.values()))
    second.inbox.refusal = None
    web.client.cancel(KEY, 2, "deadline")
    web.client.reroute({KEY: [web.client]})
    web.loop.turn()
    second.inbox.take(1)
    web.crash(second)
    third = Engine()
    third.inbox.refusal = NotReady("failed thrice")
    web.attach(third)
    web.loop.turn()
    web.loop.until(lambda: all(each.refusal for each in web.client._blocks.pending.values()))
    web.client.reroute({})
    assert web.results.error(1).detail == "failed thrice"
    assert isinstance(web.results.error(2), DeadlineExceeded)
    assert web.used == 0


def test_an_entry_that_is_refused_twice_is_offered_again() -> None:
    """What the web process knows of versions may come later than both refusals."""
    web, first, second = Web(), Engine(), Engine()
    web.attach(first)
    web.client.offer(entry_of(1, {"x": floats(1, 4)}))
    web.loop.turn()
    first.inbox.wait(1)
    web.crash(first)
    second.inbox.refusal = NotReady("not yet")
    web.attach(second)
    web.loop.until(lambda: web.loop.later)
    second.inbox.refusal = None
    web.loop.until(lambda: second.inbox.entries)
    assert not web.results.by_entry
