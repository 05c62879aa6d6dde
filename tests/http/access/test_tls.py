"""HTTPS by real clients: certificates, their renewal, large bodies, and mistakes."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from cryptography import x509
from inferpool.errors import ConfigError, Forbidden, Unauthorized
from inferpool.http.access.caller import METRICS, PREDICT, READ
from inferpool.http.access.certificate_expiry import expiry_of
from inferpool.http.access.client_certificates import CertificateCallers
from inferpool.http.access.gate import Gate
from inferpool.http.access.tls import TlsFiles, make_context
from inferpool.settings import Settings
from pydantic import ValidationError

from tests.certificates import Authority
from tests.chaos import inferpool_chaos as chaos
from tests.conftest import MakeChaos, Serve, chaos_in
from tests.http.access.keys import KeyFile
from tests.http.connection.test_pipelining import Wire, check_host_is_required, request, sums
from tests.http.connection.tls_client import TlsClient
from tests.server import ROOT, Server, wait_until
from tests.servers import few_handshakes

BODY = {"inputs": [[1, 0, 0, 0]]}
LARGE_ROWS = 300_000
RENEWALS = 2
PAUSE_S = 0.01
"""A client's pause between two requests, which leaves the cores to the server."""
ANSWERS = 40
"""Requests that are answered, at least, at each renewal: twice as many as a connection has."""


