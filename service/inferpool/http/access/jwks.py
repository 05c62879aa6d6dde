"""The public keys of an issuer of tokens, from a file or an address, fetched again in a thread.

No request waits for a fetch, and no client can cause more than one every few seconds.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from inferpool.errors import ConfigError, short_reason
from inferpool.observe.metrics import Metrics, Sample

log = logging.getLogger(__name__)

REFRESH_S: Final = 300.0
"""How often the keys are fetched."""
LEAST_PAUSE_S: Final = 10.0
"""Seconds between two fetches, however many tokens name a key that is not known."""
FETCH_TIMEOUT_S: Final = 5.0
MOST_BYTES: Final = 1 << 20
"""Bytes of a set of keys; more are not read."""
LEAST_RSA_BITS: Final = 2048

_CURVES: Final = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}
_RSA: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")


class PublicKey(NamedTuple):
    """One key of an issuer, and the algorithms that it may be used with."""

    key: Any
    algorithms: tuple[str, ...]


KeySet = Mapping[str | None, list[PublicKey]]
"""The keys of an issuer by their names; some issuers have one key without a name."""


def parse_key_set(data: bytes) -> KeySet:
    """Return the keys in a JSON Web Key Set (RFC 7517); raises ValueError if none of them is of use."""
    from jwt import PyJWK, PyJWTError

    content = json.loads(data)
    listed = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(listed, list):
        raise ValueError('no JSON Web Key Set: the list "keys" is missing')
    keys: dict[str | None, list[PublicKey]] = {}
    for item in listed:
        algorithms = _algorithms(item)
        if not algorithms:
            continue  # a key for something else: RFC 7517 (5) wants such keys ignored
        try:
            key = PyJWK(item, algorithms[0]).key
        except (PyJWTError, ValueError, TypeError):
            continue
        # A private key in the set is a mistake of its owner, and only its public half is of use.
        key = key.public_key() if hasattr(key, "private_bytes") else key
        if item["kty"] == "RSA" and key.key_size < LEAST_RSA_BITS:
            continue
        name = item.get("kid")
        keys.setdefault(name if isinstance(name, str) else None, []).append(PublicKey(key, algorithms))
    if not keys:
        raise ValueError("the JSON Web Key Set has no key that can verify tokens")
    return keys


class JwksWatch:
    """Keeps the keys of an issuer up to date.

    Attributes:
        keys: the keys as they were fetched last; None until the first fetch succeeds.
    """

    def __init__(
        self, source: str, changed: Callable[[], None], clock: Callable[[], float], metrics: Metrics
    ) -> None:
        """`source` is a file or an address; `changed` is called on the event loop when the keys are others.

        Raises ConfigError if the file cannot be read, or the address is not safe.
        """
        self.keys: KeySet | None = None
        self._source = source
        self._changed = changed
        self._clock = clock
        self._data = b""
        self._stale = False
        self._tried_at = 0.0
        self._loop: Any = None
        self._wake = threading.Event()
        self._closed = False
        self._worker = threading.Thread(target=self._run, name="jwks", daemon=True)
        self._is_address = _check_source(source)
        if not self._is_address:
            try:
                self._take(self._fetch())
            except (OSError, ValueError) as error:
                raise ConfigError(f"{source}: {short_reason(error)}") from error
        metrics.add_source(self._readings)

    def start(self, loop: Any) -> None:
        """Start the thread; `changed` is called on the event loop `loop`."""
        self._loop = loop
        self._worker.start()

    def close(self) -> None:
        """End the thread, without waiting for a fetch."""
        self._closed = True
        self._wake.set()

    def refresh_soon(self) -> None:
        """Fetch the keys now, because a token names another one; does nothing just after a fetch."""
        if self._clock() >= self._tried_at + LEAST_PAUSE_S:
            self._wake.set()

    def refresh(self) -> None:
        """Fetch the keys; if that fails, the former ones stay valid."""
        self._tried_at = self._clock()
        try:
            self._take(self._fetch())
        except (OSError, ValueError) as error:
            if not self._stale:
                log.error(
                    "the keys of tokens could not be read from %s: %s", self._source, short_reason(error)
                )
            self._stale = True
            return
        if self._stale:
            log.info("the keys of tokens can be read again")
        self._stale = False

    def _take(self, data: bytes) -> None:
        if data == self._data:
            return
        self.keys = parse_key_set(data)
        self._data = data
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._changed)

    def _run(self) -> None:
        while not self._closed:
            try:
                self.refresh()
            except Exception:
                log.exception("fetching the keys of tokens failed")
            self._wake.wait(LEAST_PAUSE_S if self._stale else REFRESH_S)
            self._wake.clear()

    def _fetch(self) -> bytes:
        if not self._is_address:
            return Path(self._source).read_bytes()
        request = Request(self._source, headers={"accept": "application/json", "user-agent": "inferpool"})
        with _OPENER.open(request, timeout=FETCH_TIMEOUT_S) as response:
            began = time.monotonic()
            parts, size = [], 0
            # In parts, so that neither a long nor a slow answer holds the thread.
            while part := response.read1(65_536):
                parts.append(part)
                size += len(part)
                if size > MOST_BYTES or time.monotonic() > began + FETCH_TIMEOUT_S:
                    raise ValueError("the JSON Web Key Set is too long or comes too slowly")
            return b"".join(parts)

    def _readings(self) -> list[Sample]:
        return [("stale_keys", ("jwt_keys",), float(self._stale))]


class _NoRedirect(HTTPRedirectHandler):
    """Follows no redirect: it could lead from a safe address to another one."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


_OPENER: Final = build_opener(_NoRedirect)


def _check_source(source: str) -> bool:
    """Return whether `source` is an address; raises ConfigError if others could change what it answers."""
    url = urlsplit(source)
    if url.scheme not in ("http", "https"):
        return False
    if url.scheme == "http" and url.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise ConfigError(f"jwt_keys: {source} is not encrypted, so its keys could be forged; use https://")
    if url.username or url.password:
        raise ConfigError("jwt_keys: the address has a user name or a password; leave them out")
    return True


def _algorithms(item: Any) -> tuple[str, ...]:
    """The algorithms that a key may be used with, none if it cannot verify tokens."""
    if not isinstance(item, dict) or item.get("use", "sig") != "sig":
        return ()
    operations = item.get("key_ops")
    if isinstance(operations, list) and "verify" not in operations:
        return ()
    kind = item.get("kty")
    if kind == "RSA":
        fit: tuple[str, ...] = _RSA
    elif kind == "EC":
        fit = tuple(name for curve, name in _CURVES.items() if curve == item.get("crv"))
    else:
        fit = ("EdDSA",) if kind == "OKP" and item.get("crv") in ("Ed25519", "Ed448") else ()
    own = item.get("alg")
    return fit if own is None else tuple(name for name in fit if name == own)
