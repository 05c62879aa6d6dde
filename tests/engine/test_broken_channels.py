"""Records that are broken or hostile: they end a channel and nothing else."""

from __future__ import annotations

import os
import socket
from struct import pack

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inferpool.engine import records

from tests.engine.channel_ends import MIB, Engine, Web, entry_of, floats


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
