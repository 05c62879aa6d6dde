"""The file of keys: what it may hold, how commands change it, and that no error repeats a secret."""

from __future__ import annotations

import hashlib
import math
import os
import stat
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.cli import main
from inferpool.errors import ConfigError
from inferpool.http.access.caller import ADMIN, METRICS, PREDICT, READ
from inferpool.http.access.key_file import (
    append_key,
    callers_of,
    expiry_after,
    new_key,
    parse_scopes,
    read_key_file,
    remove_key,
)

from tests.http.access.keys import MARK, KeyFile

DIGEST = "sha256:" + "0" * 64
GOOD = f'[[key]]\nid = "a"\ntenant = "t"\ndigest = "{DIGEST}"\nscopes = ["read"]\n'


def test_a_new_key_is_found_by_its_digest_and_has_its_scopes(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.toml")
    secret = file.add("one", "predict:digits", "predict:iris", "read", tenant="acme")
    file.add("two", "predict", "predict:digits")
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert secret not in file.path.read_text()
    callers = callers_of(read_key_file(file.path), lambda: 10.0, lambda: 0.0)
    one = callers[hashlib.sha256(secret.encode()).digest()]
    assert (one.tenant, one.key_id, one.models) == ("acme", file.ids["one"], frozenset(("digits", "iris")))
    assert one.allows(PREDICT)
    assert one.allows(READ)
    assert not one.allows(METRICS)
    assert not one.allows(ADMIN)
    assert one.valid_until == math.inf
    two = callers[hashlib.sha256(file.keys["two"].encode()).digest()]
    assert two.may_predict("anything"), "predict means every model, whatever is named beside it"


def test_expiry_is_a_moment_of_the_servers_clock() -> None:
    _, record = new_key("t", ["read"], datetime.fromtimestamp(1060, UTC))
    (caller,) = callers_of([record], lambda: 5.0, lambda: 1000.0).values()
    assert caller.valid_until == 65.0
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert expiry_after("90d", now) - now == timedelta(days=90)
    assert expiry_after("12h", now) - now == timedelta(hours=12)
    for wrong in ("", "90", "d", "-1d", "0d", "1.5d", "1y", "9999999d"):
        with pytest.raises(ValueError, match="no length of time"):
            expiry_after(wrong, now)


def test_two_keys_never_have_the_same_secret() -> None:
    secrets = {new_key("t", ["read"])[0] for _ in range(200)}
    assert len(secrets) == 200
    assert all(len(secret) >= 43 for secret in secrets)


@pytest.mark.parametrize(
    "scope", ["", "all", "predict:", "read:digits", "admin:x", "PREDICT", "predict digits"]
)
def test_an_unknown_scope_is_an_error(scope: str) -> None:
    with pytest.raises(ValueError, match="no scope is called"):
        parse_scopes([scope])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("key = 1", "two brackets"),
        (GOOD + "[tenants]\n", 'unknown table "tenants"'),
        (GOOD.replace('"t"', '"a b"'), '"tenant" must have'),
        (GOOD.replace('"t"', "1"), '"tenant" must be a text'),
        (GOOD.replace('id = "a"', 'id = ""'), '"id" must have'),
        (GOOD.replace("tenant", "owner"), 'unknown field "owner"'),
        (GOOD.replace('tenant = "t"\n', ""), '"tenant" is missing'),
        (GOOD.replace('["read"]', '["all"]'), "no scope is called"),
        (GOOD.replace('["read"]', "[]"), '"scopes" is empty'),
        (GOOD.replace('["read"]', '"read"'), "list of texts"),
        (GOOD + "expires = 2026-01-01\n", "with its zone"),
        (GOOD + "expires = 2026-01-01T00:00:00\n", "with its zone"),
        (GOOD + GOOD.replace('"a"', '"b"'), "key 2: another key has the same digest"),
        (GOOD + GOOD.replace(DIGEST[-1], "1"), "key 2: another key has the same id"),
        (GOOD.replace(DIGEST, MARK), "64 hexadecimal digits"),
        (GOOD.replace(DIGEST, "md5:" + "0" * 32), "64 hexadecimal digits"),
        (f"{MARK}\n", "not valid TOML"),
        (GOOD + f"[[key]]\nid = {MARK}\n", "not valid TOML (at line"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_place_and_repeats_no_secret(
    tmp_path: Path, text: str, said: str
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_key_file(file)
    assert said in caught.value.detail
    assert str(file) in caught.value.detail
    assert MARK not in caught.value.detail


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        assert read_key_file(file) == []
    except ConfigError as error:
        assert error.detail  # noqa: PT017


def test_revoking_keeps_every_other_line_and_the_mode(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.toml")
    file.path.write_text("# ours\n\n")
    for name in ("a", "b", "c"):
        file.add(name, "read")
    file.path.chmod(0o640)
    link = tmp_path / "link.toml"
    link.symlink_to(file.path)
    assert remove_key(link, file.ids["b"]).id == file.ids["b"]
    assert link.is_symlink()
    text = file.path.read_text()
    assert text.startswith("# ours\n\n")
    assert [record.id for record in read_key_file(file.path)] == [file.ids["a"], file.ids["c"]]
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o640
    with pytest.raises(ConfigError, match="no key has the id"):
        remove_key(file.path, file.ids["b"])
    assert file.path.read_text() == text
    assert sorted(tmp_path.iterdir()) == sorted([file.path, link]), "no temporary file is left"


def test_a_file_without_its_last_key_is_not_empty(tmp_path: Path) -> None:
    """A server takes an empty file for one that is being written, and keeps the former keys."""
    file = KeyFile(tmp_path / "keys.toml")
    file.add("only", "read")
    remove_key(file.path, file.ids["only"])
    assert file.path.stat().st_size
    assert read_key_file(file.path) == []
    file.add("next", "read")
    assert [record.id for record in read_key_file(file.path)] == [file.ids["next"]]


def test_commands_at_once_lose_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    doomed = [new_key("t", ["read"])[1] for _ in range(10)]
    for record in doomed:
        append_key(path, record)
    added = [new_key("t", ["read"])[1] for _ in range(10)]
    threads = [threading.Thread(target=append_key, args=(path, record)) for record in added]
    threads += [threading.Thread(target=remove_key, args=(path, record.id)) for record in doomed]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {record.id for record in read_key_file(path)} == {record.id for record in added}


def test_the_command_prints_the_key_alone_and_keeps_only_its_digest(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    environ = {**os.environ, "INFERPOOL_KEYS_FILE": str(file)}
    run = subprocess.run(
        [sys.executable, "-m", "inferpool", "key", "new", "--tenant", "acme", "--scope", "predict:digits",
         "--scope", "read", "--expires", "90d"],
        env=environ, capture_output=True, text=True, check=True,
    )  # fmt: skip
    key = run.stdout.strip()
    assert run.stdout == key + "\n"
    assert key not in run.stderr
    (record,) = read_key_file(file)
    assert record.digest == "sha256:" + hashlib.sha256(key.encode()).hexdigest()
    assert record.scopes == ("predict:digits", "read")
    assert record.expires is not None
    assert timedelta(days=89, hours=23) < record.expires - datetime.now(UTC) <= timedelta(days=90)


def test_the_command_lists_and_revokes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = KeyFile(tmp_path / "keys.toml")
    file.add("a", "read")
    file.add("b", "predict:digits", tenant="other", expires_s=-1)
    named = ["--keys-file", str(file.path)]
    assert main(["key", "list", *named]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == [file.ids["a"], "acme", "never", "read"]
    assert "expired" in second
    assert main(["key", "revoke", file.ids["a"], *named]) == 0
    assert main(["key", "revoke", file.ids["a"], *named]) == 1
    assert "no key has the id" in capsys.readouterr().err
    assert main(["key", "new", "--tenant", "a b", "--scope", "read", *named]) == 1
    assert '"tenant" must have' in capsys.readouterr().err
    assert main(["key", "new", "--tenant", "a", "--scope", "all", *named]) == 1
    assert "the scopes are" in capsys.readouterr().err
    assert main(["key", "list"]) == 1
    assert "--keys-file" in capsys.readouterr().err
