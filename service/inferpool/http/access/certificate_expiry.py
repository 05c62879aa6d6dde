"""When a certificate expires, read from its file.

The module `ssl` tells this of the certificates of clients alone. So the few fields before the dates are
skipped here (RFC 5280, 4.1); everything else was checked by OpenSSL, which has loaded the file before.
"""

from __future__ import annotations

import re
import ssl
from datetime import UTC, datetime
from typing import Final

_BLOCK: Final = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_SEQUENCE: Final = 0x30
_VERSION: Final = 0xA0
_UTC_TIME: Final = 0x17


def expiry_of(pem: str) -> float:
    """Return when the first of the certificates in a PEM file expires, in seconds since 1970.

    Raises ValueError if there is no certificate.
    """
    blocks = _BLOCK.findall(pem)
    if not blocks:
        raise ValueError("no certificate in PEM format is in the file")
    return min(_not_after(ssl.PEM_cert_to_DER_cert(block)) for block in blocks)


def _not_after(der: bytes) -> float:
    certificate, _ = _element(der, _SEQUENCE)
    rest, _ = _element(certificate, _SEQUENCE)
    if rest[0] == _VERSION:
        _, rest = _element(rest)
    for _ in range(3):  # the serial number, the algorithm of the signature, the issuer
        _, rest = _element(rest)
    dates, _ = _element(rest, _SEQUENCE)
    _, rest = _element(dates)
    text, _ = _element(rest)
    digits = text.decode("ascii")
    if rest[0] == _UTC_TIME:
        # RFC 5280, 4.1.2.5.1: two digits of a year mean 1950 to 2049.
        digits = ("20" if digits < "5" else "19") + digits
    return datetime.strptime(digits, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _element(data: bytes, kind: int | None = None) -> tuple[bytes, bytes]:
    """Return the content of the first element of DER data, and what follows; raises ValueError."""
    if len(data) < 2 or kind not in (None, data[0]):
        raise ValueError("the certificate has another form than X.509")
    size, start = data[1], 2
    if size & 0x80:
        start += size & 0x7F
        size = int.from_bytes(data[2:start])
    if start + size > len(data):
        raise ValueError("the certificate is cut off")
    return data[start : start + size], data[start + size :]
