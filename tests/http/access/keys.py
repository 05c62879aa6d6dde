"""Keys for tests: a file of keys and one key for each scope."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from inferpool.http.access.key_file import append_key, new_key

MARK = "inferpool_MARKED_SECRET_7f3a9c"
"""No output may ever have this text, which begins a key that tests send."""


class KeyFile:
    """A file of keys. `keys` has them by the name that a test gives them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys: dict[str, str] = {}
        self.ids: dict[str, str] = {}

    def add(self, name: str, *scopes: str, tenant: str = "acme", expires_s: float | None = None) -> str:
        """Add a key with `scopes`, which expires in `expires_s` seconds."""
        moment = None if expires_s is None else datetime.now(UTC) + timedelta(seconds=expires_s)
        key, record = new_key(tenant, scopes, moment)
        append_key(self.path, record)
        self.keys[name], self.ids[name] = key, record.id
        return key

    def bearer(self, name: str) -> dict[str, str]:
        """The header with the key `name`."""
        return {"authorization": f"Bearer {self.keys[name]}"}


def with_every_scope(path: Path) -> KeyFile:
    """A file with a key for each scope, called as the scope; `all` has all of them, `expired` had them."""
    file = KeyFile(path)
    for scope in ("predict", "read", "metrics", "admin"):
        file.add(scope, scope)
    file.add("other", "predict:other")
    file.add("all", "predict", "read", "metrics", "admin")
    file.add("expired", "predict", "read", "metrics", "admin", expires_s=-1)
    return file
