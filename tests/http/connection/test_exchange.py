"""A refused request whose answer its client does not read: its body comes all the same."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from types import SimpleNamespace

from inferpool.http.connection.connection import Connection
from inferpool.http.connection.exchange import Exchange
from inferpool.http.native.api import NATIVE_API
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.predictor import Predictor
from inferpool.http.predict.recorder import RequestRecorder
from inferpool.http.predict.request_head import RequestHead
from inferpool.http.predict.results import ResultDispatcher
from inferpool.observe.metrics import Metrics


class Nobody:
    """A catalog without models."""

    def models(self) -> dict[str, object]:
        return {}


class Transport(SimpleNamespace):
    """Something that may be referred to weakly."""


async def refuse_and_go_on() -> tuple[list[bytes], list[Exchange], weakref.ref[Transport]]:
    predictor = Predictor(
        Nobody(),
        None,
        ResultDispatcher(),
        Metrics({}),
        time.monotonic,
        max_body_bytes=10**6,
        in_flight_bytes=10**7,
        recorder=RequestRecorder(),
    )
    written: list[bytes] = []
    held: list[Exchange] = []
    transport = Transport(
        write=written.append,
        is_closing=lambda: False,
        get_write_buffer_size=lambda: 10**6,
        get_extra_info=lambda name: name == "sslcontext",
    )
    link = Connection(
        SimpleNamespace(hold=held.append),
        predictor,
        asyncio.get_running_loop(),
        SimpleNamespace(default_headers=[], total_requests=0),
    )
    link.made(transport, SimpleNamespace(read_paused=False), ())
    link.write_paused = True
    head = RequestHead("nobody", None, [(b"content-length", b"13")])
    exchange = Exchange(link, PredictContext(NATIVE_API, head, predictor.clock()), True, False)
    exchange.start()
    exchange.take(b'{"inputs":[]}')
    exchange.taken()
    exchange.complete()
    assert predictor.in_flight == 0
    predictor.reserve(
        PredictContext(NATIVE_API, head, predictor.clock()), 10**7
    )  # nothing else is counted any more
    return written, held, weakref.ref(transport)


def test_a_refused_request_is_answered_once_however_late_its_body_comes() -> None:
    written, held, _ = asyncio.run(refuse_and_go_on())
    assert [answer.split(b"\r\n")[0] for answer in written] == [b"HTTP/1.1 404 Not Found"]
    assert len(held) == 1


def test_a_refused_request_is_gone_at_once() -> None:
    """Its head may be of 64 KiB: thousands of them must not wait for the collector."""

    async def refuse() -> weakref.ref[Transport]:
        _written, held, known = await refuse_and_go_on()
        assert known() is not None
        held.clear()  # which the link knows
        return known

    gc.disable()
    try:
        assert asyncio.run(refuse())() is None
    finally:
        gc.enable()
