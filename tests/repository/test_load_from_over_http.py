"""`POST /models/M/load` with a source: the version is fetched, lands by a rename, and is loaded."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from inferpool.admin_commands import run_admin_command

from tests.conftest import Serve
from tests.onnx_models import write_shift
from tests.repository.stores.archives import files_below, tar_of
from tests.repository.stores.web_server import WebServer, web_server
from tests.server import Server, free_port, wait_until

FLAGS = ("--admin-routes", "on", "--watch", "--measure-ms", "0")


@pytest.fixture(scope="module")
def web() -> Iterator[WebServer]:
    with web_server() as server:
        yield server


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this machine from which versions may be loaded."""
    return tmp_path_factory.mktemp("new")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_shift(folder, "m", 1, 1.0)
    return folder


@pytest.fixture(scope="module")
def server(module_serve: Serve, web: WebServer, new: Path, folder: Path) -> Server:
    allowed = f"http://{web.address}/models/,{new}"
    return module_serve(folder, *FLAGS, "--engine", "process", "--load-from", allowed)


def load(server: Server, model: str, **body: Any) -> httpx.Response:
    return server.post(f"/models/{model}/load", json=body)


def ended(server: Server, job: dict[str, Any]) -> dict[str, Any]:
    """The job, when it has ended."""
    found: dict[str, Any] = {}

    def is_over() -> bool:
        found.update(server.get(f"/jobs/{job['id']}").json())
        return bool(found["state"] != "running")

    wait_until(is_over, "the job ends")
    return found


def answer(server: Server, model: str) -> tuple[str, float]:
    reply = server.post(f"/predict/{model}", json={"inputs": [[1.0, 2.0]]}).json()
    return reply["version"], reply["outputs"]["y"][0][0]


def test_a_version_comes_from_a_web_server_shows_how_far_it_is_and_is_one_job(
    server: Server, web: WebServer, folder: Path, tmp_path: Path
) -> None:
    write_shift(tmp_path, "m", 2, 2.0)
    (tmp_path / "m" / "2" / "more.bin").write_bytes(bytes(200_000))
    web.files["/models/two.tar"] = tar_of(files_below(tmp_path), "w")
    web.ranges = False
    sent, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        sent.set()
        assert go_on.wait(30)

    web.on_get = wait
    source = f"http://{web.address}/models/two.tar"
    job = load(server, "m", **{"from": source}).json()
    assert (job["state"], job["phase"], job["versions"], job["source"]) == ("running", "fetch", [], source)
    assert load(server, "m", **{"from": source}).json()["id"] == job["id"]
    assert sent.wait(30)
    assert answer(server, "m") == ("1", 2.0)
    web.on_get = lambda: None
    go_on.set()
    assert ended(server, job)["state"] == "done"
    assert server.get(f"/jobs/{job['id']}").json()["versions"] == [2]
    assert answer(server, "m") == ("2", 3.0)
    assert (folder / "m" / "2" / "more.bin").stat().st_size == 200_000
    assert (folder / "m" / "2" / "model.onnx").stat().st_nlink == 1
    assert not list(folder.glob(".inferpool-*"))
    # The same files again are no fault; a version never changes.
    assert ended(server, load(server, "m", **{"from": source}).json())["state"] == "done"
    web.files["/models/two.tar"] = tar_of({"m/2/model.onnx": b"other"}, "w")
    again = ended(server, load(server, "m", **{"from": source}).json())
    assert "a version does not change" in again["reason"]


def test_a_cancelled_fetch_leaves_nothing_and_the_next_one_goes_on(
    server: Server, web: WebServer, folder: Path, tmp_path: Path
) -> None:
    write_shift(tmp_path, "m", 1, 5.0)
    web.files["/models/5/model.onnx"] = (tmp_path / "m" / "1" / "model.onnx").read_bytes()
    sent, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        sent.set()
        go_on.wait(30)

    web.on_get = wait
    body = {"from": f"http://{web.address}/models/5/model.onnx", "version": 5}
    job = load(server, "m", **body).json()
    assert sent.wait(30)
    reply = httpx.delete(f"{server.url}/jobs/{job['id']}")
    assert (reply.status_code, reply.json()["state"]) == (200, "cancelled")
    web.on_get = lambda: None
    go_on.set()
    wait_until(lambda: not list(folder.glob(".inferpool-*")), "nothing is left")
    assert not (folder / "m" / "5").exists()
    assert ended(server, load(server, "m", **body).json())["state"] == "done"
    assert answer(server, "m") == ("5", 6.0)


