"""The file of keys: who holds a key and what it allows. It has digests, and never a key itself.

    [[key]]
    id = "k3v9xq2a"
    tenant = "acme"
    digest = "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    scopes = ["predict:digits", "read"]
    created = 2026-11-27T09:00:00Z
    expires = 2027-02-25T09:00:00Z      # optional

A plain SHA-256 is enough, and costs a microsecond: `new_key` makes keys of 256 random bits, which nobody can
guess from their digest. A slow hash protects passwords, which people choose; here it would let strangers
occupy the server with wrong keys.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

from inferpool.errors import ConfigError
from inferpool.http.access.caller import ANY_KEY, PREDICT, SCOPES, Caller

PREFIX: Final = "inferpool_"
"""Every key begins with this word, so that scanners for secrets can find a key that was published."""

_NAME: Final = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")
_SPAN: Final = re.compile(r"([1-9][0-9]{0,5})([mhd])")
_POSITION: Final = re.compile(r"\(at line \d+, column \d+\)")
_NO_KEYS: Final = "# All keys are revoked.\n"
_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days"}
_ID_LETTERS: Final = "abcdefghijkmnpqrstuvwxyz23456789"
_FIELDS: Final = ("id", "tenant", "digest", "scopes", "created", "expires")
_REQUIRED: Final = ("id", "tenant", "digest", "scopes")


class KeyRecord(NamedTuple):
    """A key in the file, without the key itself."""

    id: str
    tenant: str
    digest: str
    scopes: tuple[str, ...]
    created: datetime | None
    expires: datetime | None


class Scopes(NamedTuple):
    """What a list of scopes allows: the sum of the scopes, and the models that prediction is limited to."""

    scopes: int
    models: frozenset[str] | None


def parse_scopes(names: Sequence[str]) -> Scopes:
    """Read scopes such as `read` and `predict:digits`; raises ValueError, which names the scope."""
    total, models, every = ANY_KEY, set(), False
    for name in names:
        scope, colon, model = name.partition(":")
        if scope not in SCOPES or (colon and (scope != "predict" or not model)):
            known = ", ".join((*SCOPES, "predict:MODEL"))
            raise ValueError(f'no scope is called "{name[:80]}"; the scopes are {known}')
        total |= SCOPES[scope]
        if colon:
            models.add(model)
        elif scope == "predict":
            every = True
    return Scopes(total, None if every or not total & PREDICT else frozenset(models))


def read_key_file(path: Path) -> list[KeyRecord]:
    """Return the keys in the file `path`; raises ConfigError, which names the file and the key."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    try:
        return _parse(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        # Only the position of the error: its text may quote a key that somebody wrote into the file.
        position = _POSITION.search(str(error))
        raise ConfigError(f"{path}: not valid TOML{f' {position[0]}' if position else ''}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def callers_of(
    records: Sequence[KeyRecord], clock: Callable[[], float], wall_clock: Callable[[], float]
) -> dict[bytes, Caller]:
    """Return the callers of keys by the digests of the keys; expiry is a moment of `clock`."""
    now, wall_now = clock(), wall_clock()
    callers = {}
    for record in records:
        scopes, models = parse_scopes(record.scopes)
        until = math.inf if record.expires is None else now + record.expires.timestamp() - wall_now
        digest = bytes.fromhex(record.digest.removeprefix("sha256:"))
        callers[digest] = Caller(record.tenant, record.id, scopes, models, until)
    return callers


def new_key(tenant: str, scopes: Sequence[str], expires: datetime | None = None) -> tuple[str, KeyRecord]:
    """Return a new key and its record; raises ValueError for a wrong tenant or scope."""
    key_id = "".join(secrets.choice(_ID_LETTERS) for _ in range(8))
    key = f"{PREFIX}{key_id}_{secrets.token_urlsafe(32)}"
    digest = f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"
    created = datetime.now(UTC).replace(microsecond=0)
    record = KeyRecord(key_id, tenant, digest, tuple(scopes), created, expires)
    _check(record)
    return key, record


def expiry_after(span: str, now: datetime) -> datetime:
    """Return the moment that is `span`, such as 90d, 12h or 30m, after `now`; raises ValueError."""
    found = _SPAN.fullmatch(span)
    if found is None:
        raise ValueError(f'"{span}" is no length of time; write 90d, 12h or 30m')
    return now.replace(microsecond=0) + timedelta(**{_UNITS[found[2]]: int(found[1])})


def append_key(path: Path, record: KeyRecord) -> None:
    """Add `record` at the end of the file `path`, which is made if it is missing, for its owner alone.

    Raises ConfigError if the file cannot be read or written.
    """
    lines = ["[[key]]", f'id = "{record.id}"', f'tenant = "{record.tenant}"', f'digest = "{record.digest}"']
    lines.append(f"scopes = [{', '.join(_quoted(scope) for scope in record.scopes)}]")
    for name, moment in (("created", record.created), ("expires", record.expires)):
        if moment is not None:
            lines.append(f"{name} = {moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}")
    with _locked(path, create=True):
        text = path.read_text(encoding="utf-8")
        gap = "" if not text else "\n" if text.endswith("\n") else "\n\n"
        with path.open("a", encoding="utf-8") as file:
            # In one call, so that a server that reads the file now sees all of the key or nothing.
            file.write(gap + "\n".join(lines) + "\n")


def remove_key(path: Path, key_id: str) -> KeyRecord:
    """Remove the key `key_id` from the file `path`, and keep every other line; raises ConfigError.

    A file that would be empty gets a comment: a server takes an empty file for one that is being written, and
    keeps the former keys.
    """
    with _locked(path):
        records = {record.id: record for record in read_key_file(path)}
        if key_id not in records:
            raise ConfigError(f'{path}: no key has the id "{key_id}"')
        blocks = re.split(r"(?m)^(?=\[)", path.read_text(encoding="utf-8"))
        kept = [block for block in blocks if _id_of(block) != key_id]
        # Another file takes its place in one step. Through a link, the file that it leads to is replaced.
        target = path.resolve()
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            temporary.write_text("".join(kept) or _NO_KEYS, encoding="utf-8")
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            temporary.replace(target)
        except OSError as error:
            raise ConfigError(f"{target}: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)
    return records[key_id]


def _parse(text: str) -> list[KeyRecord]:
    content = tomllib.loads(text)
    if unknown := [name for name in content if name != "key"]:
        raise ValueError(f'unknown table "{unknown[0][:80]}"; every key is a table [[key]]')
    tables = content.get("key", [])
    if not isinstance(tables, list):
        raise ValueError("write [[key]], with two brackets, for each key")
    records: list[KeyRecord] = []
    ids, digests = set(), set()
    for number, table in enumerate(tables, 1):
        try:
            record = _record(table)
        except ValueError as error:
            raise ValueError(f"key {number}: {error}") from None
        if record.id in ids or record.digest in digests:
            raise ValueError(
                f"key {number}: another key has the same {'id' if record.id in ids else 'digest'}"
            )
        ids.add(record.id)
        digests.add(record.digest)
        records.append(record)
    return records


def _record(table: Mapping[str, Any]) -> KeyRecord:
    """The record of a table; an error never quotes a value, because it may be a key in the wrong place."""
    if unknown := [name for name in table if name not in _FIELDS]:
        raise ValueError(f'unknown field "{unknown[0][:80]}"; the fields are {", ".join(_FIELDS)}')
    if missing := [name for name in _REQUIRED if name not in table]:
        raise ValueError(f'the field "{missing[0]}" is missing')
    for name in ("id", "tenant", "digest"):
        if not isinstance(table[name], str):
            raise ValueError(f'"{name}" must be a text')
    scopes = table["scopes"]
    if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
        raise ValueError('"scopes" must be a list of texts')
    for name in ("created", "expires"):
        moment = table.get(name)
        if moment is not None and (not isinstance(moment, datetime) or moment.tzinfo is None):
            raise ValueError(f'"{name}" must be a date and time with its zone, such as 2027-01-31T00:00:00Z')
    record = KeyRecord(
        table["id"],
        table["tenant"],
        table["digest"],
        tuple(scopes),
        table.get("created"),
        table.get("expires"),
    )
    _check(record)
    return record


def _check(record: KeyRecord) -> None:
    """Raise ValueError unless the fields of `record` have the right form."""
    for name, value in (("id", record.id), ("tenant", record.tenant)):
        if not _NAME.fullmatch(value):
            raise ValueError(f'"{name}" must have 1 to 64 letters, digits or the signs . _ @ -')
    if not _DIGEST.fullmatch(record.digest):
        raise ValueError(
            '"digest" must be sha256: and 64 hexadecimal digits, as `inferpool key new` prints it'
        )
    if not record.scopes:
        raise ValueError('"scopes" is empty; a key without a scope is of no use')
    parse_scopes(record.scopes)


def _id_of(block: str) -> str | None:
    """The id of the key in one block of the file, None if the block is something else."""
    try:
        tables = tomllib.loads(block).get("key", [])
    except tomllib.TOMLDecodeError:
        return None
    return tables[0].get("id") if isinstance(tables, list) and tables else None


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    if not escaped.isprintable():
        raise ConfigError("a scope has a character that cannot be printed")
    return f'"{escaped}"'


@contextlib.contextmanager
def _locked(path: Path, *, create: bool = False) -> Iterator[None]:
    """Hold the file `path` for one command at a time."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not os.path.samestat(os.fstat(descriptor), path.stat()):
                continue  # another command has replaced the file meanwhile
            yield
            return
        finally:
            os.close(descriptor)
