"""Samples and drift through a real server of two web processes: what is kept, who may read it, what fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from inferpool.drift.build import ProfileBuilder
from inferpool.drift.profile_file import PROFILE_FILE, profile_bytes
from inferpool.engine.lent_bodies import LEAST_LENT_BYTES
from inferpool.evaluate_command.labelled_rows import read_labelled
from inferpool.http.predict.observations import Observations
from inferpool.http.predict.predictor import MOST_REFERRED_BYTES
from inferpool.observe.metrics import Metrics
from inferpool.privacy.keys import SampleKeys, add_key
from inferpool.privacy.sample import Sample
from inferpool.privacy.store import FILE, FOLDER, SampleStore, StoreLimits
from inferpool.wire.npy import encode_npy

from tests.conftest import Serve
from tests.observe.prometheus import Prometheus, needs_prometheus
from tests.onnx_models import write_shift
from tests.server import START_S, Server, wait_until

KEPT = """\
[samples]
share = 1.0
fields = {"x" = "keep", "y[0]" = {round = 1000}}
[drift]
window_s = 5
requests_per_s = 10000
series = ["inputs.x[0]"]
"""
PROCESS = ("--engine", "process", "--web-processes", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("observed")


@pytest.fixture(scope="module")
def server(folder: Path, module_serve: Serve) -> Server:
    """A server of one model that keeps samples and has a profile, and of one that does not."""
    write_shift(folder / "models", "kept", 1, 100.0)
    write_shift(folder / "models", "other", 1, 100.0)
    (folder / "models" / "kept" / "model.toml").write_text(KEPT)
    builder = ProfileBuilder()
    numbers = np.random.default_rng(0).normal(size=4000)
    builder.add({"inputs.x[0]": numbers, "outputs.y[0]": numbers + 100}, len(numbers))
    (folder / "models" / "kept" / "1" / PROFILE_FILE).write_bytes(
        profile_bytes(builder.profile("made up")[0])
    )
    builder.close()
    add_key(folder / "keys", "first")
    flags = ("--samples-dir", str(folder / "store"), "--samples-keys-file", str(folder / "keys"))
    return module_serve(folder / "models", *PROCESS, *flags, "--admin-socket", str(folder / "admin"))


@pytest.fixture(scope="module")
def admin(server: Server, folder: Path) -> Iterator[httpx.Client]:
    with httpx.Client(
        transport=httpx.HTTPTransport(uds=str(folder / "admin")), base_url="http://x"
    ) as client:
        yield client


def predict(server: Server, model: str, rows: list[float], request_id: str) -> None:
    inputs = {"inputs": {"x": [[number, 5.0] for number in rows]}}
    answer = server.post(f"/predict/{model}", json=inputs, headers={"x-request-id": request_id})
    assert answer.status_code == 200, answer.text


def kept_ids(admin: httpx.Client) -> list[str]:
    return [each["id"] for each in admin.get("/samples").json()["samples"]]


def test_named_fields_of_one_model_are_kept_exported_and_deleted(
    server: Server, folder: Path, admin: httpx.Client
) -> None:
    hostile = "../../etc/passwd;'--%00"
    for number in range(6):
        predict(server, "kept", [1.5, 2.5], f"visit-{number}")
        predict(server, "other", [1.5], f"other-{number}")
    predict(server, "kept", [7.0], hostile)
    wait_until(lambda: len(kept_ids(admin)) == 7, "the samples of both processes are written")
    assert sorted(kept_ids(admin)) == sorted([*(f"visit-{number}" for number in range(6)), hostile])
    [found] = admin.get("/samples", params={"id": "visit-3", "rows": True}).json()["samples"]
    assert found["inputs"] == [{"name": "x", "values": [[1.5, 5.0], [2.5, 5.0]]}]
    assert found["outputs"] == [{"name": "y[0]", "values": [0.0, 0.0]}], "rounded"
    for method in ("GET", "DELETE"):
        assert server.request(method, "/samples?model=kept").status_code == 403
    environ = {**os.environ, "INFERPOOL_URL": f"unix:{folder / 'admin'}"}
    command = [sys.executable, "-m", "inferpool", "samples", "export", "--model", "kept", "--target", "y[0]"]
    subprocess.run([*command, str(folder / "kept.csv")], env=environ, check=True, capture_output=True)
    rows = read_labelled(folder / "kept.csv", None)
    assert rows.inputs.column_names == ["x[0]", "x[1]"]
    assert sorted(rows.inputs.column(0).to_pylist()) == [1.5] * 6 + [2.5] * 6 + [7.0]
    assert rows.targets == [0.0] * 13
    assert admin.delete("/samples").status_code == 422
    assert admin.delete("/samples", params={"id": hostile}).json() == {"deleted": 1}
    assert admin.delete("/samples", params={"model": "kept"}).json() == {"deleted": 6}
    assert kept_ids(admin) == []
    log = "\n".join(line["message"] for line in server.log)
    assert "audit: delete samples by id: 1 samples" in log
    assert "etc/passwd" not in log
    assert (folder / "keys").read_text().split()[1] not in log


def test_a_deletion_holds_for_a_request_that_was_answered_just_before(
    server: Server, admin: httpx.Client
) -> None:
    """Its sample waits in one of the web processes, which need not be the one that deletes."""

    def outcomes() -> float:
        return server.metric("samples_total")

    before, deleted = outcomes(), 0
    for number in range(4):
        predict(server, "kept", [1.0], f"gone-{number}")
        deleted += admin.delete("/samples", params={"id": f"gone-{number}"}).json()["deleted"]
    predict(server, "kept", [1.0], "gone-0")
    wait_until(lambda: outcomes() == before + 5, "all that waited is done with")
    assert kept_ids(admin) == ["gone-0"], "the one after the deletion"
    assert deleted + server.metric("samples_total", outcome="deleted") == 4
    assert admin.delete("/samples", params={"model": "kept"}).json() == {"deleted": 1}


def test_rows_of_a_large_request_are_kept_although_its_memory_is_used_again(
    server: Server, admin: httpx.Client
) -> None:
    """A large binary body lies in memory that an engine shares."""
    assert MOST_REFERRED_BYTES < LEAST_LENT_BYTES
    headers = {"content-type": "application/x-npy", "accept": "application/x-npy"}
    rows = np.arange(LEAST_LENT_BYTES // 2, dtype=np.float32).reshape(-1, 2)
    for number in range(4):
        own = {**headers, "x-request-id": f"large-{number}"}
        assert server.post("/predict/kept", content=encode_npy(rows + number), headers=own).status_code == 200
    wait_until(lambda: len(kept_ids(admin)) == 4, "the samples are written")
    for number in range(4):
        [found] = admin.get("/samples", params={"id": f"large-{number}", "rows": "true"}).json()["samples"]
        assert found["inputs"] == [{"name": "x", "values": (rows[:64] + number).tolist()}]
    assert admin.delete("/samples", params={"model": "kept"}).json() == {"deleted": 4}


def test_samples_grow_too_old_although_no_version_keeps_any(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferpool.http.predict.observations.TICK_S", 0.01)
    keys = SampleKeys({"a": bytes(32)})
    store = SampleStore(folder / "aged", keys, StoreLimits(10, 2**20, 60.0))
    one = {"x": np.ones((1, 1))}
    store.add([store.seal(Sample("old", "", "gone", 1, time.time() - 61, 1, one, {}))])
    assert store.totals().held == 1
    observations = Observations(Metrics({}), store, keys)
    wait_until(lambda: not store.totals().held, "the sample is deleted")
    observations.close()


def test_drift_is_told_by_models_and_metrics_with_all_processes_together(server: Server) -> None:
    # So many that one of two windows has enough rows, if a window ends meanwhile.
    for number in range(16):
        predict(server, "kept", [3.0 + number / 10] * 60, f"drift-{number}")

    def fields() -> list[dict]:
        return server.get("/models/kept").json()["versions"][0]["drift"]["fields"]

    wait_until(lambda: len(fields()) == 2, "a window with enough rows has ended")
    [field] = [each for each in fields() if each["field"] == "inputs.x[0]"]
    assert field["psi"] > 1
    assert 0.8 < field["ks"] <= 1
    assert server.metric("drift_distance_largest", model="kept", measure="psi") > 1
    assert server.metric("drift_distance", model="kept", field="inputs.x[0]", measure="ks") > 0.8
    assert server.get("/models/other").json()["versions"][0]["drift"] is None
    assert server.metric("drift_distance", model="other") == 0


def damage_store(folder: Path) -> None:
    """A database that is no database stands for every failure of a disk."""
    store = folder / "store" / FOLDER
    for file in store.iterdir():
        file.unlink()
    (store / FILE).write_bytes(os.urandom(8192))


def test_requests_are_answered_while_the_store_fails(server: Server, folder: Path) -> None:
    damage_store(folder)
    predict(server, "kept", [1.0], "lost")
    wait_until(lambda: server.metric("samples_stopped") == 1, "the failure is told")
    predict(server, "kept", [1.0], "answered")
    assert server.get("/health/ready").status_code == 200


@needs_prometheus
def test_drift_and_a_store_that_fails_have_their_alerts(server: Server, folder: Path, tmp_path: Path) -> None:
    damage_store(folder)
    sent = 0

    def fires() -> bool:
        nonlocal sent
        sent += 1
        predict(server, "kept", [3.0] * 60, f"far-{sent}")
        return prometheus.has('ALERTS{alertname="InferpoolDrift",alertstate="firing",model="kept"}')

    with Prometheus(tmp_path, f"127.0.0.1:{server.port}") as prometheus:
        prometheus.wait(fires, "the alert about drift fires", START_S)
        prometheus.wait_for_alert("InferpoolDrift", model="kept", version="1")
        prometheus.wait_for_alert("InferpoolSamplesStopped")
        assert not prometheus.has('ALERTS{model="other"}')
