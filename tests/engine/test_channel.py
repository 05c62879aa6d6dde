"""The channel between a web process and an engine: what crosses, and what is bounded."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from inferpool.engine.records import MOST_TENANT
from inferpool.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidInput,
    NotReady,
    Overloaded,
    QueueFull,
)
from inferpool.pool.ports import Entry, Part, Result, VersionKey
from inferpool.pool.splitting import split_entry

from tests.engine.channel_ends import KEY, MIB, Engine, Web, entry_of, floats


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


def test_a_block_that_is_used_again_has_the_tensors_of_its_new_entry(web: Web, engine: Engine) -> None:
    blocks = set()
    for number, (name, tensor) in enumerate(
        (
            ("x", floats(1, 16)),
            ("x", floats(1, 16) + 1),
            ("x", floats(2, 8)),
            ("x", floats(1, 16).astype(np.int32)),
            ("y", floats(1, 16)),
            ("x", floats(1, 16) + 2),
        ),
        1,
    ):
        web.client.offer(entry_of(number, {name: tensor}, len(tensor)))
        web.loop.turn()
        entry = engine.inbox.take(number)
        assert list(entry.inputs) == [name]
        found = entry.inputs[name]
        assert (found.dtype, found.shape, found.tolist()) == (tensor.dtype, tensor.shape, tensor.tolist())
        blocks.add(entry.mark_at)
        engine.answer(entry)
        web.until(number)
    assert len(blocks) == 1


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
