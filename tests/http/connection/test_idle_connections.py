"""A connection whose client does nothing more keeps little, and ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import uvicorn
from inferpool.http.connection import slow_client
from inferpool.http.connection.batched_reads import ReadBatcher
from inferpool.http.connection.protocol import PredictProtocol
from inferpool.http.connection.slow_client import SlowClientTimer
from uvicorn.server import ServerState

from tests.http.connection.fakes import FakeTransport, Harness

KEPT_S = 75.0


class Transport(FakeTransport):
    """A transport that waits, when it is closed, until its client has read what is left."""

    aborted = False

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.parametrize("unread", [0, 1, slow_client.LEAST_BYTES - 1])
@pytest.mark.parametrize("closing", [False, True])
def test_a_client_that_leaves_a_little_unread_does_not_keep_its_connection(
    unread: int, closing: bool
) -> None:
    client = Harness().connect()
    transport = client.connection.transport = cast("Any", Transport())
    transport.buffered, transport.closing = unread, closing
    loop = cast("Any", client.connection.loop)
    SlowClientTimer(client.connection, KEPT_S, lambda: None).start()
    loop.advance(KEPT_S)
    assert transport.closing
    loop.advance(slow_client.STALLED_S - 1)
    assert not transport.aborted
    loop.advance(1)
    assert transport.aborted == (unread > 0)


@pytest.mark.parametrize("unread", [0, 1])
def test_a_refusal_that_is_not_read_does_not_keep_the_connection(unread: int) -> None:
    client = Harness().connect()
    transport = client.connection.transport = cast("Any", Transport())
    transport.buffered = unread
    loop = cast("Any", client.connection.loop)
    client.connection.between_requests, client.connection.in_head = False, True
    client.connection.idle_since, client.connection.last_received = None, loop.time() + KEPT_S - 1
    timer = SlowClientTimer(client.connection, KEPT_S, transport.close)
    timer.begin_window(loop.time())
    timer.start()
    loop.advance(KEPT_S)
    assert transport.closing
    assert not transport.aborted
    loop.advance(slow_client.STALLED_S)
    assert transport.aborted == (unread > 0)


def test_an_idle_connection_does_not_keep_the_bytes_of_a_body() -> None:
    harness = Harness()

    async def application(scope: object, receive: object, send: object) -> None: ...

    config = uvicorn.Config(application, ws="none", lifespan="off", log_config=None)
    config.load()
    with mock.patch.object(
        config, "loaded_app", SimpleNamespace(shared=harness.shared, read_batcher=ReadBatcher())
    ):
        protocol = PredictProtocol(config, ServerState(), {}, cast("Any", harness.loop))
    transport = FakeTransport()
    protocol.connection_made(cast("Any", transport))
    body = b'{"inputs": [[1, 2]]}'
    protocol.data_received(
        b"POST /predict/m HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    )
    assert not protocol._chunks
    harness.loop.settle()
    harness.inbox.run(*harness.inbox.waiting)
    harness.loop.settle()
    assert [status for status, _ in transport.responses()] == [200]
