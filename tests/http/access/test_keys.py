"""Keys through the real door: reload, expiry, what is refused before what, and that no secret leaks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from inferpool.cli import main
from inferpool.errors import ConfigError, Forbidden, Unauthorized
from inferpool.http.access.caller import ADMIN, PREDICT, READ, Caller
from inferpool.http.access.gate import MOST_ACCEPTED, OFF, OPEN, Gate
from inferpool.http.access.key_file import append_key, new_key
from inferpool.http.access.key_file_watch import KeyFileWatch
from inferpool.http.access.make_gate import check_exposure
from inferpool.http.access.refusals import EVERY_S, MOST_PEERS, Refusals
from inferpool.observe.metrics import Metrics
from inferpool.settings import Settings

from tests.conftest import MakeChaos, Serve, chaos_in
from tests.http.access.keys import MARK, KeyFile
from tests.server import Server, wait_until

BODY = {"inputs": {"x": [[1.0] * 4]}}
DATA = json.dumps(BODY).encode()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyFile:
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys.toml")
    file.add("m", "predict:m")
    file.add("two", "predict:m", "predict:other")
    file.add("none", "predict:unserved")
    file.add("all", "predict", "read", "metrics")
    return file


@pytest.fixture(scope="module")
def guarded(module_serve: Serve, module_make_chaos: MakeChaos, keys: KeyFile) -> Server:
    module_make_chaos("other")
    return module_serve(module_make_chaos("m"), "--keys-file", str(keys.path), "--max-body-bytes", "100000")


def raw(port: int, *parts: bytes) -> Iterator[tuple[int, bytes]]:
    """Send `parts` on one connection; yields the status and the body of each response that comes."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"".join(parts))
        with connection.makefile("rb") as stream:
            while line := stream.readline():
                headers = {}
                while (field := stream.readline()) not in (b"\r\n", b""):
                    name, _, value = field.decode().partition(":")
                    headers[name.lower()] = value.strip()
                yield int(line.split()[1]), stream.read(int(headers["content-length"]))


def request(key: str | None, path: str = "/predict/m", body: bytes = DATA, *fields: str) -> bytes:
    credential = [] if key is None else [f"x-api-key: {key}"]
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(body)}", *credential, *fields]
    return "\r\n".join([*lines, "", ""]).encode() + body


def test_a_key_for_models_is_for_these_models_however_a_request_names_them(
    guarded: Server, keys: KeyFile
) -> None:
    def status(name: str, path: str, **more: object) -> int:
        return guarded.post(path, json={**BODY, **more}, headers=keys.bearer(name)).status_code

    v2 = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 1, 1, 1]}]}
    assert status("m", "/predict/m") == 200
    assert status("m", "/predict/m/1") == 200
    assert status("m", "/predict", model="m") == 200
    assert status("m", "/explain/m") == 200
    for path in ("/explain/other", "/explanations/other/1", "/explain/nothing"):
        assert status("m", path) == 403
    assert status("m", "/predict/other") == 403
    assert status("m", "/predict/other/1") == 403
    assert status("m", "/predict", model="other") == 403
    assert status("m", "/predict/nothing") == 403, "a key tells nothing about other models"
    assert status("m", "/predict", model="nothing") == 403
    assert status("two", "/predict/other") == 200
    assert status("all", "/predict/nothing") == 404
    for name, model, expected in (("m", "m", 200), ("m", "other", 403), ("two", "other", 200)):
        answer = guarded.post(f"/v2/models/{model}/infer", json=v2, headers=keys.bearer(name))
        assert answer.status_code == expected, answer.text


def test_the_models_of_other_keys_are_not_listed_in_an_error(guarded: Server, keys: KeyFile) -> None:
    answer = guarded.post("/predict", json=BODY, headers=keys.bearer("m"))
    assert answer.status_code == 200, "the only model that this key is for"
    answer = guarded.post("/predict", json=BODY, headers=keys.bearer("none"))
    assert (answer.status_code, "other" in answer.text) == (422, False)
    assert guarded.post("/predict", json=BODY, headers=keys.bearer("two")).status_code == 422


