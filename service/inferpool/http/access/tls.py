"""TLS for new connections, of certificate files that may be renewed while the server runs."""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
from pathlib import Path
from typing import Final, NamedTuple

from inferpool.errors import ConfigError
from inferpool.http.access.certificate_expiry import expiry_of
from inferpool.observe.metrics import Sample
from inferpool.settings import Settings

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
"""Pause between two looks at the files."""
_HTTP: Final = "http/1.1"

_FileStates = tuple[tuple[int, int, int] | None, ...]


class TlsFiles(NamedTuple):
    """The PEM files of a server.

    Attributes:
        certificate: the certificate, and behind it those of the authorities between it and a known one.
        key: the private key; None if it is in the certificate's file.
        client_ca: the authorities whose certificates clients have to show; None if clients need none.
    """

    certificate: Path
    key: Path | None
    client_ca: Path | None


class Certificates:
    """Makes TLS contexts of files, and makes a new one when the files have changed.

    Connections keep the context with which they began.

    Attributes:
        context: the context for new connections.
        expiry_s: when the certificate expires, in seconds since 1970; infinity if that is not known.
    """

    def __init__(self, files: TlsFiles) -> None:
        """Read `files`; raises ConfigError if they are not fit for TLS."""
        self._files = files
        self._read = self._seen = self._states()
        self.context = make_context(files)
        self.expiry_s = _expiry(files.certificate)

    def look(self) -> None:
        """Read the files again if they have changed since they were read, and not since the last look.

        A pair that does not fit changes nothing but the log: it may be half written.
        """
        states = self._states()
        if states != self._seen:
            self._seen = states  # the other files may follow in a moment
            return
        if states == self._read:
            return
        self._read = states
        try:
            self.context = make_context(self._files)
        except ConfigError as error:
            log.error("the renewed TLS files cannot be used, the old ones stay in use: %s", error.detail)
            return
        self.expiry_s = _expiry(self._files.certificate)
        log.info("new connections use the renewed certificate in %s", self._files.certificate)

    def readings(self) -> list[Sample]:
        """Return the gauge of the expiry."""
        return [("tls_certificate_expiry_timestamp_seconds", (), self.expiry_s)]

    def _states(self) -> _FileStates:
        return tuple(_state(file) for file in self._files)


def make_certificates(settings: Settings) -> Certificates | None:
    """The certificates of a server, or None if it takes plain HTTP. Raises ConfigError."""
    if settings.tls_certificate_file is None:
        return None
    return Certificates(
        TlsFiles(settings.tls_certificate_file, settings.tls_key_file, settings.tls_client_ca_file)
    )


async def wait_for_certificates(settings: Settings) -> Certificates | None:
    """Return what `make_certificates` makes, and wait while the files are not fit for use.

    They were tried before the server listened. A process that replaces another may find them half renewed.
    """
    while True:
        try:
            return make_certificates(settings)
        except ConfigError as error:
            log.error("no connection is accepted until TLS can be used: %s", error.detail)
        await asyncio.sleep(LOOK_S)


def make_context(files: TlsFiles) -> ssl.SSLContext:
    """A context for the connections of a server: TLS 1.2 and later. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    # A client that also speaks HTTP/2 is told that this server does not.
    context.set_alpn_protocols([_HTTP])
    for file in filter(None, files):
        try:
            file.open("rb").close()
        except OSError as error:
            raise ConfigError(f"{file}: {error.strerror}; TLS needs a file in PEM format") from error
    try:
        context.load_cert_chain(files.certificate, files.key, password=_refuse_password)
    except ssl.SSLError as error:
        names = f"{files.certificate} and {files.key}" if files.key else str(files.certificate)
        raise ConfigError(f"{names}: {_reason(error)}") from error
    if files.client_ca is not None:
        try:
            context.load_verify_locations(files.client_ca)
        except ssl.SSLError as error:
            raise ConfigError(f"{files.client_ca}: no certificate in PEM format is in the file") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _expiry(certificate: Path) -> float:
    """When a certificate that OpenSSL has taken expires."""
    try:
        return expiry_of(certificate.read_text(encoding="latin-1"))
    except (OSError, ValueError) as error:
        log.warning("%s: when the certificate expires is not known: %s", certificate, error)
        return math.inf


def _refuse_password() -> str:
    # Without this function, OpenSSL would ask at the terminal.
    raise ConfigError(
        "the private key of TLS is encrypted; the server has nobody to ask for the password: give it a"
        " file that only its user can read, as openssl pkey -in KEY -out NEW writes one"
    )


def _reason(error: ssl.SSLError) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return "the private key is not that of the certificate"
    return "the files must be a certificate and its private key in PEM format"


def _state(file: Path | None) -> tuple[int, int, int] | None:
    """What changes if the file, or the folder that a link in its path names, is replaced."""
    if file is None:
        return None
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
