"""Models that change while the server serves, through the real door and in both places of engines."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients import Client, Reply
from tests.conftest import Serve
from tests.onnx_models import write_shift
from tests.server import Server, wait_until

with warnings.catch_warnings(action="ignore"):
    import tritonclient.http as triton
    from tritonclient.utils import InferenceServerException

ON = ("--admin-routes", "on", "--keep-warm-s", "0.2")


@pytest.fixture(scope="module", params=["in-process", "process"])
def folder_and_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, module_serve: Serve
) -> tuple[Path, Server]:
    """A server of three models with one version, in both modes. Each test uses a model of its own."""
    folder = tmp_path_factory.mktemp("changes")
    write_shift(folder, "first", 1, 1.0)
    (folder / "corrupt" / "1").mkdir(parents=True)
    (folder / "corrupt" / "1" / "model.onnx").write_bytes(b"no model")
    (folder / "empty" / "1").mkdir(parents=True)
    return folder, module_serve(folder, *ON, "--engine", request.param)


@pytest.fixture
def folder(folder_and_server: tuple[Path, Server]) -> Path:
    return folder_and_server[0]


@pytest.fixture
def server(folder_and_server: tuple[Path, Server]) -> Server:
    return folder_and_server[1]


def predict(server: Server, model: str, version: str = "") -> tuple[int, Any]:
    path = f"/predict/{model}/{version}" if version else f"/predict/{model}"
    reply = server.post(path, json={"inputs": [[1.0, 2.0]]})
    return reply.status_code, reply.json()


def load(server: Server, model: str, version: int | None = None) -> dict[str, Any]:
    """Load, and wait for the end of the job."""
    return ended(server, server.post(f"/models/{model}/load", json={"version": version}))


def ended(server: Server, reply: httpx.Response) -> dict[str, Any]:
    assert reply.status_code == 202, reply.text
    job: dict[str, Any] = reply.json()
    assert reply.headers["location"] == f"/jobs/{job['id']}"

    def is_over() -> bool:
        job.update(server.get(f"/jobs/{job['id']}").json())
        return job["state"] != "running"

    wait_until(is_over, "the job ends")
    return job


def state(server: Server, model: str, version: int) -> str:
    reply = server.get(f"/models/{model}/{version}")
    return str(reply.json()["state"]) if reply.status_code == 200 else "absent"


def test_a_server_whose_models_do_not_change_reports_them_once(server: Server) -> None:
    """The first test of this server."""
    assert load(server, "first")["state"] == "done"
    lines = [line["message"] for line in server.log if line["message"].endswith("3 models")]
    assert 1 <= len(lines) <= 2


def test_a_hangup_has_the_folder_looked_at(server: Server, folder: Path) -> None:
    write_shift(folder, "first", 2, 2.0)
    write_shift(folder, "second", 1, 3.0)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: predict(server, "first")[1]["version"] == "2", "the new version answers")
    assert predict(server, "first")[1]["outputs"]["y"] == [[3.0, 4.0]]
    wait_until(lambda: predict(server, "second")[0] == 200, "the new model answers")
    assert predict(server, "second")[1]["outputs"]["y"] == [[4.0, 5.0]]


def test_a_new_version_is_loaded_and_takes_over(server: Server, folder: Path) -> None:
    write_shift(folder, "takeover", 1, 1.0)
    assert load(server, "takeover")["state"] == "done"
    assert predict(server, "takeover")[1]["version"] == "1"
    write_shift(folder, "takeover", 2, 2.0)
    job = load(server, "takeover", 2)
    assert (job["state"], job["versions"], job["share"]) == ("done", [2], 1.0)
    answer = predict(server, "takeover")[1]
    assert (answer["version"], answer["outputs"]["y"]) == ("2", [[3.0, 4.0]])
    assert predict(server, "takeover", "1")[1]["outputs"]["y"] == [[2.0, 3.0]]


def test_the_same_version_with_other_files_is_exchanged(server: Server, folder: Path) -> None:
    """Also if they have the same size and time, as files of a reproducible archive have."""
    file = write_shift(folder, "exchange", 1, 1.0) / "model.onnx"
    os.utime(file, (0, 0))
    load(server, "exchange")
    size = file.stat().st_size
    write_shift(folder, "exchange", 1, 5.0)
    os.utime(file, (0, 0))
    assert file.stat().st_size == size
    load(server, "exchange")
    assert predict(server, "exchange")[1]["outputs"]["y"] == [[6.0, 7.0]]


def test_a_version_is_unloaded_and_loaded_again(server: Server, folder: Path) -> None:
    write_shift(folder, "back", 1, 1.0)
    load(server, "back")
    job = ended(server, server.post("/models/back/unload"))
    assert job["state"] == "done"
    assert state(server, "back", 1) == "unloaded"
    status, problem = predict(server, "back")
    assert (status, problem["code"]) == (503, "not_ready")
    assert (
        server.get("/health").json()["problems"] == {}
        or "back/1" not in server.get("/health").json()["problems"]
    )
    load(server, "back")
    assert predict(server, "back")[0] == 200


def test_a_load_that_fails_leaves_the_old_version_and_says_why(server: Server, folder: Path) -> None:
    write_shift(folder, "bad", 1, 1.0)
    load(server, "bad")
    (folder / "bad" / "1" / "model.onnx").write_bytes(b"no model")
    job = load(server, "bad", 1)
    assert job["state"] == "failed"
    assert "model.onnx" in job["reason"]
    assert predict(server, "bad")[1]["outputs"]["y"] == [[2.0, 3.0]]
    assert "a newer load has failed" in server.get("/models/bad/1").json()["reason"]
    write_shift(folder, "bad", 1, 3.0)
    assert load(server, "bad", 1)["state"] == "done"
    assert predict(server, "bad")[1]["outputs"]["y"] == [[4.0, 5.0]]


def test_what_is_not_there_is_not_found(server: Server) -> None:
    for path, code in (
        ("/models/nothing/load", "model_not_found"),
        ("/models/nothing/unload", "model_not_found"),
        ("/models/nothing/rollback", "model_not_found"),
    ):
        reply = server.post(path)
        assert (reply.status_code, reply.json()["code"]) == (404, code)
    reply = server.post("/models/first/load", json={"version": 9})
    assert (reply.status_code, reply.json()["code"]) == (404, "version_not_found")
    assert server.get("/jobs/none").status_code == 404


def test_a_body_is_json_whatever_curl_calls_it(server: Server) -> None:
    path = "/models/first/labels/curl"
    for kind in ("application/x-www-form-urlencoded", ""):
        reply = server.request("PUT", path, content=b'{"version": 1}', headers={"content-type": kind})
        assert reply.status_code == 200, reply.text
    assert server.request("DELETE", path).status_code == 200
    server.wait_for(r"audit: remove label first/curl: done")
    assert not [line["message"] for line in server.log if "Warning" in line["message"]]


@pytest.mark.parametrize(
    ("content", "kind", "code", "said"),
    [
        (b'{"version": 1}', "text/plain", "unsupported_media_type", "Content-Type: application/json"),
        (b'{"version"', "application/json", "malformed_body", "not JSON"),
        (b"\x1f\x8b", "application/json", "malformed_body", "not JSON"),
        (b"", "application/json", "malformed_body", "empty"),
        (b"[]", "application/json", "malformed_body", "a list"),
        (b'{"version": "1"}', "application/json", "invalid_input", r"\"version\" is \"1\""),
    ],
)
def test_a_wrong_body_is_refused_with_its_fault(
    server: Server, content: bytes, kind: str, code: str, said: str
) -> None:
    reply = server.request("PUT", "/models/first/labels/x", content=content, headers={"content-type": kind})
    assert reply.json()["code"] == code
    assert said in reply.text


def test_a_refused_method_is_told_every_method_of_the_path(server: Server) -> None:
    for path, methods in (
        ("/models/first/traffic", "DELETE, GET, HEAD, PUT"),
        ("/models/first/labels/x", "DELETE, PUT"),
        ("/jobs/x", "DELETE, GET, HEAD"),
    ):
        assert server.request("PATCH", path).headers["allow"] == methods


def test_a_label_moves_only_to_a_version_that_is_ready(server: Server, folder: Path) -> None:
    for version in (1, 2):
        write_shift(folder, "labelled", version, float(version))
    load(server, "labelled")
    url = f"{server.url}/models/labelled/labels/canary"
    assert httpx.put(url, json={"version": 1}).json()["kept"] is True
    assert predict(server, "labelled", "canary")[1]["version"] == "1"
    assert httpx.put(url, json={"version": 2}).status_code == 200
    assert predict(server, "labelled", "canary")[1]["version"] == "2"
    assert httpx.put(url, json={"version": 3}).status_code == 404
    ended(server, server.post("/models/labelled/unload", json={"version": 1}))
    reply = httpx.put(url, json={"version": 1})
    assert (reply.status_code, reply.json()["code"]) == (409, "conflict")
    assert predict(server, "labelled", "canary")[1]["version"] == "2"
    refused = httpx.put(f"{server.url}/models/labelled/labels/load", json={"version": 2})
    assert (refused.status_code, refused.json()["field"]) == (422, "label")
    assert httpx.delete(url).status_code == 200
    assert predict(server, "labelled", "canary")[0] == 404


def test_a_label_whose_version_is_deleted_is_a_problem_until_it_is_moved(
    server: Server, folder: Path
) -> None:
    for version in (1, 2):
        write_shift(folder, "stale", version, float(version))
    load(server, "stale")
    labels = "/models/stale/labels/stable"
    assert server.request("PUT", labels, json={"version": 1}).status_code == 200
    shutil.rmtree(folder / "stale" / "1")
    load(server, "stale")
    said = (
        '"stable" names version 1, which is not served; move the label to another version, or remove it'
        " (served: 2)"
    )
    wait_until(lambda: server.get("/health").json()["problems"].get("stale") == said, "health says so")
    assert server.get("/models/stale").json()["labels"] == {}
    assert server.request("PUT", labels, json={"version": 2}).status_code == 200
    assert "stale" not in server.get("/health").json()["problems"]


def test_a_rollback_takes_less_than_a_second(server: Server, folder: Path) -> None:
    write_shift(folder, "rolled", 1, 1.0)
    load(server, "rolled")
    write_shift(folder, "rolled", 2, 2.0)
    load(server, "rolled")
    for _ in range(5):  # other programs may have the cores meanwhile
        assert predict(server, "rolled")[1]["version"] == "2"
        began = time.monotonic()
        reply = server.post("/models/rolled/rollback")
        assert reply.json() == {"model": "rolled", "version": 1}
        assert predict(server, "rolled")[1]["version"] == "1"
        took_s = time.monotonic() - began
        if took_s < 1:
            break
        assert httpx.delete(f"{server.url}/models/rolled/labels/stable").status_code == 200
    assert took_s < 1
    assert server.get("/models/rolled").json()["labels"] == {"stable": 1}
    ended(server, server.post("/models/rolled/unload", json={"version": 2}))
    assert server.post("/models/rolled/rollback").status_code == 409


def test_clients_of_triton_load_and_unload(server: Server, folder: Path) -> None:
    write_shift(folder, "triton", 1, 1.0)
    assert server.post("/v2/repository/models/triton/load", json={}).status_code == 200
    assert predict(server, "triton")[0] == 200
    index = {line["name"]: line for line in server.post("/v2/repository/index").json()}
    assert index["triton"]["state"] == "READY"
    assert (
        server.post(
            "/v2/repository/models/triton/unload", json={"parameters": {"unload_dependents": False}}
        ).status_code
        == 200
    )
    ready = server.post("/v2/repository/index", json={"ready": True}).json()
    assert "triton" not in {line["name"] for line in ready}
    index = {line["name"]: line for line in server.post("/v2/repository/index").json()}
    assert index["triton"]["state"] == "UNAVAILABLE"
    for act in ("load", "unload"):
        reply = server.post(f"/v2/repository/models/triton/{act}", json={"parameters": 5})
        assert (reply.status_code, reply.json()["code"]) == (422, "invalid_input")
    reply = server.post("/v2/repository/models/nothing/load")
    assert (reply.status_code, "nothing" in reply.json()["error"]) == (404, True)
    (folder / "broken" / "1").mkdir(parents=True)
    (folder / "broken" / "1" / "model.onnx").write_bytes(b"no model")
    reply = server.post("/v2/repository/models/broken/load")
    assert reply.status_code == 400
    assert "model.onnx" in reply.json()["error"]


def test_every_act_leaves_a_line(server: Server, folder: Path) -> None:
    write_shift(folder, "audited", 1, 1.0)
    load(server, "audited", 1)
    server.wait_for(r"audit: load audited/1: job [0-9a-f]+$")
    server.post("/models/audited/rollback")
    server.wait_for(r"audit: rollback audited: refused: .*no version from before the present one is ready")


def test_loads_are_counted_by_how_they_end(server: Server, folder: Path) -> None:
    write_shift(folder, "counted", 1, 1.0)
    load(server, "counted")
    (folder / "counted" / "2").mkdir()
    (folder / "counted" / "2" / "model.onnx").write_bytes(b"no model")
    load(server, "counted", 2)

    def counted_once(version: str, outcome: str, ends: str) -> bool:
        """Whether each load that the log has is counted once.

        On a busy machine a version may be measured again, which is a load of its own.
        """
        logged = sum(line["message"].startswith(f"counted/{version} {ends}") for line in server.log)
        metric = server.metric("loads_total", model="counted", version=version, outcome=outcome)
        return 1 <= logged == metric

    wait_until(lambda: counted_once("1", "ready", "is ready"), "each load that succeeds is counted once")
    wait_until(lambda: counted_once("2", "failed", "has failed"), "each load that fails is counted once")
    assert server.metric("loads_total", model="counted", version="1", outcome="failed") == 0
    assert server.metric("loads_total", model="counted", version="2", outcome="ready") == 0


@pytest.mark.parametrize("kind", ["switch", "label"])
def test_a_request_whose_version_goes_while_it_arrives_is_answered_by_the_next(
    server: Server, folder: Path, kind: str
) -> None:
    model = f"slow-{kind}"
    write_shift(folder, model, 1, 1.0)
    load(server, model)
    url = f"{server.url}/models/{model}/labels/live"
    if kind == "label":
        assert httpx.put(url, json={"version": 1}).status_code == 200
    body = b'{"inputs": [[1.0, 2.0]]}'

    async def ask() -> Reply:
        client = await Client.connect(server.port)
        client.send_part(f"/predict/{model}" + "/live" * (kind == "label"), body, {}, 5)
        await asyncio.to_thread(switch)
        client.send_rest(body[5:])
        reply = await client.receive()
        await client.close()
        return reply

    def switch() -> None:
        # The request is there: the version that it names was looked up when its head came.
        server.wait_for_metric("in_flight_requests", 1)
        write_shift(folder, model, 2, 2.0)
        load(server, model)
        if kind == "label":
            assert httpx.put(url, json={"version": 2}).status_code == 200
        assert ended(server, server.post(f"/models/{model}/unload", json={"version": 1}))["state"] == "done"

    reply = asyncio.run(ask())
    assert (reply.status, json.loads(reply.body)["version"]) == (200, "2"), reply.body
    assert json.loads(reply.body)["outputs"]["y"] == [[3.0, 4.0]]


def test_the_client_of_triton_loads_lists_and_unloads(server: Server, folder: Path) -> None:
    write_shift(folder, "client", 1, 1.0)
    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    try:
        client.load_model("client")
        assert client.is_model_ready("client")
        states = {line["name"]: line["state"] for line in client.get_model_repository_index()}
        assert states["client"] == "READY"
        client.unload_model("client")
        assert not client.is_model_ready("client")
        with pytest.raises(InferenceServerException, match="no model is called"):
            client.load_model("nothing")
        with pytest.raises(InferenceServerException, match="change the models folder instead"):
            client.load_model("client", config="{}")
        client.load_model("client")
        assert client.is_model_ready("client")
    finally:
        client.close()