def test_a_cached_head_is_for_its_own_key(guarded: Server, keys: KeyFile) -> None:
    # The second request with the same head needs no parser; the others differ from it in their key alone.
    good, wrong = keys.keys["m"], keys.keys["m"][:-1] + "."
    sent = [request(good), request(good), request(wrong), request(good), request(None), request(wrong)]
    for _ in range(2):
        for part, expected in zip(sent, (200, 200, 401, 200, 401, 401), strict=True):
            assert next(raw(guarded.port, part))[0] == expected
    together = raw(guarded.port, *sent, request(good, "/predict/other", DATA, "connection: close"))
    assert [status for status, _ in together] == [200, 200, 401, 200, 401, 401, 403]


def test_a_request_has_one_key(guarded: Server, keys: KeyFile) -> None:
    good, other = keys.keys["m"], keys.keys["two"]
    for fields, expected in (
        ([f"authorization: Bearer {good}"], 200),
        ([f"authorization: bearer  {good} "], 200),
        ([f"authorization: Bearer {good}", f"x-api-key: {good}"], 200),
        ([f"authorization: Bearer {good}", f"x-api-key: {other}"], 401),
        ([f"x-api-key: {good}", "x-api-key: wrong"], 401),
        (["authorization: Basic abc", f"x-api-key: {good}"], 200),
        ([f"authorization: {good}"], 401),
        ([f"x-api-key: Bearer {good}"], 401),
        ([f"cookie: x-api-key={good}"], 401),
    ):
        assert next(raw(guarded.port, request(None, "/predict/m", DATA, *fields)))[0] == expected, fields
    assert next(raw(guarded.port, request(None, f"/predict/m?x-api-key={good}")))[0] == 401


def test_a_refused_body_is_not_received_and_a_stranger_learns_nothing_else(
    guarded: Server, keys: KeyFile
) -> None:
    huge = request("wrong", "/predict/m", b"").replace(b"content-length: 0", b"content-length: 9999999999")
    status, body = next(raw(guarded.port, huge))
    assert (status, json.loads(body)["code"]) == (401, "unauthorized"), "before 413"
    assert next(raw(guarded.port, huge.replace(b"wrong", keys.keys["m"].encode())))[0] == 413
    assert next(raw(guarded.port, request("wrong", "/predict/nothing")))[0] == 401, "before 404"
    assert next(raw(guarded.port, request("wrong", "/predict/m", b"not json")))[0] == 401, "before 400"
    waits = request("wrong", "/predict/m", b"", "expect: 100-continue").replace(b"th: 0", b"th: 5")
    assert next(raw(guarded.port, waits))[0] == 401, "a refused client is not asked to go on"
    chunked = b"POST /predict/m HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    assert next(raw(guarded.port, chunked))[0] == 401


def test_refused_requests_are_counted_by_what_their_key_lacks(guarded: Server, keys: KeyFile) -> None:
    def counted() -> dict[str, float]:
        text = guarded.get("/metrics", headers=keys.bearer("all")).text
        lines = [line for line in text.splitlines() if line.startswith("inferpool_refused_keys_total{")]
        return {line.split('"')[1]: float(line.rsplit(" ", 1)[1]) for line in lines}

    before = counted()
    guarded.post("/predict/m", json=BODY)
    guarded.post("/predict/m", json=BODY, headers={"x-api-key": "wrong"})
    guarded.get("/models")
    guarded.post("/predict/other", json=BODY, headers=keys.bearer("m"))
    # The second one and those behind it need no parser, whatever their key.
    with httpx.Client(base_url=guarded.url, timeout=30) as client:
        wrong = [{"x-api-key": key} for key in ("wrong", "wrong", "wrong2", "wrong3", "wrong")]
        again = [client.post("/predict/m", json=BODY, headers=key) for key in wrong]
        good = client.post("/predict/m", json=BODY, headers={"x-api-key": keys.keys["m"]})
    assert good.status_code == 200
    assert {(answer.status_code, answer.json()["reason"]) for answer in again} == {(401, "unknown")}
    assert len({answer.headers["x-request-id"] for answer in again}) == 5
    after = counted()
    assert {reason: after[reason] - before[reason] for reason in after if after[reason] > before[reason]} == {
        "missing": 2, "unknown": 6, "scope": 1,
    }  # fmt: skip
    text = guarded.get("/metrics", headers=keys.bearer("all")).text
    assert 'model="m",version="",code="401"' not in text, "no model has failed"


