"""A refused request whose answer its client does not read: its body comes all the same."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from types import SimpleNamespace

from service.http.exchange import Exchange
from service.http.head import Head
from service.http.native import NATIVE
from service.http.outlet import Outlet
from service.http.predict import Call, Predictor
from service.http.recorder import Recorder
from service.metrics import Metrics


class Nobody:
    """A catalog without models."""

    def models(self) -> dict[str, object]:
        return {}


async def refuse_and_go_on() -> tuple[list[bytes], list[Exchange]]:
    predictor = Predictor(
        Nobody(),
        None,
        Outlet(),
        Metrics({}),
        time.monotonic,
        max_body_bytes=10**6,
        in_flight_bytes=10**7,
        recorder=Recorder(),
    )
    written: list[bytes] = []
    held: list[Exchange] = []
    connection = SimpleNamespace(
        predictor=predictor,
        loop=asyncio.get_running_loop(),
        transport=SimpleNamespace(
            write=written.append, is_closing=lambda: False, get_write_buffer_size=lambda: 10**6
        ),
        flow=SimpleNamespace(write_paused=True),
        server_state=SimpleNamespace(default_headers=[]),
        pipeline=(),
        descriptor=-1,
        on_response_complete=lambda: None,
        hold=held.append,
    )
    head = Head("nobody", None, [(b"content-length", b"13")])
    exchange = Exchange(connection, Call(NATIVE, head, predictor.clock()), True, False)
    exchange.start()
    exchange.take(b'{"inputs":[]}')
    exchange.taken()
    exchange.complete()
    assert predictor.in_flight == 0
    predictor.reserve(Call(NATIVE, head, predictor.clock()), 10**7)  # nothing else is counted any more
    return written, held


def test_a_refused_request_is_answered_once_however_late_its_body_comes() -> None:
    written, held = asyncio.run(refuse_and_go_on())
    assert [answer.split(b"\r\n")[0] for answer in written] == [b"HTTP/1.1 404 Not Found"]
    assert len(held) == 1


def test_a_refused_request_is_gone_at_once() -> None:
    """Its head may be of 64 KiB: thousands of them must not wait for the collector."""

    async def refuse() -> weakref.ref[object]:
        _written, held = await refuse_and_go_on()
        known = weakref.ref(held[0]._connection.on_response_complete)
        held.clear()  # which the connection knows
        return known

    gc.disable()
    try:
        assert asyncio.run(refuse())() is None
    finally:
        gc.enable()
