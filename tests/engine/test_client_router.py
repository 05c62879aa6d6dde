"""Where the entries of a version go that is in several engines."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from inferpool.engine.client_router import ClientRouter
from inferpool.errors import NotReady, Overloaded

from tests.engine.channel_ends import KEY, MIB, Engine, Web, entry_of, floats, receive_floats


def _is_idle(web: Web) -> bool:
    return not web.client.rows


def joined(web: Web) -> Engine:
    engine = Engine()
    web.attach(engine)
    return engine


def test_entries_go_to_the_engine_with_the_fewest_rows_and_take_turns() -> None:
    webs = [Web(), Web()]
    engines = [joined(web) for web in webs]
    router = ClientRouter()
    router.route({KEY: [web.client for web in webs]})
    router.offer(entry_of(1, {"x": floats(8, 4)}, 8))
    first = next(number for number, web in enumerate(webs) if web.client.rows)
    for entry_id in range(2, 9):
        router.offer(entry_of(entry_id, {"x": floats(1, 4)}))
    assert [web.client.rows for web in (webs[first], webs[1 - first])] == [8, 7]
    for web, engine in zip(webs, engines, strict=True):
        web.loop.turn()
        for entry_id in list(web.client._blocks.pending):
            engine.answer(engine.inbox.take(entry_id))
        web.loop.until(partial(_is_idle, web))
    taken = set()
    for entry_id in (11, 12):
        router.offer(entry_of(entry_id, {"x": floats(1, 4)}))
        taken |= {number for number, web in enumerate(webs) if entry_id in web.client._blocks.pending}
    assert taken == {0, 1}


def test_entries_that_waited_in_an_engine_that_ends_go_to_another_and_suspects_stay() -> None:
    webs = [Web(), Web()]
    engines = [joined(web) for web in webs]
    router = ClientRouter()
    routes = {KEY: [web.client for web in webs]}
    router.route(routes)
    for entry_id in (1, 2):
        webs[0].client.offer(entry_of(entry_id, {"x": floats(1, 4)}))
    webs[0].loop.turn()
    engines[0].run(engines[0].inbox.take(1))
    engines[0].inbox.wait(1)
    webs[0].crash(engines[0])
    router.route(routes)
    assert list(webs[0].client._blocks.pending) == [1]
    router.offer(entry_of(3, {"x": floats(1, 4)}))
    webs[1].loop.turn()
    for entry_id in (2, 3):
        engines[1].answer(engines[1].inbox.take(entry_id))
    webs[1].until(2, 3)
    successor = Engine()
    webs[0].attach(successor)
    webs[0].loop.turn()
    successor.answer(successor.inbox.take(1))
    webs[0].until(1)
    # If the version does not come back there, the suspect goes where the version is.
    webs[0].client.offer(entry_of(4, {"x": floats(1, 4)}))
    webs[0].loop.turn()
    successor.run(successor.inbox.take(4))
    webs[0].crash(successor)
    router.route({KEY: [webs[1].client]})
    webs[1].loop.turn()
    engines[1].answer(engines[1].inbox.take(4))
    webs[1].until(4)


def test_an_engine_without_room_leaves_entries_to_another() -> None:
    webs = [Web(most_entries=1), Web(most_entries=1)]
    for web in webs:
        joined(web)
    router = ClientRouter()
    router.route({KEY: [web.client for web in webs]})
    webs[0].client.offer(entry_of(1, {"x": floats(1, 4)}))
    router.offer(entry_of(2, {"x": floats(9, 4)}, 9))  # the first one has fewer rows from here on
    assert [web.client.rows for web in webs] == [1, 9]
    with pytest.raises(Overloaded):
        router.offer(entry_of(3, {"x": floats(1, 4)}))
    with pytest.raises(NotReady):
        ClientRouter().offer(entry_of(4, {"x": floats(1, 4)}))


def test_a_body_runs_in_the_engine_whose_memory_it_is_in() -> None:
    webs = [Web(arena_bytes=64 * MIB), Web(arena_bytes=64 * MIB)]
    for web in webs:
        joined(web)
    router = ClientRouter()
    router.route({KEY: [web.client for web in webs]})
    tensor = np.arange(100_000, dtype=np.float32).reshape(1, -1)
    for number in (0, 1, 0):
        body = receive_floats(webs[number], tensor)
        inputs = np.frombuffer(body, np.float32).reshape(1, -1)
        before = webs[number].client.rows
        router.offer(entry_of(10 + before + 100 * number, {"x": inputs}, nbytes=tensor.nbytes))
        assert webs[number].client.rows == before + 1
