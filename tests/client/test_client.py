"""Both clients with a real server: what users send, and what they get."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import UnixStreamServer
from typing import Any, ClassVar

import inferpool
import numpy as np
import pytest
from inferpool import AsyncClient, Client, errors
from inferpool.client import ServerUnreachable
from inferpool.tensors import Array
from PIL import Image

from tests.certificates import Authority
from tests.http.access.keys import KeyFile
from tests.onnx_models import write_identity
from tests.server import Server, free_port
from tests.text_models import write_encoder

PATIENT = np.array([[59, 2, 32.1, 101, 157, 93.2, 38, 4, 4.8598, 87]])
COLUMNS = ["age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    for name in ("digits", "diabetes"):
        shutil.copytree(models / name, folder / name)
    write_encoder(folder, "encoder")
    write_identity(folder, "echo", ["FP32", "INT64", "BYTES", "BOOL", "FP16"])
    return folder


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyFile:
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys")
    file.add("all", "predict", "read")
    file.add("predict", "predict")
    return file


@pytest.fixture(scope="module")
def server(repository: Path, keys: KeyFile, cache_dir: Path) -> Iterator[Server]:
    flags = ("--keys-file", str(keys.path), "--measure-ms", "20")
    server = Server(repository, flags, {"INFERPOOL_CACHE_DIR": str(cache_dir)})
    server.wait_loaded()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def client(server: Server, keys: KeyFile) -> Iterator[Client]:
    with Client(server.url, key=keys.keys["all"]) as client:
        yield client


def in_an_event_loop(server: Server, keys: KeyFile, use: Callable[[AsyncClient], Any]) -> Any:
    async def run() -> Any:
        async with AsyncClient(server.url, key=keys.keys["all"]) as client:
            return await use(client)

    return asyncio.run(run())


def test_arrays_of_every_kind_come_back_as_they_were(client: Client) -> None:
    specs = client.metadata("echo").inputs
    made: dict[str, Array] = {
        "FP32": np.array([[1.5, np.nan]], np.float32), "INT64": np.array([[2**62, -1]]),
        "BYTES": np.array([["Bern", "é\0"]], object), "BOOL": np.array([[True, False]]),
        "FP16": np.array([[0.5, 65504]], np.float16),
    }  # fmt: skip
    sent = {spec.name: made[spec.datatype] for spec in specs}
    got = client.predict("echo", sent)
    assert got.model == "echo"
    assert got.version == "1"
    for (name, expected), output in zip(sent.items(), got.outputs.values(), strict=True):
        np.testing.assert_array_equal(output, expected, name)
        assert output.dtype == expected.dtype


def test_one_array_needs_no_name_and_may_be_a_list(client: Client) -> None:
    got = client.predict("diabetes", PATIENT.tolist(), request_id="mine")
    assert got.array.shape == (1, 1)
    assert got.request_id == "mine"
    assert got.timing_ms.keys() == {"queue", "compute", "total"}
    named = client.predict("diabetes", {"features": PATIENT}, outputs=["progression"])
    np.testing.assert_array_equal(got["progression"], named["progression"])
    assert client.predict("diabetes", PATIENT[:0]).array.shape == (0, 1)


def test_a_data_frame_is_a_table(client: Client) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(PATIENT, columns=COLUMNS)
    expected = client.predict("diabetes", PATIENT).array
    np.testing.assert_array_equal(client.predict("diabetes", frame).array, expected)


def test_pictures_come_as_paths_as_bytes_and_from_pillow(client: Client, models: Path) -> None:
    path = models / "digits" / "samples" / "7.png"
    expected = client.predict("digits", path, labels=True)
    assert expected.labels is not None
    assert expected.labels[0][0]["label"] == "7"
    with Image.open(path) as image:
        for picture in (path.read_bytes(), image):
            found = client.predict("digits", picture)["logits"]
            np.testing.assert_allclose(found, expected["logits"], rtol=1e-6)


def test_sentences_become_rows(client: Client) -> None:
    one = client.predict("encoder", "w1 w2")["pooled"]
    many = client.predict("encoder", ["w1 w2", "w3 w4"])["pooled"]
    assert len(one) == 1
    np.testing.assert_allclose(many[:1], one, rtol=1e-5)


def test_a_large_array_is_cut_into_requests_and_joined_in_order(
    client: Client, server: Server, keys: KeyFile
) -> None:
    rows = np.repeat(PATIENT, 500, axis=0)
    rows[:, 0] = np.arange(500)
    together = client.predict("diabetes", rows).array
    cut = client.predict_many("diabetes", rows, rows_per_request=64, concurrency=3)
    np.testing.assert_allclose(cut.array, together, rtol=1e-5)
    found = in_an_event_loop(server, keys, lambda c: c.predict_many("diabetes", rows, rows_per_request=64))
    np.testing.assert_allclose(found.array, together, rtol=1e-5)
    with pytest.raises(errors.InvalidInput):
        client.predict_many("diabetes", rows[:, :3], rows_per_request=64)
    with pytest.raises(errors.InvalidInput):
        in_an_event_loop(server, keys, lambda c: c.predict_many("diabetes", rows[:, :3]))


def test_a_bar_shows_the_progress(client: Client, capfd: pytest.CaptureFixture[str]) -> None:
    client.predict_many("diabetes", np.repeat(PATIENT, 10, axis=0), progress=True)
    assert "10/10" in capfd.readouterr().err


def test_both_clients_ask_what_is_served(client: Client, server: Server, keys: KeyFile) -> None:
    names = ["diabetes", "digits", "echo", "encoder"]
    assert [model["name"] for model in client.models()] == names
    assert client.ready()
    assert client.ready("digits")
    with pytest.raises(errors.ModelNotFound):
        client.ready("nobody")

    async def ask(client: AsyncClient) -> None:
        assert [model["name"] for model in await client.models()] == names
        assert await client.ready("digits")
        assert (await client.metadata("digits")).name == "digits"
        assert (await client.predict("diabetes", np.repeat(PATIENT, 4000, axis=0))).array.shape == (4000, 1)

    in_an_event_loop(server, keys, ask)


def test_an_error_has_what_the_server_says(client: Client) -> None:
    with pytest.raises(errors.InvalidInput, match=r"tensor \"features\" has shape \[1, 3\]"):
        client.predict("diabetes", PATIENT[:, :3])
    with pytest.raises(errors.ModelNotFound) as raised:
        client.predict("nobody", PATIENT, request_id="lost")
    assert (raised.value.status, raised.value.code, raised.value.request_id) == (
        404,
        "model_not_found",
        "lost",
    )


def test_the_deadline_reaches_the_server(client: Client) -> None:
    client.predict("diabetes", PATIENT)
    with pytest.raises(errors.DeadlineExceeded) as raised:
        client.predict("diabetes", PATIENT, timeout_s=0.0001)
    assert raised.value.status in (504, None)


def test_keys(server: Server, keys: KeyFile) -> None:
    with Client(server.url, key=keys.keys["predict"]) as narrow:
        assert narrow.predict("diabetes", PATIENT)["progression"].shape == (1, 1)
        assert narrow.predict("diabetes", {"features": PATIENT}, labels=True)["progression"].shape == (1, 1)
        with pytest.raises(errors.Forbidden):
            narrow.models()
    with Client(server.url) as nobody, pytest.raises(errors.Unauthorized):
        nobody.predict("diabetes", PATIENT)
    with pytest.raises(ValueError, match="characters that no header"):
        Client(server.url, key="a\r\nx: y")


class Unreliable(BaseHTTPRequestHandler):
    """Answers 503 first, then closes the connection, then answers."""

    protocol_version = "HTTP/1.1"
    told: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.told.append(self.headers["x-timeout-ms"])
        if len(self.told) == 2:
            self.close_connection = True
            return
        body = b'{"models": []}' if len(self.told) > 2 else b'{"code": "draining", "detail": "d"}'
        self.send_response(200 if len(self.told) > 2 else 503)
        self.send_header("content-length", str(len(body)))
        self.send_header("retry-after", "0")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class QuietServer(HTTPServer):
    """Says nothing of a handshake that fails, as it should here."""

    def handle_error(self, *_: object) -> None:
        pass


@pytest.fixture
def listening() -> Iterator[Callable[[Any], None]]:
    """Let servers answer, each in a thread of its own."""
    started: list[tuple[Any, threading.Thread]] = []

    def start(server: Any) -> None:
        Unreliable.told.clear()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        started.append((server, thread))

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("unix", [False, True])
def test_a_server_that_comes_back_is_asked_again(
    unix: bool, tmp_path: Path, listening: Callable[[Any], None]
) -> None:
    path = str(tmp_path / "socket")
    server: Any = UnixStreamServer(path, Unreliable) if unix else HTTPServer(("127.0.0.1", 0), Unreliable)
    listening(server)
    with Client(f"unix:{path}" if unix else f"http://127.0.0.1:{server.server_port}") as client:
        assert client.models() == []
    assert len(Unreliable.told) == 3
    assert [*map(float, Unreliable.told)] == sorted(map(float, Unreliable.told), reverse=True)


def test_tls_with_an_authority_of_ones_own(tmp_path: Path, listening: Callable[[Any], None]) -> None:
    authority = Authority(tmp_path)
    certificate, private = tmp_path / "tls.crt", tmp_path / "tls.key"
    authority.issue(certificate, private)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authority.file))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(certificate, private)
    server = QuietServer(("127.0.0.1", 0), Unreliable)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    listening(server)
    url = f"https://localhost:{server.server_port}"
    with Client(url, ca=authority.file, certificate=(certificate, private)) as client:
        assert client.models() == []
    with Client(url, retries=0) as stranger, pytest.raises(ServerUnreachable, match="verify failed"):
        stranger.models()


def test_nobody_listens() -> None:
    with Client(f"http://127.0.0.1:{free_port()}", retries=0) as client:
        assert not client.ready()
        with pytest.raises(ServerUnreachable):
            client.models()


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://user:password@host"])
def test_a_wrong_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is no address"):
        Client(url)


def test_the_package_stays_light_without_the_client() -> None:
    code = "import sys, inferpool; print(*{'httpx', 'numpy', 'asyncio', 'ssl'} & sys.modules.keys())"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "\n"
    )
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = vars(inferpool)["__getattr__"]("Nothing")