class Changed(NamedTuple):
    """A server whose file of keys the tests change."""

    server: Server
    file: KeyFile


@pytest.fixture(scope="module")
def changed(module_serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Changed:
    folder = tmp_path_factory.mktemp("changed")
    file = KeyFile(folder / "keys.toml")
    for name, scopes in (("first", ["predict"]), ("all", ["predict", "metrics"])):
        file.add(name, *scopes)
    flags = ("--keys-file", str(file.path), "--access-log", "--log-level", "debug")
    return Changed(module_serve(chaos_in(folder / "models")("m"), *flags), file)


def test_a_new_key_and_a_revoked_key_take_effect_without_a_restart(changed: Changed) -> None:
    server, file = changed
    first = file.keys["first"]
    with httpx.Client(base_url=server.url, timeout=30) as client:  # one connection, whose head is cached

        def status(key: str) -> int:
            return client.post("/predict/m", json=BODY, headers={"x-api-key": key}).status_code

        def is_taken(key: str) -> bool:
            return status(key) == 200

        assert [status(first) for _ in range(3)] == [200] * 3
        second, record = new_key("acme", ["predict"])
        assert [status(second) for _ in range(3)] == [401] * 3  # its refusal is remembered
        append_key(file.path, record)
        wait_until(lambda: status(second) == 200, "the new key is accepted")
        assert status(first) == 200
        assert main(["key", "revoke", file.ids["first"], "--keys-file", str(file.path)]) == 0
        wait_until(lambda: status(first) == 401, "the revoked key is refused")
        assert status(second) == 200
        for life_s in (4, 8, 16, 32):
            third = file.add(f"lives for {life_s} s", "predict", expires_s=life_s)
            with contextlib.suppress(AssertionError):  # a busy machine may take a key later than it expires
                wait_until(partial(is_taken, third), "the third key is accepted", life_s)
                break
        assert is_taken(third)
        wait_until(lambda: status(third) == 401, "the key expires although its head is cached", life_s + 1)


def test_a_broken_file_keeps_the_keys_and_is_reported(changed: Changed) -> None:
    server, file = changed
    key = {"x-api-key": file.keys["all"]}

    def stale() -> bool:
        return 'inferpool_stale_keys{source="keys_file"} 1' in server.get("/metrics", headers=key).text

    good = file.path.read_text()
    for text, said in (
        (good + f"\n[[key]]\n{MARK}\n", "not valid TOML"),
        ("", "the file is empty"),
        (None, "No such file"),
    ):
        assert not stale()
        file.path.unlink() if text is None else file.path.write_text(text)
        wait_until(stale, "the metric tells")
        server.wait_for(f"the former keys stay valid: .*{said}")
        assert server.post("/predict/m", json=BODY, headers=key).status_code == 200
        file.path.write_text(good)
        wait_until(lambda: not stale(), "the keys are read again")
    assert MARK not in json.dumps(server.log)


def test_no_output_has_a_secret(changed: Changed) -> None:
    """The last test of this server, whose log has the lines of the tests before."""
    server, file = changed
    good = file.add("admin", "predict", "read", "metrics", "admin")
    lesser = file.add("lesser", "predict:other")
    unknown = 401
    # The file is read once for both.
    lesser_key = {"x-api-key": lesser}
    wait_until(lambda: server.get("/models", headers=lesser_key).status_code != unknown, "the keys are known")
    seen = []
    client = httpx.Client(base_url=server.url, timeout=30)
    for key in (good, lesser, MARK, MARK + "." + MARK + "." + MARK):
        for headers in ({"x-api-key": key}, {"authorization": f"Bearer {key}"}):
            for method, path in (
                ("POST", "/predict/m"), ("POST", "/predict"), ("GET", "/predict/m"), ("GET", "/models"),
                ("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/v2/models/m/stats"), ("GET", "/x"),
                ("POST", "/v2/models/m/infer"), ("POST", "/models/m/load"), ("GET", "/health"),
            ):  # fmt: skip
                answer = client.request(method, path, json=BODY, headers=headers)
                seen.append(str(answer.headers) + answer.text)
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            # A head that the parser refuses, and one that is too long.
            connection.sendall(
                f"POST /predict/m HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\nbad header\r\n\r\n".encode()
            )
            seen.append(connection.recv(65_536).decode())
    client.close()
    server.stop()
    seen.append(json.dumps(server.log))
    assert len(seen) > 90
    for secret in (good, lesser, MARK):
        assert not [text for text in seen if secret in text]
        assert not [text for text in seen if secret[-20:] in text]


def test_every_web_process_reads_the_keys_again_when_kubernetes_changes_a_link(
    serve: Serve, make_chaos: MakeChaos, tmp_path: Path
) -> None:
    mount = tmp_path / "mount"
    files, keys = {}, {}
    for name in ("one", "two"):
        folder = mount / f"..2026_{name}"
        folder.mkdir(parents=True)
        files[name] = KeyFile(folder / "keys.toml")
        keys[name] = {"x-api-key": files[name].add(name, "predict")}
    (mount / "..data").symlink_to("..2026_one")
    (mount / "keys.toml").symlink_to("..data/keys.toml")
    flags = ("--engine", "process", "--web-processes", "2", "--keys-file", str(mount / "keys.toml"))
    server = serve(make_chaos("m"), *flags)

    def statuses(headers: dict[str, str]) -> set[int]:
        # Each on a connection of its own: the web processes take turns.
        return {server.post("/predict/m", json=BODY, headers=headers).status_code for _ in range(12)}

    assert statuses(keys["one"]) == {200}
    assert statuses({}) == {401}
    (mount / "..data_tmp").symlink_to("..2026_two")
    (mount / "..data_tmp").replace(mount / "..data")  # as the kubelet does it
    wait_until(lambda: statuses(keys["two"]) == {200}, "all web processes accept the new key")
    wait_until(lambda: statuses(keys["one"]) == {401}, "all web processes refuse the old key")
    files["two"].path.write_text("# all are revoked\n")
    wait_until(lambda: statuses(keys["two"]) == {401}, "all web processes refuse the keys")


@pytest.mark.parametrize("engine", ["in-process", "process"])
def test_a_server_does_not_start_with_a_wrong_file(
    make_chaos: MakeChaos, tmp_path: Path, engine: str
) -> None:
    (tmp_path / "keys.toml").write_text(f"{MARK}\n")
    run = subprocess.run(
        [sys.executable, "-m", "inferpool", "serve", make_chaos("m"), "--port", "0", "--engine", engine,
         "--keys-file", tmp_path / "keys.toml"],
        env={**os.environ, "PYTHONPATH": "tests/chaos"},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert run.returncode == 1
    assert "keys.toml: not valid TOML" in run.stderr
    assert MARK not in run.stderr


def test_a_server_that_others_reach_warns_without_keys_and_refuses_admin_routes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_exposure(Settings(host="127.0.0.1", admin_routes="on"))
    check_exposure(Settings(host="::1"))
    check_exposure(Settings(host="0.0.0.0", keys_file=tmp_path / "keys.toml", admin_routes="on"))
    assert not caplog.records
    for host in ("0.0.0.0", "::", "10.1.2.3", "server.example.com"):
        check_exposure(Settings(host=host))
        assert f"everyone who reaches {host}" in caplog.records[-1].getMessage()
        with pytest.raises(ConfigError, match="admin_routes is on"):
            check_exposure(Settings(host=host, admin_routes="on"))


def test_a_server_that_listens_everywhere_does_not_start_with_open_admin_routes(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "inferpool", "serve", tmp_path, "--host", "0.0.0.0", "--admin-routes", "on"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert run.returncode == 1
    assert "admin_routes is on" in run.stderr


def test_keys_expire_by_the_time_of_day_even_if_it_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = KeyFile(tmp_path / "keys.toml")
    headers = [(b"x-api-key", file.add("k", "read", expires_s=3600).encode())]
    gate = Gate(lambda: 50.0, enabled=True)
    watch = KeyFileWatch(file.path, gate, lambda: 50.0, Metrics({}))

    class Loop:
        def call_soon_threadsafe(self, function: Callable[..., None], *arguments: object) -> None:
            function(*arguments)

    monkeypatch.setattr(watch, "_loop", Loop(), raising=False)
    assert gate.authorize(headers, READ, None, "").key_id == file.ids["k"]
    later = time.time() + 3601
    monkeypatch.setattr("inferpool.http.access.key_file_watch.time.time", lambda: later)
    watch.look()
    with pytest.raises(Unauthorized, match="expired"):
        gate.authorize(headers, READ, None, "")


def test_admin_routes_without_keys_are_for_programs_and_not_for_web_pages() -> None:
    gate = Gate(lambda: 0.0, admin=OPEN)
    assert gate.authorize([(b"user-agent", b"curl")], ADMIN, None, "").tenant == ""
    for name in (b"origin", b"sec-fetch-site"):
        with pytest.raises(Forbidden, match="web pages"):
            gate.authorize([(name, b"null")], ADMIN, None, "")
    closed = Gate(lambda: 0.0, enabled=True, admin=OFF)
    closed.use({hashlib.sha256(b"k").digest(): Caller("t", "k", ADMIN)})
    with pytest.raises(Forbidden, match="--admin-routes off"):
        closed.authorize([(b"x-api-key", b"k")], ADMIN, None, "")


def test_a_gate_remembers_no_caller_after_the_keys_have_changed() -> None:
    gate, forgotten = Gate(lambda: 0.0, enabled=True), []
    gate.on_change(lambda: forgotten.append(True))
    gate.use({})
    assert forgotten == [True]
    with pytest.raises(Exception, match="needs a key"):
        gate.authorize([], PREDICT, None, "")
    assert Gate(lambda: 0.0).authorize([], PREDICT, None, "").allows(PREDICT)
    assert not Caller("t", "k", PREDICT, frozenset({"a"})).may_predict("b")


def test_the_gate_remembers_accepted_keys_until_they_expire_or_change() -> None:
    now = 0.0
    gate = Gate(lambda: now, enabled=True)
    headers = [(b"x-api-key", b"k")]
    keys = {hashlib.sha256(b"k").digest(): Caller("t", "k", READ, None, 10.0)}
    gate.use(keys)
    assert {gate.authorize(headers, READ, None, "").key_id for _ in range(3)} == {"k"}
    with pytest.raises(Forbidden):
        gate.authorize(headers, PREDICT, None, "")
    now = 10.0
    with pytest.raises(Unauthorized, match="expired"):
        gate.authorize(headers, READ, None, "")
    now = 0.0
    gate.use({})
    with pytest.raises(Unauthorized, match="does not know"):
        gate.authorize(headers, READ, None, "")
    gate.use(
        {
            hashlib.sha256(b"%d" % number).digest(): Caller("t", "k", READ)
            for number in range(3 * MOST_ACCEPTED)
        }
    )
    for number in range(3 * MOST_ACCEPTED):
        gate.authorize([(b"x-api-key", b"%d" % number)], READ, None, "")
    assert len(gate._accepted) <= MOST_ACCEPTED


def test_a_client_is_logged_once_a_minute_and_the_log_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    refusals = Refusals(Metrics({}), lambda: now)
    for _ in range(1000):
        refusals.count("unknown", "10.0.0.1", "")
    refusals.count("scope", "10.0.0.2", "k1")
    assert [record.getMessage() for record in caplog.records] == [
        "a request of 10.0.0.1 was refused, reason: unknown",
        'a request of 10.0.0.2 was refused, the key "k1" lacks the scope',
    ]
    now = EVERY_S
    refusals.count("unknown", "10.0.0.1", "")
    assert caplog.records[-1].getMessage().endswith("; 999 more since the last line")
    caplog.clear()
    for number in range(10 * MOST_PEERS):
        refusals.count("unknown", f"peer {number}", "")
    assert len(caplog.records) <= MOST_PEERS + 1
    now = 3 * EVERY_S
    refusals.count("unknown", "peer new", "")
    assert "peer new" in caplog.records[-1].getMessage(), "there is room again"
