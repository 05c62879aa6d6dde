"""What the protocol of the predict lane adds to uvicorn's."""

from __future__ import annotations

import pytest

from tests.conftest import MakeChaos, Serve
from tests.http.test_connections import Wire, request


def test_a_head_without_end_is_cut_off(serve: Serve, make_chaos: MakeChaos) -> None:
    server = serve(make_chaos("m", run_ms=1))
    with Wire(server) as wire:
        wire.send(request(1, headers=f"x: {'y' * 30_000}\r\n"))
        assert wire.answer()[0] == 200
    with Wire(server) as wire:
        wire.send("POST /predict/m HTTP/1.1\r\n")
        with pytest.raises(ConnectionError):  # noqa: PT012 - whichever write notices first
            for number in range(10_000):
                wire.send(f"x-{number}: {'y' * 10_000}\r\n")
    with Wire(server) as wire:
        wire.send("GET /models HTTP/1.1\r\nx: " + "y" * 70_000)
        assert wire.status()[0] == 431