def test_a_new_model_comes_from_a_folder_with_what_lies_beside_its_versions(
    server: Server, new: Path, folder: Path
) -> None:
    write_shift(new, "fresh", 1, 1.0)
    (new / "fresh" / "model.toml").write_text('description = "new"')
    body = {"from": str(new / "fresh")}
    assert ended(server, load(server, "fresh", **body).json())["state"] == "done"
    assert server.get("/models/fresh").json()["description"] == "new"
    # A version that comes later leaves what the model has beside its versions.
    write_shift(new / "later", "fresh", 7, 7.0)
    (new / "later" / "fresh" / "model.toml").write_text('description = "later"')
    assert ended(server, load(server, "fresh", **{"from": str(new / "later")}).json())["state"] == "done"
    assert server.get("/models/fresh").json()["description"] == "new"
    assert answer(server, "fresh") == ("7", 8.0)
    secret = new / "link" / "1"
    secret.mkdir(parents=True)
    (secret / "model.onnx").symlink_to("/etc/passwd")
    failed = ended(server, load(server, "link", **{"from": str(new / "link")}).json())
    assert "is no plain file" in failed["reason"]


def test_the_command_waits_and_shows_where_the_version_comes_from(
    server: Server, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shift(new / "by-command", "m", 9, 9.0)
    flags = {"url": server.url, "model": "m", "version": None, "no_wait": False}
    assert run_admin_command("load", {**flags, "source": str(new / "by-command")}, {}) == 0
    assert re.search(r"  load    m/9  done$", capsys.readouterr().out.strip())
    assert answer(server, "m") == ("9", 10.0)
    assert run_admin_command("load", {**flags, "source": "/etc"}, {}) == 1
    assert "not below a prefix from which versions may be loaded" in capsys.readouterr().err
    server.wait_for(f"audit: load m from file://{new}/by-command: job")


def test_sources_that_are_not_allowed_are_refused(
    server: Server, web: WebServer, new: Path, folder: Path
) -> None:
    asked = len(web.asked)
    (new / "out").symlink_to("/etc")
    for source in (
        f"http://{web.address}/other/m.onnx",
        f"http://{web.address}/models/../other/m.onnx",
        f"http://{web.address}/models/%2e%2e/other/m.onnx",
        f"http://{web.address}/models%2f..%2fother/m.onnx",
        f"http://localhost:{free_port()}/models/m.onnx",
        "s3://bucket/models", str(new.parent), str(new / ".." / "other"), str(new / "out" / "passwd"),
        f"{new}-beside",
    ):  # fmt: skip
        refused = load(server, "m", **{"from": source})
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden"), source
    for source in (f"http://me:secret@{web.address}/models/m.onnx", "relative/path", "ftp://host/file"):
        refused = load(server, "m", **{"from": source})
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_input"), source
        assert "secret" not in refused.text
    for model in ("..%2Fm2", ".hidden", "x" * 200):
        assert load(server, model, **{"from": str(new / "fresh")}).status_code in (404, 422)
    assert len(web.asked) == asked
    web.replies["/models/away.onnx"] = (302, {"Location": f"http://{web.address}/other/m.onnx"}, b"")
    web.files["/other/m.onnx"] = b"secret"
    failed = ended(server, load(server, "m", **{"from": f"http://{web.address}/models/away.onnx"}).json())
    assert "redirects to 127.0.0.1" in failed["reason"]
    assert all(not each.path.startswith("/other") for each in web.asked)
    assert server.get("/models").status_code == 200
