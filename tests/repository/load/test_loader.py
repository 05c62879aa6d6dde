"""A load that does not end holds up no other model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import MakeChaos, Serve
from tests.server import wait_until
from tests.servers.short_load_patience import PATIENCE_S

pytestmark = pytest.mark.parametrize("server_module", ["tests.servers.short_load_patience"], indirect=True)

BODY = {"inputs": [[1, 2, 3, 4]]}


@pytest.mark.parametrize(
    ("required", "status"),
    [
        ((), (200, "degraded")),
        (("--required-models", "b"), (200, "degraded")),
        (("--required-models", "a,b"), (503, "loading")),
    ],
)
def test_the_next_models_are_loaded_beside_one_that_does_not_end(
    serve: Serve,
    make_chaos: MakeChaos,
    tmp_path: Path,
    required: tuple[str, ...],
    status: tuple[int, str],
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    make_chaos("a", gate=str(gate))
    server = serve(make_chaos("b"), *required, wait=False)
    server.wait_for(r"^b/1 is ready")
    server.wait_for(r"2 models$")
    assert server.post("/predict/b", json=BODY).status_code == 200
    refused = server.post("/predict/a", json=BODY)
    assert (refused.status_code, refused.json()["code"]) == (503, "not_ready")
    loading = server.get("/models/a/1").json()
    assert loading["state"] == "loading"
    assert loading["load_ms"] > 1000 * PATIENCE_S
    assert server.get("/models/a/1").json()["load_ms"] > loading["load_ms"]
    health = server.get("/health")
    assert health.json()["problems"].keys() == {"a/1"}
    assert health.json()["problems"]["a/1"].startswith("loading for ")
    assert (health.status_code, health.json()["status"]) == status
    gate.write_text("open")
    server.wait_for(r"^a/1 is ready")
    server.wait_for(r"^ok: 2 models$")
    assert server.post("/predict/a", json=BODY).status_code == 200
    assert server.get("/models/a/1").json()["load_ms"] > loading["load_ms"]
    assert server.get("/health").json() == {"status": "ok", "ready": True, "problems": {}}


def test_a_server_whose_load_does_not_end_ends(serve: Serve, make_chaos: MakeChaos, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    server = serve(make_chaos("a", gate=str(gate)), wait=False)
    server.wait_for(r"^a/1: loading for")
    assert server.stop() == 0


def test_a_load_that_takes_too_long_has_failed_with_the_reason(
    serve: Serve, make_chaos: MakeChaos, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    make_chaos("a", gate=str(gate))
    server = serve(make_chaos("b"), "--load-timeout-s", "0.5")
    assert server.post("/predict/b", json=BODY).status_code == 200
    wait_until(lambda: server.get("/models/a/1").json()["state"] == "failed", "a has failed")
    reason = "loading takes longer than 0.5 s; --load-timeout-s allows more"
    assert server.get("/models/a/1").json()["reason"] == reason
    health = server.get("/health")
    assert (health.status_code, health.json()["problems"]) == (200, {"a/1": reason})
    # A late result changes nothing.
    gate.write_text("open")
    server.wait_for(r"^a/1 is loaded, too late")
    assert server.get("/models/a/1").json()["reason"] == reason
    assert server.post("/predict/a", json=BODY).status_code == 503
    assert server.stop() == 0
