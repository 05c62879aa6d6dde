"""The channel between a web process and an engine: what crosses, what is bounded, what a crash leaves."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from struct import pack
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inferpool.engine import records
from inferpool.engine.records import MOST_TENANT
from inferpool.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidInput,
    ModelCrashed,
    NotReady,
    Overloaded,
    QueueFull,
)
from inferpool.pool.ports import Entry, Part, Result, VersionKey
from inferpool.pool.splitting import split_entry

from tests.engine.channel_ends import KEY, MIB, OPEN, Engine, Web, entry_of


@pytest.fixture(autouse=True)
def close_all() -> Iterator[None]:
    """Close what a test has made."""
    yield
    for each in reversed(OPEN.copy()):
        each.close()


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def web(engine: Engine) -> Web:
    made = Web()
    made.attach(engine)
    return made


def floats(*shape: int) -> Any:
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


# What crosses.


def test_an_entry_crosses_with_all_that_the_pool_needs(web: Web, engine: Engine) -> None:
    moment = time.monotonic()
    web.client.offer(
        Entry(
            *(
                5,
                KEY,
                {"x": floats(3, 4), "s": np.array("ä", object)},
                3,
                ("g", 1),
                4711,
                moment,
                moment + 60,
            ),
            *(2, ("y", "z"), 2.5, "request-5"),
        )
    )
    web.loop.turn()
    [entry] = engine.inbox.wait(1)
    assert (entry.key, entry.rows, entry.nbytes, entry.arrived, entry.deadline) == (
        *(KEY, 3, 4711, moment, moment + 60),
    )
    assert (entry.priority, entry.outputs, entry.row_load, entry.request_id) == (
        2,
        ("y", "z"),
        2.5,
        "request-5",
    )
    assert entry.group != entry.id
    assert (entry.inputs["x"] == floats(3, 4)).all()
    assert entry.inputs["s"].shape == ()
    assert entry.inputs["s"].item() == "ä"
    assert entry.inputs["x"].ctypes.data % 64 == 0
    engine.answer(entry, {"y": floats(3, 2)})
    web.until(5)
    result = web.results.by_entry[5]
    assert (result.queue_s, result.compute_s, result.batch_rows) == (0.5, 0.25, 7)
    assert (web.results.outputs(5)["y"] == floats(3, 2)).all()
    web.results.outputs(5)["y"][0] = 1  # outputs can be written, as those of a pool in this process can
    assert web.used == 0


def test_the_tenant_of_an_entry_and_of_its_parts_crosses(web: Web, engine: Engine) -> None:
    parts = [Part(entry_of(number, {"ids": floats(1, number)}), [number - 7]) for number in (7, 8)]
    single = entry_of(10, {"ids": floats(1, 3)})
    for entry in (single, *(part.entry for part in parts)):
        entry.tenant, entry.share, entry.rank = MOST_TENANT - 1, 2.5, 3
    web.client.offer(single)
    web.client.offer(split_entry(9, parts))
    web.client.offer(entry_of(11, {"ids": floats(1, 3)}))
    web.loop.turn()
    *ours, other = engine.inbox.wait(3)
    for entry in (*ours, *(part.entry for part in ours[1].parts)):
        assert (entry.tenant, entry.share, entry.rank, entry.priority) == (MOST_TENANT - 1, 2.5, 3, 5)
    assert (other.tenant, other.share, other.rank) == (0, 1.0, 5)
    for entry in (*ours, other):
        engine.answer(entry, {"y": floats(1)})
    web.until(9, 10, 11)


def test_entries_of_several_web_processes_share_groups_but_not_ids(web: Web, engine: Engine) -> None:
    other = Web(1)
    other.attach(engine)
    for each in (web, other):
        each.client.offer(entry_of(1, {"x": floats(1, 4)}, group=((None, ("x", (4,))))))
        each.client.offer(entry_of(2, {"x": floats(1, 4)}, group=2))
        each.loop.turn()
    entries = engine.inbox.wait(4)
    assert len({entry.id for entry in entries}) == 4
    alone = [entry for entry in entries if entry.group == entry.id]
    assert len(alone) == 2
    assert len({entry.group for entry in entries}) == 3
    engine.port.put([Result(entry.id, entry.inputs, None, 0.0) for entry in entries])
    for each in (web, other):
        each.until(1, 2)


def test_an_entry_with_parts_crosses(web: Web, engine: Engine) -> None:
    parts = [
        Part(entry_of(7, {"ids": floats(2, 3)}, 2, group=(3,), row_load=1.5), [2, 0]),
        Part(entry_of(8, {"ids": floats(1, 9)}, 1, group=8), [1]),
    ]
    web.client.offer(split_entry(9, parts))
    web.loop.turn()
    [entry] = engine.inbox.wait(1)
    assert (entry.rows, entry.inputs, len(entry.parts)) == (3, {}, 2)
    first, second = entry.parts
    assert (list(first.row_indices), list(second.row_indices)) == ([2, 0], [1])
    assert first.entry.part_of == second.entry.part_of == entry.id
    assert (first.entry.inputs["ids"] == floats(2, 3)).all()
    assert (second.entry.inputs["ids"] == floats(1, 9)).all()
    assert first.entry.row_load == 1.5
    assert first.entry.group != first.entry.id
    assert second.entry.group == second.entry.id
    engine.answer(entry, {"y": floats(3)})
    web.until(9)
    assert web.used == 0


def test_large_outputs_stay_where_they_are_until_they_are_released(web: Web, engine: Engine) -> None:
    for entry_id in (1, 2):  # the second time the block has room for them
        web.client.offer(entry_of(entry_id, {"x": floats(1, 4)}))
        web.loop.turn()
        engine.answer(engine.inbox.take(entry_id), {"y": floats(100, 1000), "z": np.array(["ä"], object)})
        web.until(entry_id)
        assert (web.results.outputs(entry_id)["y"] == floats(100, 1000)).all()
        assert web.results.outputs(entry_id)["z"].tolist() == ["ä"]
        assert web.used > 400_000
        web.client.release(KEY, entry_id)
        assert web.used == 0
        web.client.release(KEY, entry_id)


@pytest.mark.parametrize("size", [1023, 1024, 1025, 16 * 1024, 20_000])
def test_outputs_that_are_copied_free_their_block_at_once(web: Web, engine: Engine, size: int) -> None:
    for entry_id in (1, 2):
        web.client.offer(entry_of(entry_id, {"x": floats(1, 4)}))
        web.loop.turn()
        engine.answer(engine.inbox.take(entry_id), {"y": floats(1, size)})
        web.until(entry_id)
        assert (web.results.outputs(entry_id)["y"] == floats(1, size)).all()
        web.client.release(KEY, entry_id)
        assert web.used == 0


def test_outputs_for_which_there_is_no_memory_are_refused(engine: Engine) -> None:
    web = Web(arena_bytes=MIB)
    web.attach(engine)
    web.client.offer(entry_of(1, {"x": floats(1, 4)}))
    web.loop.turn()
    engine.answer(engine.inbox.take(1), {"y": floats(1000, 1000)})
    web.until(1)
    assert isinstance(web.results.error(1), Overloaded)
    assert web.used == 0


def test_errors_arrive_as_they_were(web: Web, engine: Engine) -> None:
    errors = {
        1: InvalidInput("too long", tensor="x", got=[1, 2]),
        2: QueueFull("full", 2.5),
        3: InternalError("broken"),
    }
    for entry_id, error in errors.items():
        web.client.offer(entry_of(entry_id, {"x": floats(1, 4)}))
        web.loop.turn()
        engine.answer(engine.inbox.take(entry_id), error=error)
    web.until(*errors)
    for entry_id, error in errors.items():
        arrived = web.results.error(entry_id)
        assert type(arrived) is type(error)
        assert (arrived.detail, arrived.members) == (error.detail, error.members)
    assert web.results.error(2).retry_after_s == 2.5  # type: ignore[attr-defined]
    assert web.used == 0


def test_a_refusal_of_the_pool_is_the_result(web: Web, engine: Engine) -> None:
    engine.inbox.refusal = NotReady("not yet", 3.0)
    web.client.offer(entry_of(1, {"x": floats(1, 4)}))
    web.until(1)
    assert isinstance(web.results.error(1), NotReady)
    assert web.used == 0


def test_outputs_that_cannot_cross_are_an_internal_error(web: Web, engine: Engine) -> None:
    web.client.offer(entry_of(1, {"x": floats(1, 4)}))
    web.loop.turn()
    engine.answer(engine.inbox.take(1), {"y": object()})  # type: ignore[dict-item]
    web.until(1)
    assert isinstance(web.results.error(1), InternalError)


def test_questions_get_their_replies_and_none_when_the_engine_ends(web: Web, engine: Engine) -> None:
    replies: list[Any] = []
    web.client.ask({"what": ["waits"]}, replies.append)
    web.loop.until(lambda: replies)
    assert replies == [{"what": ["waits"]}]
    channel = web
    web.client.ask({"what": "now"}, replies.append)
    web.client.close()
    channel.loop.until(lambda: len(replies) == 2)
    assert replies[1] is None
    web.client.ask({"what": "later"}, replies.append)
    channel.loop.until(lambda: len(replies) == 3)
    assert replies[2] is None


# How entries end.


def test_a_deadline_is_answered_at_once_and_the_block_waits_for_the_engine(web: Web, engine: Engine) -> None:
    for entry_id in (1, 2):
        web.client.offer(entry_of(entry_id, {"x": floats(1, 4)}))
    web.loop.turn()
    entry = engine.inbox.take(1)
    engine.run(entry)
    web.client.cancel(KEY, 1, "deadline")
    web.client.cancel(KEY, 2, "disconnected")
    assert isinstance(web.results.error(1), DeadlineExceeded)
    assert "while the model ran" in web.results.error(1).detail
    web.loop.until(lambda: len(engine.inbox.cancelled) == 2)
    assert engine.inbox.cancelled == [(1, "deadline"), (2, "disconnected")]
    assert web.used > 0
    used = web.used
    # The run goes on after the answer, and reads the block.
    engine.port.put([Result(entry.id, None, DeadlineExceeded("late"), 0.0, runs_on=True)])
    engine.answer(engine.inbox.take(2), error=InternalError("cancelled"))
    web.loop.until(lambda: web.used < used)
    web.loop.turn()
    assert web.used == used // 2
    engine.port.ended([entry.id])
    web.loop.until(lambda: web.used == 0)
    assert set(web.results.by_entry) == {1}
    assert engine.port.unanswered == 0


def test_a_run_that_is_over_before_its_result_holds_nothing(web: Web, engine: Engine) -> None:
    web.client.offer(entry_of(1, {"x": floats(1, 4)}))
    web.loop.turn()
    entry = engine.inbox.take(1)
    engine.port.ended([entry.id])
    engine.port.put([Result(entry.id, None, DeadlineExceeded("late"), 0.0, runs_on=True)])
    web.until(1)
    assert web.used == 0


def test_entries_wait_for_an_engine_within_bounds(engine: Engine) -> None:
    web = Web(arena_bytes=MIB)
    with pytest.raises(NotReady):
        web.client.offer(entry_of(1, {"x": floats(1, 4)}))
    with pytest.raises(NotReady):
        web.client.refuse_early(KEY, 0)
    first = Engine()
    web.attach(first)
    web.crash(first)
    accepted = 0
    with contextlib.suppress(Overloaded):
        for entry_id in range(1, 60):
            web.client.offer(entry_of(entry_id, {"x": floats(1, 5000)}))
            accepted += 1
    assert 40 <= accepted < 59
    web.client.cancel(KEY, 1, "deadline")
    assert isinstance(web.results.error(1), DeadlineExceeded)
    assert "could run" in web.results.error(1).detail
    web.client.refuse_early(KEY, 0)
    web.attach(engine)
    web.loop.turn()
    for entry in engine.inbox.wait(accepted - 1):
        engine.answer(entry, {"y": floats(1)})
    web.until(*range(1, accepted + 1))
    assert web.used == 0


def test_the_number_of_entries_that_wait_is_bounded(engine: Engine) -> None:
    web = Web(most_entries=3)
    web.attach(engine)
    for entry_id in range(1, 4):
        web.client.refuse_early(KEY, 0)
        web.client.offer(entry_of(entry_id, {"x": floats(1, 4)}))
    with pytest.raises(Overloaded, match="3 requests"):
        web.client.offer(entry_of(4, {"x": floats(1, 4)}))
    with pytest.raises(Overloaded):
        web.client.refuse_early(KEY, 0)
    web.loop.turn()
    engine.answer(engine.inbox.take(1))
    web.until(1)
    web.client.offer(entry_of(5, {"x": floats(1, 4)}))


def test_an_engine_that_will_not_come_is_answered_for(engine: Engine) -> None:
    web = Web()
    web.attach(engine)
    web.client.offer(entry_of(1, {"x": floats(1, 4)}))
    web.loop.turn()
    with pytest.raises(ValueError, match="attached"):
        web.client.give_up(lambda: NotReady("never"))
    web.crash(engine)
    web.client.give_up(lambda: NotReady("never"))
    assert isinstance(web.results.error(1), NotReady)
    assert web.used == 0


# Crashes.


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


def test_a_queue_that_was_full_refuses_early_until_an_entry_ends(web: Web, engine: Engine) -> None:
    web.client.offer(entry_of(1, {"x": floats(1, 4)}))
    web.loop.turn()
    first = engine.inbox.take(1)
    engine.inbox.refusal = QueueFull("full", retry_after_s=3600.0)
    web.client.offer(entry_of(2, {"x": floats(1, 4)}))
    web.until(2)
    with pytest.raises(QueueFull):
        web.client.refuse_early(KEY, 0)
    web.client.refuse_early(VersionKey("other", 1), 0)
    web.client.refuse_early(KEY, 1)
    engine.answer(first)
    web.until(1)
    web.client.refuse_early(KEY, 0)


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


def test_attaching_out_of_turn_is_refused(web: Web) -> None:
    for epoch in (1, 2):
        channel, other = socket.socketpair()
        with pytest.raises(ValueError, match="attached"):
            web.client.attach(epoch, channel, os.dup(web.arena))
        assert other.recv(1) == b""
        other.close()
    web.client.close()
    channel, other = socket.socketpair()
    with pytest.raises(ValueError, match="epoch"):
        web.client.attach(1, channel, os.dup(web.arena))
    other.close()
    assert web.client.detach(99) == ([], [])


# Web processes that end or do not read.


def test_the_entries_of_a_web_process_that_ends_are_dropped(engine: Engine) -> None:
    web = Web()
    web.attach(engine)
    for entry_id in (1, 2):
        web.client.offer(entry_of(entry_id, {"x": floats(1, 4)}))
    web.loop.turn()
    entries = engine.inbox.wait(2)
    web.client.close()
    with engine.inbox.changed:
        assert engine.inbox.changed.wait_for(lambda: len(engine.inbox.cancelled) == 2, 20)
    for entry in entries:
        assert (entry.inputs["x"] == floats(1, 4)).all()  # a run may still read them
        engine.answer(entry)
    assert engine.port.unanswered == 0


def test_a_web_process_that_does_not_read_is_given_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = Engine(most_unread_bytes=MIB)
    deaf, web = Web(1), Web(2)
    deaf.attach(engine)
    web.attach(engine)
    count = 1000
    for entry_id in range(1, count + 1):
        deaf.client.offer(entry_of(entry_id, {"x": floats(1, 4)}))
    deaf.loop.turn()
    for entry in engine.inbox.wait(count):
        engine.answer(entry, {"y": floats(1, 1000)})
    engine.inbox.entries.clear()
    web.client.offer(entry_of(1, {"x": floats(1, 4)}))
    web.loop.turn()
    engine.answer(engine.inbox.take(1))
    web.until(1)
    deaf.loop.until(lambda: deaf.lost)
    assert "web process 1 does not read" in caplog.text
    assert len(engine.port._connections) == 1


def test_results_wait_for_a_web_process_that_reads_slowly(web: Web, engine: Engine) -> None:
    count = 2000
    for entry_id in range(1, count + 1):
        web.client.offer(entry_of(entry_id, {"x": floats(1, 4)}))
    web.loop.turn()
    web.loop.until(lambda: len(engine.inbox.entries) == count)
    engine.port.put(
        [Result(entry.id, {"y": floats(1, 500)}, None, 0.0) for entry in engine.inbox.wait(count)]
    )
    web.until(*range(1, count + 1))
    assert web.used == 0


# Records that are none.


# Bodies that are received in the arena.


def receive_floats(web: Web, tensor: Any, tensors_at: int = 0) -> memoryview:
    """Memory of the arena with the body that ends with a tensor."""
    memory = web.client.lend(tensors_at + tensor.nbytes, tensors_at)
    assert memory is not None
    memory[tensors_at:] = tensor.tobytes()
    return memory


def view_of(body: memoryview, tensor: Any, tensors_at: int = 0) -> Any:
    return np.frombuffer(body, tensor.dtype, offset=tensors_at).reshape(tensor.shape)


@pytest.mark.parametrize("tensors_at", [0, 1, 64, 100, 5001])
def test_the_engine_reads_a_body_where_it_was_received(web: Web, engine: Engine, tensors_at: int) -> None:
    tensor = floats(5, 20_000)
    body = receive_floats(web, tensor, tensors_at)
    taken = web.used
    web.client.offer(entry_of(1, {"x": view_of(body, tensor, tensors_at)}, 5, nbytes=tensor.nbytes))
    assert web.used == taken
    web.loop.turn()
    entry = engine.inbox.take(1)
    assert (entry.inputs["x"] == tensor).all()
    body[tensors_at] = 1
    assert entry.inputs["x"][0, 0] != tensor[0, 0]
    engine.answer(entry, {"y": floats(1)})
    web.until(1)
    assert web.used == taken  # the body may still be read
    del body
    web.loop.turn()
    assert web.used == 0


def test_several_tensors_stay_in_their_body_if_they_are_aligned(web: Web, engine: Engine) -> None:
    first, second, third = floats(2, 16_000), np.arange(32, dtype=np.int64), floats(2, 3)
    body = receive_floats(web, np.frombuffer(b"".join(map(bytes, (first, second, third))), np.uint8))
    inputs = {
        "a": view_of(body[: first.nbytes], first),
        "b": view_of(body[first.nbytes :][: second.nbytes], second),
        "c": view_of(body[first.nbytes + second.nbytes :], third),
    }
    taken = web.used
    web.client.offer(entry_of(1, inputs, 2, nbytes=first.nbytes))
    assert web.used == taken
    web.loop.turn()
    entry = engine.inbox.take(1)
    for name, tensor in zip("abc", (first, second, third), strict=True):
        assert (entry.inputs[name] == tensor).all()
    engine.answer(entry, {"y": floats(400, 100)})  # more than there is behind the body
    web.until(1)
    assert (web.results.outputs(1)["y"] == floats(400, 100)).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor[::-1],
        lambda tensor: tensor[:, :-1],
        lambda tensor: tensor.T,
        lambda tensor: tensor.reshape(-1)[1:],
        lambda tensor: tensor.astype(">f4"),
        lambda tensor: tensor + 1,
        lambda tensor: np.frombuffer(memoryview(tensor).cast("B")[4:], np.float32),
    ],
)
def test_a_tensor_that_lies_otherwise_in_a_body_is_copied(web: Web, engine: Engine, change: Any) -> None:
    tensor = floats(200, 200)
    changed = change(view_of(receive_floats(web, tensor), tensor))
    expected = changed.copy()
    web.client.offer(entry_of(1, {"x": changed}, len(changed), nbytes=tensor.nbytes))
    web.loop.turn()
    entry = engine.inbox.take(1)
    changed[...] = 0 if changed.flags.writeable else changed
    assert (entry.inputs["x"] == expected).all()
    engine.answer(entry, {"y": floats(1)})
    web.until(1)
    del changed
    web.loop.turn()
    assert web.used == 0


def test_a_body_is_the_block_of_one_entry_only(web: Web, engine: Engine) -> None:
    tensor = floats(1, 20_000)
    body = receive_floats(web, tensor)
    for entry_id in (1, 2):
        web.client.offer(entry_of(entry_id, {"x": view_of(body, tensor)}, nbytes=tensor.nbytes))
    body[0] = 1
    del body
    web.loop.turn()
    first, second = engine.inbox.take(1), engine.inbox.take(2)
    assert first.inputs["x"][0, 0] != 0
    assert (second.inputs["x"] == tensor).all()
    for entry, value in ((first, 1), (second, 2)):
        engine.answer(entry, {"y": np.full((1, 20_000), value, np.float32)})
    web.until(1, 2)
    assert [web.results.outputs(number)["y"][0, 0] for number in (1, 2)] == [1, 2]
    for number in (1, 2):
        web.client.release(KEY, number)
    web.loop.turn()
    assert web.used == 0


def test_a_body_survives_the_engine_that_read_it(web: Web, engine: Engine) -> None:
    tensor = floats(1, 20_000)
    body = receive_floats(web, tensor)
    web.client.offer(entry_of(1, {"x": view_of(body, tensor)}, nbytes=tensor.nbytes))
    del body
    web.loop.turn()
    engine.run(engine.inbox.take(1))
    web.loop.turn()
    assert web.client.lend(tensor.nbytes, 0) is not None
    web.crash(engine)
    other = Engine()
    web.attach(other)
    web.loop.turn()
    entry = other.inbox.take(1)
    assert (entry.inputs["x"] == tensor).all()
    other.answer(entry, {"y": floats(1)})
    web.until(1)
    web.loop.turn()
    assert web.used == 0


def test_memory_for_bodies_is_bounded_and_comes_back_from_any_thread(web: Web, engine: Engine) -> None:
    bodies = []
    while (body := web.client.lend(MIB, 0)) is not None:
        bodies.append(body)
    assert len(bodies) == 5  # a third of 16 MiB
    assert web.client.lend(1000, 0) is None
    web.client.offer(entry_of(1, {"x": floats(1, MIB)}))
    del body
    thread = threading.Thread(target=bodies.clear)
    thread.start()
    thread.join()
    web.loop.turn()
    engine.answer(engine.inbox.take(1), {"y": floats(1)})
    web.until(1)
    assert web.used == 0


def hello_of(web: Web) -> bytes:
    return records.hello(0, web.epoch, os.fstat(web.arena).st_size)


def broken_by(web: Web, data: bytes) -> str:
    """The reason with which the client leaves the channel after `data` came."""
    other = web.attach_socket()
    other.sendall(hello_of(web) + data)
    web.loop.until(lambda: web.lost and web.lost[-1][0] == web.epoch)
    web.client.detach(web.epoch)
    other.close()
    return web.lost[-1][1]


def test_a_result_cannot_make_the_web_process_read_other_memory() -> None:
    web = Web()
    first = web.attach_socket()
    first.close()
    web.client.detach(web.epoch)
    web.client.offer(entry_of(1, {"x": floats(1, 4)}))
    web.client.offer(entry_of(2, {"x": floats(1, 4)}))
    layout = records.json_record(
        records.LAYOUT_FIELDS,
        *(records.LAYOUT, 0),
        {"model": "m", "version": 1, "group": "", "outputs": None, "tensors": [["y", "<f4", True, [4]]]},
    )

    def result(offset: int, size: int, rows: int = 1, entry: int = 1, number: int = 0) -> bytes:
        fields = (records.RESULT, 0, number, rows, entry, 0.0, 0.0, 1, offset, size)
        return records.RESULT_FIELDS.pack(records.RESULT_FIELDS.size, *fields)

    for data in (
        *(
            result(0, 16),
            result(0, 1 << 40),
            result(1 << 63, 16),
            result(128, 16),
            result((1 << 64) - 16, 32),
        ),
        *(result(0, 16, number=3), result(0, 16, rows=1 << 30), result(0, 16, entry=77)),
    ):
        reason = broken_by(web, layout + data)
        assert reason != "the engine closed the channel", reason
    assert not web.results.by_entry


KINDS = st.integers(0, 12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=80),
            st.tuples(KINDS, st.binary(max_size=100)).map(
                lambda each: pack("<IB", len(each[1]) + 5, each[0]) + each[1]
            ),
            st.tuples(
                st.sampled_from([(3, 84), (4, 16), (5, 56), (6, 36), (7, 24), (8, 32), (9, 16), (10, 12)]),
                st.binary(min_size=100, max_size=200),
            ).map(lambda each: pack("<IB", each[0][1], each[0][0]) + each[1][: each[0][1] - 5]),
        ),
        max_size=5,
    ),
    st.booleans(),
)
def test_random_bytes_end_a_channel_and_nothing_else(pieces: list[bytes], greeted: bool) -> None:
    data = b"".join(pieces)
    # To a web process.
    web = Web(arena_bytes=MIB)
    other = web.attach_socket()
    web.client.offer(entry_of(1, {"x": floats(1, 4)}))
    other.sendall((hello_of(web) if greeted else b"") + data)
    other.shutdown(socket.SHUT_WR)
    web.loop.until(lambda: web.lost)
    web.client.detach(web.epoch)
    other.close()
    # To an engine.
    engine = Engine()
    channel, other = socket.socketpair()
    engine.port.connect(0, 1, other, os.dup(web.arena))
    channel.sendall((records.hello(0, 1, os.fstat(web.arena).st_size) if greeted else b"") + data)
    channel.shutdown(socket.SHUT_WR)
    channel.settimeout(20)
    while channel.recv(65536):
        pass
    channel.close()
    # Both still serve.
    web.attach(engine)
    web.client.offer(entry_of(2, {"x": floats(1, 4)}))
    web.loop.turn()
    engine.answer(engine.inbox.take(2))
    web.until(2)
    web.close()
    engine.close()


# A second process.

ECHO = """
import socket, sys, threading, time
import numpy as np
from inferpool.engine.engine_port import EnginePort
from inferpool.pool.ports import Result

