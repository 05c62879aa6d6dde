"""Where the server is and how to speak to it: address, certificates, keys, and the errors of httpx."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from inferpool.system.install_hints import install_command

try:
    import httpx
except ImportError as missing:
    raise ImportError(f"the client needs httpx: {install_command('client')}") from missing

from inferpool import __version__
from inferpool.client.content import Part
from inferpool.client.core import Failure

DEFAULT_URL: Final = "http://127.0.0.1:8000"
JOINED_BYTES: Final = 2 * 1024 * 1024
"""A body of at most so many bytes is sent in one piece: each piece is copied once in any case."""
SENT_BYTES: Final = 1024 * 1024
"""Bytes of a larger body that are sent at a time."""


class Address(NamedTuple):
    """Where a server is.

    Attributes:
        base: the beginning of every URL.
        options: keyword arguments of an httpx transport.
    """

    base: str
    options: dict[str, Any]


def make_address(
    url: str, ca: str | Path | None, certificate: tuple[str | Path, str | Path] | None, connections: int
) -> Address:
    """Read `url`, which is `http://HOST:PORT`, `https://…` or `unix:PATH`.

    `ca` is a file of the certificates to trust, `certificate` the files of the client's own and of its key.
    Raises ValueError for another URL, and OSError or ssl.SSLError if a file cannot be read.
    """
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    if url.startswith("unix:"):
        path = url.removeprefix("unix:").removeprefix("//")
        return Address("http://localhost", {"uds": path, "verify": False, "limits": limits})
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise ValueError(f"{url} is no address; expected http://HOST:PORT, https:// or unix:PATH")
    verify: bool | ssl.SSLContext = False  # without TLS; httpx would read all certificates of the machine
    if parts.scheme == "https":
        verify = ssl.create_default_context(cafile=None if ca is None else str(ca))
        if certificate is not None:
            verify.load_cert_chain(*map(str, certificate))
    return Address(url.rstrip("/"), {"verify": verify, "limits": limits})


def make_headers(key: str | None) -> list[tuple[str, str]]:
    """Return the headers of every request; raises ValueError if `key` cannot stand in a header."""
    headers = [("user-agent", f"inferpool-python/{__version__}")]
    if key:
        if not key.isascii() or not key.isprintable():
            raise ValueError("the key holds characters that no header can have")
        headers.append(("authorization", f"Bearer {key}"))
    return headers


@lru_cache(maxsize=256)
def make_url(text: str) -> httpx.URL:
    """Return a URL; reading one takes longer than all else that httpx does before it sends."""
    return httpx.URL(text)


def timeouts(timeout_s: float | None) -> dict[str, dict[str, float | None]]:
    """Return the timeouts of an attempt, as httpx has them."""
    return {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), timeout_s)}


def is_small(parts: Sequence[Part]) -> bool:
    """Whether a body is sent in one piece."""
    return sum(map(len, parts)) <= JOINED_BYTES


def pieces(parts: Sequence[Part]) -> Iterator[Any]:
    """Return the pieces in which a large body is sent, so that it is never in memory twice."""
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), SENT_BYTES):
            yield view[start : start + SENT_BYTES]


def read_failure(error: httpx.TransportError) -> Failure:
    """Return why there is no answer."""
    timed_out = isinstance(error, (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout))
    return Failure(str(error) or type(error).__name__, timed_out)
