"""What makes the head of a request invalid although the parser takes it (RFC 9112, 3.2, 6.1 and 6.3)."""

from __future__ import annotations

import re
from typing import Final

from inferpool.errors import InferpoolError, MalformedRequest, UnsupportedTransferCoding

_HOST: Final = re.compile(
    rb"[ \t]*(?:\[[0-9a-f:.]{2,45}\]|\[v[0-9a-f]+\.[a-z0-9._~!$&'()*+,;=:-]+\]|"
    rb"(?:[a-z0-9._~!$&'()*+,;=-]|%[0-9a-f]{2})*)(?::[0-9]*)?[ \t]*",
    re.IGNORECASE,
)
"""A host and perhaps a port, as in a URL (RFC 3986, 3.2.2). Both may be empty."""
_MOST_HOSTS: Final = 64
_MOST_HOST_BYTES: Final = 256
"""A longer value is not kept, to bound the memory."""
_SHOWN_BYTES: Final = 60


class HeadChecker:
    """Checks heads, and keeps the values of `Host` that were valid, because most clients send the same."""

    __slots__ = ("_hosts",)

    def __init__(self) -> None:
        self._hosts: set[bytes] = set()

    def fault(self, headers: list[tuple[bytes, bytes]], version: str) -> InferpoolError | None:
        """Return why a head is refused, or None.

        The names of the `headers` must be lower-case. `version` is that of HTTP, such as "1.1".
        """
        hosts = 0
        host = b""
        codings: list[bytes] | None = None
        for name, value in headers:
            if name == b"host":
                hosts += 1
                host = value
            elif name == b"transfer-encoding":
                codings = [value] if codings is None else [*codings, value]
        if hosts != 1 and (hosts or version == "1.1"):
            if hosts:
                return MalformedRequest(f"the request has {hosts} Host headers; send one")
            return MalformedRequest("the request has no Host header, which HTTP/1.1 requires; send one")
        if host not in self._hosts and not self._is_valid(host):
            return MalformedRequest(
                f'the Host header is "{_shown(host)}"; expected a name or an address, and perhaps a port'
            )
        if codings is not None:
            return _coding_fault(b",".join(codings), version)
        if version != "1.1" and version != "1.0":
            return MalformedRequest(f"the request is of HTTP/{version}; send HTTP/1.1")
        return None

    def _is_valid(self, host: bytes) -> bool:
        if _HOST.fullmatch(host) is None:
            return False
        if len(host) <= _MOST_HOST_BYTES:
            if len(self._hosts) >= _MOST_HOSTS:
                self._hosts.clear()
            self._hosts.add(host)
        return True


def _coding_fault(field: bytes, version: str) -> InferpoolError | None:
    """Return why a body with the transfer codings in `field` is refused, or None."""
    if version != "1.1":
        return MalformedRequest(
            f"the request is of HTTP/{version} and has the header Transfer-Encoding; send HTTP/1.1, or"
            " Content-Length instead"
        )
    codings = [coding.strip().lower() for coding in field.split(b",") if coding.strip()]
    if not codings or codings[-1] != b"chunked":
        return MalformedRequest(
            f'Transfer-Encoding is "{_shown(field)}"; expected "chunked" as its last coding, because nothing'
            " else tells where the body ends"
        )
    for coding in codings[:-1]:
        if coding == b"chunked":
            return MalformedRequest(
                f'Transfer-Encoding is "{_shown(field)}"; send "chunked" once, as the last'
            )
        return UnsupportedTransferCoding(
            f'the transfer coding "{_shown(coding)}" is not supported; send "Transfer-Encoding: chunked", and'
            " compress the body with Content-Encoding"
        )
    return None


def _shown(value: bytes) -> str:
    return value[:_SHOWN_BYTES].decode("latin-1")
