"""Bodies that are received into the memory of an engine, which reads their tensors there."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from tests.engine.channel_ends import KEY, MIB, Engine, Web, entry_of, floats, receive_floats, view_of


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
