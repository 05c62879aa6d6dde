"""Cross-origin requests: which web pages may read the server's responses (the Fetch standard, section 3.3).

A browser sends the page's origin with a request, and lets the page read the response only if headers of the
response allow that origin. Before a request that a form could not send, the browser asks with a preflight: an
OPTIONS request without a body and without a key. Other clients ignore all of this.

The responses never allow credentials. Cookies and logins of the browser are therefore not sent, and a page
has to send its key itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from inferpool.http.problems import Headers

ANY: Final = "*"

_METHODS: Final = b"GET, HEAD, POST, PUT, DELETE, OPTIONS"
_EXPOSED: Final = (
    b"X-Request-Id, Server-Timing, Cache-Status, Retry-After, Allow, WWW-Authenticate,"
    b" Inference-Header-Content-Length"
)
"""The headers that a page may read beside those that the standard always allows."""
_USUAL_HEADERS: Final = (
    b"Authorization, Content-Type, Content-Encoding, Inference-Header-Content-Length, X-Api-Key,"
    b" X-Request-Id, X-Timeout-Ms, traceparent"
)
_MAX_AGE_S: Final = 3600
"""Seconds for which a browser may remember the answer to a preflight."""
_FIELD_NAMES: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+([ \t]*,[ \t]*[!#$%&'*+.^_`|~0-9A-Za-z-]+)*")
_MOST_NAMES_BYTES: Final = 1024

_FieldPairs = Iterable[tuple[bytes, bytes]]


class CorsPolicy:
    """The origins whose pages may read responses."""

    __slots__ = ("_allowed", "_any", "_refused")

    def __init__(self, origins: Sequence[str]) -> None:
        """Allow `origins`, as browsers spell them; with `*` among them, every origin."""
        self._any = ANY in origins
        # A response for one origin must not be given to another by a cache.
        vary = [] if self._any else [(b"vary", b"Origin")]
        exposed = (b"access-control-expose-headers", _EXPOSED)
        names = [ANY] if self._any else origins
        self._allowed: dict[bytes, Headers] = {
            name.encode(): [(b"access-control-allow-origin", name.encode()), exposed, *vary] for name in names
        }
        self._refused: Headers = vary

    def headers(self, origin: bytes | None) -> Headers:
        """Return the headers that a response to a page of `origin` has; None if the request names none."""
        if self._any:
            return self._allowed[b"*"]
        return self._refused if origin is None else self._allowed.get(origin, self._refused)

    def allows(self, origin: bytes) -> bool:
        """Return whether pages of `origin` may read responses."""
        return self._any or origin in self._allowed

    def preflight_headers(self, fields: _FieldPairs) -> Headers:
        """Return the headers of the answer to a preflight, beside those of `headers`."""
        asked = _USUAL_HEADERS
        for name, value in fields:
            # Any header may be sent: none of them lets a page do more than another client could.
            if name == b"access-control-request-headers" and len(value) <= _MOST_NAMES_BYTES:
                found = _FIELD_NAMES.fullmatch(value.strip())
                asked = value.strip() if found is not None else asked
        return [
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-allow-headers", asked),
            (b"access-control-max-age", b"%d" % _MAX_AGE_S),
            (b"vary", b"Access-Control-Request-Headers"),
        ]


def make_cors(origins: Sequence[str]) -> CorsPolicy | None:
    """Return the policy of the setting; None if it names no origin."""
    return CorsPolicy(origins) if origins else None


def origin_of(fields: _FieldPairs) -> bytes | None:
    """Return the origin that a request's headers name, or None."""
    return next((value for name, value in fields if name == b"origin"), None)


def is_preflight(method: str, fields: _FieldPairs) -> bool:
    """Return whether a request is the question of a browser before another request."""
    if method != "OPTIONS":
        return False
    names = {name for name, _ in fields}
    return b"origin" in names and b"access-control-request-method" in names