class Inbox:
    def offer(self, entry):
        outputs = {name: tensor.copy() for name, tensor in entry.inputs.items()}
        threading.Thread(target=port.put, args=([Result(entry.id, outputs, None, 0.0)],)).start()
    def refuse_early(self, key, tenant): pass
    def cancel(self, key, entry_id, reason): pass

port = EnginePort(time.monotonic)
port.start(Inbox(), lambda question: "alive")
port.connect(4, 1, socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
sys.stdin.read()
sys.exit(0 if port.close() else 1)
"""


def test_tensors_are_bit_equal_after_a_visit_to_another_process() -> None:
    web = Web(4)
    channel, other = socket.socketpair()
    fds = (other.fileno(), os.dup(web.arena))
    child = subprocess.Popen(
        [sys.executable, "-c", ECHO, *map(str, fds)], pass_fds=fds, stdin=subprocess.PIPE, close_fds=True
    )
    other.close()
    os.close(fds[1])
    web.client.attach(1, channel, os.dup(web.arena))
    random = np.random.default_rng(1)
    sent: dict[int, Any] = {}
    for entry_id in range(1, 301):
        rows = int(random.integers(0, 30))
        inputs = {
            "x": random.random((rows, int(random.integers(1, 600)))).astype(np.float32),
            "s": np.array([f"ä{number}" for number in range(rows)], object),
            "n": np.array(entry_id, np.int64),
        }
        sent[entry_id] = inputs
        web.client.offer(entry_of(entry_id, dict(inputs), rows))
        web.loop.turn()
    web.until(*sent)
    for entry_id, inputs in sent.items():
        outputs = web.results.outputs(entry_id)
        for name, tensor in inputs.items():
            assert outputs[name].dtype == tensor.dtype
            assert outputs[name].shape == tensor.shape
            assert (outputs[name] == tensor).all()
        web.client.release(KEY, entry_id)
    assert web.used == 0
    child.communicate()
    assert child.returncode == 0


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
