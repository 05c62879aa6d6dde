"""Keeps samples in an encrypted SQLite database, of bounded size, from which each can be deleted.

Ids of requests and names of tenants are never part of a path or of a query's text: they are looked up by
their tokens. All web processes of a server share the database; SQLite serialises them. The database is in a
folder of its own, which belongs to this user alone, so nobody else can put links there.
"""

from __future__ import annotations

import fcntl
import math
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from inferpool.errors import ConfigError
from inferpool.privacy.keys import SampleKeys
from inferpool.privacy.sample import Sample, Totals, from_bytes

FOLDER: Final = "inferpool-samples"
FILE: Final = "samples.sqlite3"
_BUSY_S: Final = 5.0
_PAGE_BYTES: Final = 4096
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS samples (
    number INTEGER PRIMARY KEY AUTOINCREMENT, token BLOB NOT NULL, tenant BLOB NOT NULL, model TEXT NOT NULL,
    version INTEGER NOT NULL, created REAL NOT NULL, rows INTEGER NOT NULL, key TEXT NOT NULL,
    body BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS by_token ON samples (token);
CREATE INDEX IF NOT EXISTS by_tenant ON samples (tenant);
CREATE INDEX IF NOT EXISTS by_age ON samples (created);
CREATE TABLE IF NOT EXISTS deletions (
    token BLOB, tenant BLOB, model TEXT, version INTEGER, before REAL NOT NULL);
CREATE INDEX IF NOT EXISTS by_moment ON deletions (before);
CREATE TABLE IF NOT EXISTS totals (one INTEGER PRIMARY KEY CHECK (one = 1), held INTEGER, bytes INTEGER);
INSERT OR IGNORE INTO totals VALUES (1, 0, 0);
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON samples BEGIN
    UPDATE totals SET held = held + 1, bytes = bytes + length(NEW.body); END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON samples BEGIN
    UPDATE totals SET held = held - 1, bytes = bytes - length(OLD.body); END;
"""
_MEANT: Final = """
SELECT 1 FROM deletions WHERE before >= ? AND (token IS NULL OR token = ?) AND (tenant IS NULL OR tenant = ?)
    AND (model IS NULL OR model = ?) AND (version IS NULL OR version = ?)"""
_LONGEST_WAIT_S: Final = 600.0
"""How long a sample may have waited before it is added. A deletion is remembered for so long."""
MOST_DELETIONS: Final = 2048
"""Deletions that are remembered one by one; one deletion of all samples replaces the older half of more."""
_EXPIRED_AT_ONCE: Final = 256
"""Samples deleted for room in one statement, oldest first."""


class StoreLimits(NamedTuple):
    """The most samples, the most bytes of them, and their greatest age in seconds."""

    samples: int
    nbytes: int
    age_s: float


class Listed(NamedTuple):
    """A sample in the store; `sample` is None if its key is gone or its bytes were changed."""

    number: int
    model: str
    version: int
    created: float
    rows: int
    nbytes: int
    key: str
    sample: Sample | None


class SealedSample(NamedTuple):
    """A sample as the store keeps it: tokens of its id and tenant, the columns, and the encrypted body."""

    token: bytes
    tenant: bytes
    model: str
    version: int
    created: float
    rows: int
    key: str
    body: bytes


class Added(NamedTuple):
    """The result of adding samples.

    Attributes:
        totals: the samples and bytes that the store holds now.
        deleted: how many were left out, because a deletion had meant them.
    """

    totals: Totals
    deleted: int


class Choice(NamedTuple):
    """Which samples are meant: those for which all that is set holds."""

    request_id: str | None = None
    tenant: str | None = None
    model: str | None = None
    version: int | None = None
    before: float | None = None


class SampleStore:
    """The samples of a server. Each method may be called in any thread, and waits for the disk.

    Samples are added by one connection, which stays open until `close`: opening one, and the checkpoint when
    the last one closes, take more time than the samples.

    A deletion also holds for samples that another thread or process has gathered before, and adds later:
    the store remembers the deletions of the last minutes.

    Attributes:
        failures: what methods raise if the disk fails; names them for modules that do not import sqlite3.
    """

    failures: Final = (sqlite3.Error, OSError)

    def __init__(self, folder: Path, keys: SampleKeys, limits: StoreLimits) -> None:
        """Open, or make, the store in `folder`; raises ConfigError if it cannot be used."""
        self._keys = keys
        self._limits = limits
        self._adding = threading.Lock()
        self._kept: sqlite3.Connection | None = None
        self._identity = (0, 0)
        own = folder / FOLDER
        self._file = own / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            own.mkdir(mode=0o700, exist_ok=True)
            status = own.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
                raise ConfigError(
                    f"samples_dir: {own} must be a folder of this user that no other user may enter; it has"
                    f" the mode {stat.filemode(status.st_mode)}"
                )
            with _locked(own), closing(self._connect()) as database:
                # So that deletes are overwritten, and a crash leaves no half of a sample.
                database.execute("PRAGMA journal_mode = WAL")
                database.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"samples_dir: {own}: {error}") from error

    def seal(self, sample: Sample) -> SealedSample:
        """Encrypt a sample, for `add`."""
        keys = self._keys
        about = _about(sample.model, sample.version, sample.created, sample.rows, keys.current)
        return SealedSample(
            keys.token("id", sample.request_id), keys.token("tenant", sample.tenant), sample.model,
            sample.version, sample.created, sample.rows, keys.current, keys.encrypt(sample.to_bytes(), about),
        )  # fmt: skip

    def add(self, samples: Sequence[SealedSample]) -> Added:
        """Keep `samples`, and delete the oldest ones for room; raises sqlite3.Error, such as a full disk.

        Samples that `delete` would have deleted, had they been there, are not kept.
        """
        now = time.time()
        with self._adding, self._kept_connection() as database:
            database.execute("BEGIN IMMEDIATE")
            rows = self._not_deleted(database, samples)
            database.execute("DELETE FROM samples WHERE created < ?", (now - self._limits.age_s,))
            # First, because a database that is as large as it may be takes no sample more.
            self._make_room(database, len(rows), sum(len(row.body) for row in rows))
            database.executemany(
                "INSERT INTO samples (token, tenant, model, version, created, rows, key, body)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                rows,
            )
            return Added(self._make_room(database, 0, 0), len(samples) - len(rows))

    def _not_deleted(
        self, database: sqlite3.Connection, samples: Sequence[SealedSample]
    ) -> Sequence[SealedSample]:
        """Those of `samples` that no deletion has meant since."""
        oldest = min((each.created for each in samples), default=math.inf)
        if not _holds(database, "SELECT 1 FROM deletions WHERE before >= ?", (oldest,)):
            return samples
        kept = []
        for each in samples:
            tokens = self._deleted(each.token), self._deleted(each.tenant)
            if not _holds(database, _MEANT, (each.created, *tokens, each.model, each.version)):
                kept.append(each)
        return kept

    def _deleted(self, token: bytes) -> bytes:
        """Hash a token by a key for a deletion: nobody else can tell whose sample was deleted."""
        return self._keys.token("deleted", token.hex())

    def close(self) -> None:
        """Close the connection that adds samples; the next samples open another one."""
        with self._adding:
            if self._kept is not None:
                self._kept.close()
                self._kept = None

    def _kept_connection(self) -> sqlite3.Connection:
        """The open connection to the database; raises OSError if the file is gone. Callers hold `_adding`."""
        status = self._file.stat()
        identity = status.st_dev, status.st_ino
        if self._kept is not None and self._identity != identity:
            # Another file has its name now: what is added to the old one is lost.
            self._kept.close()
            self._kept = None
        if self._kept is None:
            self._kept = self._connect(check_same_thread=False)  # `_adding` lets one thread in
            self._identity = identity
        return self._kept

    def _make_room(self, database: sqlite3.Connection, count: int, nbytes: int) -> Totals:
        """Delete the oldest samples until there is room for `count` more with `nbytes`; returns the rest."""
        most = self._limits.samples - count
        most_bytes = self._limits.nbytes - nbytes
        while (totals := _totals(database)).held and (totals.held > most or totals.nbytes > most_bytes):
            some = min(_EXPIRED_AT_ONCE, max(1, totals.held - most))
            database.execute(
                "DELETE FROM samples WHERE number IN (SELECT number FROM samples ORDER BY number LIMIT ?)",
                (some,),
            )
        return totals

    def expire(self) -> Totals:
        """Delete the samples that are too old; raises sqlite3.Error."""
        with closing(self._connect()) as database:
            with database:
                now = time.time()
                database.execute("DELETE FROM samples WHERE created < ?", (now - self._limits.age_s,))
                self._forget_deletions(database, now)
                totals = self._make_room(database, 0, 0)
            # The log still has the pages as they were, also those of samples that made room for others.
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return totals

    def delete(self, choice: Choice) -> int:
        """Delete the samples that `choice` means, overwrite their bytes, and return how many there were.

        Those that wait to be added are deleted when they are, and not part of the number.

        Raises sqlite3.Error, and ValueError if `choice` names nothing.
        """
        if choice == Choice():
            raise ValueError("nothing says which samples are to be deleted")
        where, values = self._where(choice)
        now = time.time()
        before = now if choice.before is None else min(now, choice.before)
        with closing(self._connect()) as database:
            with database:
                database.execute("BEGIN IMMEDIATE")
                # First, because a database that is as large as it may be then has room for the deletion.
                count = database.execute(f"DELETE FROM samples{where}", values).rowcount
                if before > now - _LONGEST_WAIT_S:
                    tokens = [
                        None if text is None else self._deleted(self._keys.token(kind, text))
                        for kind, text in (("id", choice.request_id), ("tenant", choice.tenant))
                    ]
                    database.execute(
                        "INSERT INTO deletions VALUES (?, ?, ?, ?, ?)",
                        (*tokens, choice.model, choice.version, before),
                    )
                    self._forget_deletions(database, now)
            # The log still has the pages as they were.
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return count

    def _forget_deletions(self, database: sqlite3.Connection, now: float) -> None:
        """Forget the deletions for which no sample waits any more, and bound the others.

        A database full of deletions would take neither samples nor deletions. Samples that have waited since
        the older half of too many deletions are lost: it is not known any more which of them were meant.
        """
        database.execute("DELETE FROM deletions WHERE before < ?", (now - _LONGEST_WAIT_S,))
        if database.execute("SELECT count(*) FROM deletions").fetchone()[0] > MOST_DELETIONS:
            [middle] = database.execute(
                "SELECT before FROM deletions ORDER BY before DESC LIMIT 1 OFFSET ?", (MOST_DELETIONS // 2,)
            ).fetchone()
            database.execute("DELETE FROM deletions WHERE before <= ?", (middle,))
            database.execute("INSERT INTO deletions VALUES (NULL, NULL, NULL, NULL, ?)", (middle,))

    def read(self, choice: Choice, after: int, most: int, most_bytes: int) -> list[Listed]:
        """At most `most` samples of `choice` after a number, oldest first; empty at the end.

        It ends after the sample with which the bodies have `most_bytes`. Raises sqlite3.Error.
        """
        where, values = self._where(choice)
        query = (
            "SELECT number, model, version, created, rows, key, body FROM samples"
            f"{where}{' AND' if where else ' WHERE'} number > ? ORDER BY number LIMIT ?"
        )
        found: list[Listed] = []
        with closing(self._connect()) as database:
            for row in database.execute(query, (*values, after, most)):
                found.append(self._opened(*row))
                most_bytes -= len(row[-1])
                if most_bytes <= 0:
                    break
        return found

    def totals(self) -> Totals:
        """How many samples there are, and their bytes; raises sqlite3.Error."""
        with self._adding:
            return _totals(self._kept_connection())

    def _opened(
        self, number: int, model: str, version: int, created: float, rows: int, key: str, body: bytes
    ) -> Listed:
        content = self._keys.decrypt(key, body, _about(model, version, created, rows, key))
        sample = None if content is None else from_bytes(content)
        return Listed(number, model, version, created, rows, len(body), key, sample)

    def _where(self, choice: Choice) -> tuple[str, list[object]]:
        parts: list[str] = []
        values: list[object] = []
        for column, kind, text in (("token", "id", choice.request_id), ("tenant", "tenant", choice.tenant)):
            if text is not None:
                names = self._keys.names
                tokens = ", ".join("?" * len(names))
                parts.append(f"{column} IN ({tokens})")
                values += [self._keys.token(kind, text, name) for name in names]
        for condition, value in (
            ("model = ?", choice.model),
            ("version = ?", choice.version),
            ("created < ?", choice.before),
        ):
            if value is not None:
                parts.append(condition)
                values.append(value)
        return (" WHERE " + " AND ".join(parts) if parts else ""), values

    def _connect(self, *, check_same_thread: bool = True) -> sqlite3.Connection:
        database = sqlite3.connect(
            self._file, timeout=_BUSY_S, isolation_level=None, check_same_thread=check_same_thread
        )
        database.execute("PRAGMA secure_delete = ON")
        database.execute("PRAGMA synchronous = NORMAL")
        # Twice the samples: pages of indices, and pages that deletes have left half empty.
        pages = 256 + 2 * self._limits.nbytes // _PAGE_BYTES
        database.execute(f"PRAGMA max_page_count = {pages}")
        return database


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes of the server out: two cannot change the mode of a database at once."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _totals(database: sqlite3.Connection) -> Totals:
    return Totals(*database.execute("SELECT held, bytes FROM totals").fetchone())


def _holds(database: sqlite3.Connection, query: str, values: Sequence[object]) -> bool:
    return bool(database.execute(f"SELECT EXISTS ({query})", values).fetchone()[0])


def _about(model: str, version: int, created: float, rows: int, key: str) -> bytes:
    return f"{model}\0{version}\0{created!r}\0{rows}\0{key}".encode()
