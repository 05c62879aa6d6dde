"""No request is dropped and none is crossed while versions take over from one another."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.repository.switching import FLAGS, prepare, switch

PAUSE_S = 0.02
"""Pause between the client's rounds, which leaves the cores to the loads."""


@pytest.mark.parametrize("engine", ["in-process", "process"])
def test_thousands_of_requests_survive_every_switch(serve: Serve, tmp_path: Path, engine: str) -> None:
    prepare(tmp_path)
    server = serve(tmp_path, *FLAGS, "--engine", engine)
    report = switch(server, tmp_path, requests=3000, least_switches=4, pause_s=PAUSE_S)
    assert report.faults == []
    assert report.requests >= 3000
    assert len(report.versions) >= 4
    assert server.metric("requests_total", model="switched", code="200") == report.requests
