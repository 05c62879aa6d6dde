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


def test_an_upgrade_is_ignored_and_what_follows_is_never_taken_for_a_request(
    serve: Serve, make_chaos: MakeChaos
) -> None:
    server = serve(make_chaos("m", run_ms=1))
    hidden = "GET /models/smuggled HTTP/1.1\r\nhost: x\r\n\r\n"
    for path in ("/predict/m", "/models"):
        with Wire(server) as wire:
            wire.send(
                f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n"
                f"content-length: {len(hidden)}\r\n\r\n"
            )
            wire.send(hidden)
            assert 400 <= wire.answer()[0] < 500
            assert wire.ended()
    with Wire(server) as wire:
        wire.send("GET /health/live HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")
        assert wire.answer()[0] == 200
