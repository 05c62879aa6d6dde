"""Whose request it is by the certificate of its client (mutual TLS), if clients may send that for a key."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from inferpool.http.access.caller import Caller
from inferpool.http.access.key_file import parse_scopes

KEYLESS: Final = "keyless"
"""The key in a scope's state of the caller that a request of its connection has if it comes without a key."""
_NAME: Final = re.compile(r"[A-Za-z0-9._@|:/+-]{1,128}")


class CertificateCallers:
    """Makes callers of certificates that TLS has verified."""

    def __init__(
        self, scopes: Sequence[str], public: int, clock: Callable[[], float], wall_clock: Callable[[], float]
    ) -> None:
        """Every certificate has `scopes`, and the sum of scopes `public`.

        Raises ValueError for an unknown scope.
        """
        self._scopes, self._models = parse_scopes(scopes)
        self._scopes |= public
        self._clock = clock
        self._wall_clock = wall_clock

    def of(self, certificate: Mapping[str, Any]) -> Caller | None:
        """Return the caller that a certificate, as `SSLSocket.getpeercert` describes it, names.

        That is the common name of its subject, or if it has none, the first URI or DNS name among its
        alternative names. None if no such name is fit for a log and a metric.
        """
        name = next((name for name in _names(certificate) if _NAME.fullmatch(name)), None)
        if name is None:
            return None
        left_s = ssl.cert_time_to_seconds(certificate["notAfter"]) - self._wall_clock()
        return Caller(name, name, self._scopes, self._models, self._clock() + left_s)


def _names(certificate: Mapping[str, Any]) -> Iterator[str]:
    for attributes in certificate.get("subject", ()):
        for kind, value in attributes:
            if kind == "commonName":
                yield value
    for wanted in ("URI", "DNS"):
        for kind, value in certificate.get("subjectAltName", ()):
            if kind == wanted:
                yield value