class Site:
    """A server with TLS, and what its clients need."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder)
        self.certificate, self.key = folder / "tls.crt", folder / "tls.key"
        self.serial = self.authority.issue(self.certificate, self.key)
        self.flags = [
            *("--tls-certificate-file", str(self.certificate), "--tls-key-file", str(self.key)),
            *("--measure-ms", "0"),
        ]
        self.server: Server
        # Made once: it takes longer than a handshake.
        self._context = self.authority.client_context()

    def wire(self, version: ssl.TLSVersion | None = None) -> Wire:
        context = self._context if version is None else self.authority.client_context(version=version)
        return Wire(self.server, context)

    def client(self) -> httpx.Client:
        url = f"https://localhost:{self.server.port}"
        return httpx.Client(base_url=url, verify=self.authority.client_context(), timeout=30)

    def shown_serial(self, context: ssl.SSLContext | None = None) -> int:
        """The serial number of the certificate that the server shows to a new connection."""
        with Wire(self.server, context or self._context) as wire:
            assert isinstance(wire.socket, ssl.SSLSocket)
            shown: Any = wire.socket.getpeercert()
            return int(shown["serialNumber"], 16)

    def shows(self, serial: int) -> bool:
        """Whether all processes of the server show this certificate; each takes its turn."""
        return all(self.shown_serial() == serial for _ in range(4))


def start_site(serve: Serve, folder: Path, *processes: str) -> Site:
    made = Site(folder)
    repository = folder / "repository"
    (repository / "m" / "1").mkdir(parents=True)
    (repository / "m" / "1" / "model.chaos").write_text('{"run_ms": 1}')
    (repository / "m" / "model.toml").write_text(f"[batching]\nmax_rows = {LARGE_ROWS}\n")
    flags = ("--host", "::", "--max-body-bytes", "20000000")
    made.server = serve(repository, *made.flags, *flags, *processes)
    return made


@pytest.fixture(scope="module")
def site(module_serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A server in one process: a web process speaks TLS in the same way."""
    return start_site(module_serve, tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def site_of_processes(module_serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A server with two web processes, each of which reads the files, and an engine."""
    flags = ("--engine", "process", "--web-processes", "2")
    return start_site(module_serve, tmp_path_factory.mktemp("processes"), *flags)


@pytest.fixture(params=["site", "site_of_processes"])
def each_site(request: pytest.FixtureRequest) -> Site:
    """Both, for what their processes do in different ways."""
    site: Site = request.getfixturevalue(request.param)
    return site


@pytest.fixture
def wire(site: Site) -> Iterator[Wire]:
    with site.wire() as made:
        yield made


def rows(count: int) -> bytes:
    buffer = io.BytesIO()
    # The sums are exact, and a compressed body is not much smaller.
    np.save(buffer, np.random.default_rng(1).integers(1, 1024, (count, 4)).astype(np.float32) / 1024)
    return buffer.getvalue()


def test_the_usual_clients_are_answered_by_name_and_by_both_kinds_of_address(site: Site) -> None:
    port = site.server.port
    for host in ("localhost", "127.0.0.1", "[::1]"):
        with httpx.Client(verify=site.authority.client_context(), timeout=30) as client:
            answer = client.post(f"https://{host}:{port}/predict/m", json=BODY)
            assert answer.json()["outputs"]["sum"] == sums(1)
    assert shutil.which("curl") is not None
    run = subprocess.run(
        ["curl", "-gsS", "--cacert", str(site.authority.file), f"https://[::1]:{port}/predict/m",
         "-H", "Content-Type: application/json", "-d", json.dumps(BODY)],
        capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    assert json.loads(run.stdout)["outputs"]["sum"] == sums(1)
    site.server.wait_for("everyone who reaches :: may use every model")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.*deprecated:DeprecationWarning")
def test_tls_1_2_and_1_3_are_spoken_and_nothing_older(site: Site) -> None:
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        with site.wire(version) as wire:
            wire.send(request(2))
            assert wire.answer()[0] == 200
            assert isinstance(wire.socket, ssl.SSLSocket)
            assert wire.socket.version() == {771: "TLSv1.2", 772: "TLSv1.3"}[version]
    context = site.authority.client_context()
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        Wire(site.server, context)


def test_a_client_that_prefers_http_2_speaks_http_1(site: Site) -> None:
    context = site.authority.client_context()
    context.set_alpn_protocols(["h2", "http/1.1"])
    with Wire(site.server, context) as wire:
        assert isinstance(wire.socket, ssl.SSLSocket)
        assert wire.socket.selected_alpn_protocol() == "http/1.1"
        wire.send(request(3))
        assert wire.answer()[0] == 200


def test_large_bodies_and_answers_arrive_whole(each_site: Site) -> None:
    sent = rows(LARGE_ROWS)
    expected = chaos.expected(np.load(io.BytesIO(sent)))
    with each_site.client() as client:
        for body, encoding in ((sent, {}), (gzip.compress(sent, 1), {"content-encoding": "gzip"})):
            headers = {"content-type": "application/x-npy", "accept": "application/x-npy", **encoding}
            answer = client.post("/predict/m", content=body, headers=headers)
            assert answer.status_code == 200, answer.text[:300]
            assert np.array_equal(np.load(io.BytesIO(answer.content)), expected)
        # The connection, whose bytes were received straight into memory, goes on.
        assert client.post("/predict/m", json=BODY).json()["outputs"]["sum"] == sums(1)


def test_a_client_that_reads_slowly_gets_everything(site: Site) -> None:
    # The server reads no more requests while answers are unread, so the requests must fit into the buffers of
    # both ends. It takes a body that decompresses to a hundred times its size.
    various = np.load(io.BytesIO(rows(6000)))
    values = np.concatenate([various, np.tile(various[:100], (LARGE_ROWS // 100 - 60, 1))])
    expected = chaos.expected(values).tolist()
    buffer = io.BytesIO()
    np.save(buffer, values)
    sent = gzip.compress(buffer.getvalue())
    assert buffer.tell() // 100 < len(sent) < 128 * 1024
    head = (
        "POST /predict/m HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-npy\r\ncontent-encoding: gzip\r\n"
    )
    with site.wire() as wire:
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        # The last answer ends the connection, and together they are longer than the buffers of both ends.
        for fields in ("", "", "connection: close\r\n"):
            wire.send(f"{head}{fields}content-length: {len(sent)}\r\n\r\n")
            wire.send(sent)
        for _ in range(3):
            status, headers, body = wire.answer()
            assert (status, len(body)) == (200, int(headers["content-length"]))
            assert json.loads(body)["outputs"]["sum"] == expected
        assert wire.ended()


def test_the_refusal_of_a_large_upload_arrives(site: Site) -> None:
    heads = {
        "content-length: 30000000000\r\n": b"x" * 65536,
        "transfer-encoding: chunked\r\n": b"10000\r\n" + b"x" * 65536 + b"\r\n",
    }
    for framing, piece in heads.items():
        with site.wire() as wire:
            wire.send(f"POST /predict/m HTTP/1.1\r\nhost: x\r\n{framing}\r\n")
            with contextlib.suppress(OSError):
                for _ in range(400):  # 26 MB: more than the server takes
                    wire.send(piece)
            assert wire.answer()[0] == 413
            assert wire.ended()


def test_a_request_without_host_is_refused(site: Site) -> None:
    with site.wire() as wire:
        check_host_is_required(wire.socket)


def test_plain_http_to_the_port_is_answered_with_what_to_do(site: Site) -> None:
    with Wire(site.server) as wire:
        wire.send("GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        status, _, body = wire.answer()
        assert status == 400
        assert b"https://" in body
        assert wire.ended()
    site.server.wait_for("127.0.0.1 sent plain HTTP")


def test_a_client_that_distrusts_the_server_disturbs_nobody(site: Site) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        Wire(site.server, ssl.create_default_context())
    for nonsense in (b"", b"\x16\x03\x01\xff\xff" + b"\xff" * 1000, b"\x00" * 100):
        with Wire(site.server) as wire:
            wire.send(nonsense)
            wire.socket.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                wire.stream.read()
    with site.wire() as wire:
        wire.send(request(1))
        assert wire.answer()[0] == 200
    assert not [line for line in site.server.log if line["level"] in ("error", "raw", "critical")]


def test_renewed_certificates_are_shown_and_no_request_fails(each_site: Site) -> None:
    failures: list[str] = []
    answered = 0
    stop = threading.Event()

    def ask(keep: bool) -> None:
        nonlocal answered
        while not stop.is_set():
            try:
                with each_site.wire() as wire:
                    for mark in range(20 if keep else 1):
                        wire.send(request(mark))
                        status, _, body = wire.answer()
                        assert status == 200, body
                        answered += 1
                        stop.wait(PAUSE_S)
            except Exception as error:  # noqa: BLE001 - the test fails with its text
                failures.append(repr(error))

    threads = [threading.Thread(target=ask, args=(keep,)) for keep in (True, False)]
    with each_site.wire() as old:
        for thread in threads:
            thread.start()
        try:
            for _ in range(RENEWALS):
                goal = answered + ANSWERS
                serial = each_site.authority.issue(each_site.certificate, each_site.key)
                wait_until(partial(each_site.shows, serial), "the new certificate is shown")
                wait_until(lambda goal=goal: answered >= goal, "requests are answered meanwhile")  # type: ignore[misc]
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert failures == []
        old.send(request(5))  # a connection of the first certificate goes on
        assert old.answer()[0] == 200


def test_a_broken_renewal_changes_nothing_but_the_log(each_site: Site) -> None:
    serial = x509.load_pem_x509_certificate(each_site.certificate.read_bytes()).serial_number

    def shown() -> set[int]:
        return {each_site.shown_serial() for _ in range(8)}

    # The web processes may take the last renewal one after the other.
    wait_until(lambda: shown() == {serial}, "every web process has the renewed certificate")
    right = each_site.key.read_bytes()
    each_site.authority.issue(each_site.certificate.with_name("other.crt"), each_site.key)  # another's key
    each_site.server.wait_for(
        "the renewed TLS files cannot be used, the old ones stay in use: .* the private key is not that of"
    )
    assert shown() == {serial}
    each_site.key.write_bytes(right)


def ask(site: Site, context: ssl.SSLContext) -> None:
    with Wire(site.server, context) as wire:
        wire.send(request(4))
        assert wire.answer()[0] == 200


class Guarded(NamedTuple):
    """A server that demands certificates of its clients, or keys.

    Attributes:
        site: its certificate is in a mounted secret.
        mounted: the folder of the secret.
        key: what the reader has.
        socket: the path at which administrators connect.
    """

    site: Site
    mounted: Path
    key: str
    socket: Path

    def renew(self, version: str) -> int:
        """Write a new folder and move the link `..data` to it, as Kubernetes does; returns the serial."""
        folder = self.mounted / version
        folder.mkdir()
        serial = self.site.authority.issue(folder / "tls.crt", folder / "tls.key")
        (self.mounted / "..tmp").symlink_to(version)
        (self.mounted / "..tmp").rename(self.mounted / "..data")
        return serial


@pytest.fixture(scope="module")
def guarded(module_serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Guarded:
    folder = tmp_path_factory.mktemp("guarded")
    mounted = folder / "secret"
    mounted.mkdir()
    keys = KeyFile(folder / "keys.toml")
    made = Guarded(Site(folder), mounted, keys.add("reader", "read", tenant="reader"), folder / "admin.sock")
    site = made.site
    site.serial = made.renew("..2026_01")
    site.certificate, site.key = mounted / "tls.crt", mounted / "tls.key"
    for file in (site.certificate, site.key):
        file.symlink_to(f"..data/{file.name}")
    make = chaos_in(folder / "repository")
    make("other")
    site.server = module_serve(
        make("m"), "--tls-certificate-file", str(site.certificate), "--tls-key-file", str(site.key),
        "--tls-client-ca-file", str(site.authority.file), "--tls-client-scopes", "predict:m",
        "--public-scopes", "metrics", "--keys-file", str(keys.path), "--admin-socket", str(made.socket),
    )  # fmt: skip
    return made


def test_a_certificate_may_take_the_place_of_a_key(guarded: Guarded, tmp_path: Path) -> None:
    """The first test of this server: its metrics count from the start."""
    site, key = guarded.site, guarded.key
    contexts = {}
    for name in ("acme", "team/other", "not fit: for a label"):
        certificate, own = tmp_path / "client.crt", tmp_path / "client.key"
        site.authority.issue(certificate, own, name, names=())
        contexts[name] = site.authority.client_context(certificate, own)
    url = f"https://localhost:{site.server.port}"

    def statuses(name: str, *headers: dict[str, str]) -> list[int]:
        """Of predictions with these headers, on one connection, and of a look at the models."""
        with httpx.Client(base_url=url, verify=contexts[name], timeout=30) as client:
            answers = [client.post("/predict/m", json=BODY, headers=each) for each in headers]
            return [*(answer.status_code for answer in answers), client.get("/models").status_code]

    # Equal heads, which are cached, on connections with different certificates.
    assert statuses("acme", {}, {}, {}) == [200, 200, 200, 403]
    assert statuses("not fit: for a label", {}, {}) == [401, 401, 401]
    assert statuses("team/other", {}, {}) == [200, 200, 403]
    # A key counts more than the certificate.
    assert statuses("acme", {"x-api-key": "wrong"}, {"x-api-key": "wrong"}, {}) == [401, 401, 200, 403]
    assert statuses("acme", {"x-api-key": key}) == [403, 403]
    # A head that the server knows from a client with more rights.
    data = json.dumps(BODY).encode()
    head = f"POST /predict/other HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    with socket.socket(socket.AF_UNIX) as local:
        local.connect(str(guarded.socket))
        for _ in range(2):
            local.sendall(head.encode() + data)
            assert local.recv(65_536).startswith(b"HTTP/1.1 200")
    with Wire(site.server, contexts["acme"]) as wire:
        wire.send(head.encode() + data)
        assert wire.answer()[0] == 403
    with httpx.Client(base_url=url, verify=contexts["acme"], timeout=30) as client:
        metrics = client.get("/metrics").text
        assert 'inferpool_tenant_requests_total{tenant="acme",code="200"} 4' in metrics
        assert 'inferpool_tenant_requests_total{tenant="team/other",code="200"} 2' in metrics
        with pytest.raises((OSError, AssertionError)):
            ask(site, site.authority.client_context())
        wait_until(
            lambda: 'refused_connections_total{reason="handshake"} 1' in client.get("/metrics").text,
            "the refused connection is counted",
        )
    expiry = metrics.partition("\ninferpool_tls_certificate_expiry_timestamp_seconds ")[2].split()[0]
    assert float(expiry) == expiry_of(site.certificate.read_text())


def test_clients_without_a_certificate_of_the_authority_are_refused(guarded: Guarded, tmp_path: Path) -> None:
    site = guarded.site
    certificate, key = tmp_path / "client.crt", tmp_path / "client.key"
    site.authority.issue(certificate, key, "a client")
    ask(site, site.authority.client_context(certificate, key))
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other")
    stranger.issue(certificate, key, "a client")
    for context in (site.authority.client_context(), site.authority.client_context(certificate, key)):
        # In TLS 1.3 a client learns only when it reads that its certificate was refused.
        with pytest.raises((OSError, AssertionError)):
            ask(site, context)
    site.server.wait_for("127.0.0.1 has shown no certificate")
    variables = {
        "PORT": str(site.server.port),
        "TLS_CERTIFICATE_FILE": str(site.certificate),
        "TLS_KEY_FILE": str(site.key),
        "TLS_CLIENT_CA_FILE": str(site.authority.file),
    }
    environ = {f"INFERPOOL_{name}": text for name, text in variables.items()}
    run = subprocess.run(
        [sys.executable, "-IS", str(ROOT / "docker" / "healthcheck.py")],
        env={**os.environ, **environ}, capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert (run.returncode, "200" in run.stdout) == (0, True), run.stderr


def test_files_of_a_mounted_secret_are_renewed_by_a_switch_of_their_folder(
    guarded: Guarded, tmp_path: Path
) -> None:
    site = guarded.site
    certificate, key = tmp_path / "client.crt", tmp_path / "client.key"
    site.authority.issue(certificate, key, "a client")
    context = site.authority.client_context(certificate, key)
    assert site.shown_serial(context) == site.serial
    serial = guarded.renew("..2026_02")
    wait_until(lambda: site.shown_serial(context) == serial, "the new certificate is shown")


def test_a_certificate_names_its_caller() -> None:
    made = CertificateCallers(["predict:m"], METRICS, lambda: 100.0, lambda: 1_700_000_000.0)
    shown: dict[str, Any] = {
        "subject": ((("organizationName", "Acme"),), (("commonName", "acme"),)),
        "subjectAltName": (("DNS", "a.example"), ("URI", "spiffe://x/y")),
        "notAfter": "Nov 14 22:14:20 2023 GMT",  # a minute later
    }
    caller = made.of(shown)
    assert caller is not None
    assert (caller.tenant, caller.key_id, caller.valid_until) == ("acme", "acme", 160.0)
    assert caller.may_predict("m")
    assert not caller.may_predict("n")
    assert caller.allows(METRICS)
    for subject, names, expected in (
        ((), shown["subjectAltName"], "spiffe://x/y"),
        (((("commonName", "a\nb"),),), (("DNS", "a.example"),), "a.example"),
        (((("commonName", "x" * 129),),), (), None),
    ):
        found = made.of({**shown, "subject": subject, "subjectAltName": names})
        assert (found and found.tenant) == expected
    now = 0.0
    gate = Gate(lambda: now, enabled=True)
    gate.use_certificates(made)
    assert gate.keyless(None) is gate.anonymous
    keyless = gate.keyless(shown)
    assert gate.check([], PREDICT, "m", "", keyless) is keyless
    assert isinstance(gate.check([], READ, None, "", keyless), Forbidden)
    assert isinstance(gate.check([(b"x-api-key", b"k")], PREDICT, "m", "", keyless), Unauthorized)
    now = keyless.valid_until
    assert isinstance(gate.check([], PREDICT, "m", "", keyless), Unauthorized), "it has expired"
    with pytest.raises(ValueError, match="no scope is called"):
        CertificateCallers(["predictions"], 0, time.monotonic, time.time)
    with pytest.raises(ValidationError, match="tls_client_ca_file is not"):
        Settings(tls_client_scopes=("predict",))


def test_the_expiry_of_a_certificate_is_read_from_its_file(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.issue(tmp_path / "a.crt", tmp_path / "a.key")
    authority.issue(tmp_path / "b.crt", tmp_path / "b.key", days=20_000)
    short, long = ((tmp_path / f"{name}.crt").read_text() for name in "ab")
    for text in (short, long):
        expected = x509.load_pem_x509_certificate(text.encode()).not_valid_after_utc.timestamp()
        assert expiry_of(f"a comment\n{text}") == expected
    assert expiry_of(long + short) == expiry_of(short), "the first to expire"
    broken = long.splitlines()
    for text in ("", "-----BEGIN CERTIFICATE-----\n", "\n".join([*broken[:3], broken[-1]])):
        with pytest.raises(ValueError, match=r"certificate|padding"):
            expiry_of(text)


def test_files_that_are_not_fit_for_tls_are_named(tmp_path: Path) -> None:
    site = Site(tmp_path)
    other, encrypted, empty = tmp_path / "other.key", tmp_path / "encrypted.key", tmp_path / "empty.pem"
    site.authority.issue(tmp_path / "other.crt", other)
    empty.write_text("")
    subprocess.run(
        ["openssl", "pkey", "-in", site.key, "-aes256", "-passout", "pass:secret", "-out", encrypted],
        check=True,
    )
    for key, client_ca, expected in (
        (other, None, "the private key is not that of the certificate"),
        (tmp_path / "missing", None, "No such file"),
        (None, None, "must be a certificate and its private key in PEM format"),
        (site.key, empty, "no certificate in PEM format is in the file"),
    ):
        with pytest.raises(ConfigError, match=expected):
            make_context(TlsFiles(site.certificate, key, client_ca))
    with pytest.raises(ValidationError, match="tls_key_file is set, and tls_certificate_file is not"):
        Settings(tls_key_file=site.key)
    # A key with a password is no reason to ask for that at the terminal.
    run = subprocess.run(
        [sys.executable, "-m", "inferpool", "serve", str(ROOT / "models"), "--port", "0",
         "--tls-certificate-file", str(site.certificate), "--tls-key-file", str(encrypted)],
        capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert run.returncode in (1, 2)
    assert "the private key of TLS is encrypted" in run.stderr


def test_idle_clients_do_not_delay_the_end(site: Site) -> None:
    """The last test of this server."""
    with site.wire() as wire:
        wire.send(request(1))
        assert wire.answer()[0] == 200
        before = len(site.server.log)
        began = time.monotonic()
        assert site.server.stop() == 0
        assert time.monotonic() - began < Settings().drain_timeout_s
        assert not [line for line in site.server.log[before:] if line["level"] == "error"]


@pytest.mark.parametrize("server_module", ["tests.servers.few_handshakes"], indirect=True, scope="module")
def test_handshakes_that_are_never_finished_keep_nobody_out(
    serve: Serve, make_chaos: MakeChaos, tmp_path: Path
) -> None:
    """The last test of the file: another kind of server ends those before."""
    site = Site(tmp_path)
    site.server = serve(make_chaos("m"), *site.flags)
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(Wire(site.server)) for _ in range(4 * few_handshakes.MOST)]
        for one in stalled[::2]:  # in the middle of their first message
            with contextlib.suppress(OSError):
                one.send(TlsClient(site.authority.client_context()).shake_hands()[:100])
        with site.wire() as wire:
            wire.send(request(1))
            assert wire.answer()[0] == 200
        site.server.wait_for("TLS handshakes are not finished; the oldest are given up")
        for one in stalled:
            with contextlib.suppress(ConnectionError):
                one.stream.read()  # each one ends, before the socket's own time is up
