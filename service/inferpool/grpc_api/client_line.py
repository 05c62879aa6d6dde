"""Says whose call it is, for the web process that gets the request: the first line of a connection to it."""

from __future__ import annotations

import logging
import time
from typing import Any, Final
from urllib.parse import unquote

from inferpool.http.access.certificate_expiry import expiry_of
from inferpool.http.connection.forwarded import introduce

log = logging.getLogger(__name__)

MOST_KNOWN: Final = 1024
_NAME_KINDS: Final = (("URI", "x509_uri"), ("DNS", "x509_dns"))


class ClientLines:
    """Makes the lines, and keeps those of the last clients."""

    def __init__(self, *, with_certificates: bool) -> None:
        """`with_certificates` says that a certificate may stand for a key."""
        self._with_certificates = with_certificates
        self._known: dict[tuple[str, bytes], bytes] = {}

    def of(self, context: Any) -> bytes:
        """Return the line for the client of a call."""
        certificate: dict[str, Any] | None = None
        pem = b""
        if self._with_certificates:
            facts = context.auth_context()
            pem = next(iter(facts.get("x509_pem_cert", ())), b"")
        peer = context.peer().rpartition(":")[0]  # without the port
        line = self._known.get((peer, pem))
        if line is not None:
            return line
        if pem:
            certificate = _described(facts, pem.decode("latin-1"))
        try:
            line = introduce(_address(peer), certificate)
        except ValueError as error:
            log.warning("%s: %s", peer, error)
            line = introduce(_address(peer), None)
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        self._known[peer, pem] = line
        return line


def _described(facts: Any, pem: str) -> dict[str, Any] | None:
    """Return what `SSLSocket.getpeercert` would say of a verified certificate, as far as it is needed."""
    try:
        expiry_s = expiry_of(pem)
    except (ValueError, IndexError):
        return None
    names = [
        [kind, name.decode("utf-8", "replace")]
        for kind, field in _NAME_KINDS
        for name in facts.get(field, ())
    ]
    return {
        "subject": [
            [["commonName", name.decode("utf-8", "replace")]] for name in facts.get("x509_common_name", ())
        ],
        "subjectAltName": names,
        "notAfter": time.strftime("%b %d %H:%M:%S %Y GMT", time.gmtime(expiry_s)),
    }


def _address(peer: str) -> str:
    """Return the address in a peer of gRPC, such as `ipv4:192.0.2.1` or `ipv6:%5B2001:db8::1%5D`."""
    kind, _, text = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return ""
    address = text.strip("[]")
    return address.removeprefix("::ffff:") if "." in address else address
