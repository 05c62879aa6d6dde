"""TLS for gRPC, of the same files as for HTTP. Renewed files are noticed at the next handshake."""

from __future__ import annotations

import logging
import threading
from typing import Final

import grpc

from inferpool.errors import ConfigError
from inferpool.http.access.tls import TlsFiles, make_context

log = logging.getLogger(__name__)

_FileTimes = tuple[tuple[int, int] | None, ...]


class TlsCredentials:
    """Reads the files again when they have changed."""

    def __init__(self, files: TlsFiles) -> None:
        """Read `files`; raises ConfigError if they are not fit for TLS."""
        self._files: Final = files
        self._lock = threading.Lock()
        self._seen = self._times()
        self._configuration = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """Return the credentials for a port."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration,
            self._renewed,
            require_client_authentication=self._files.client_ca is not None,
        )

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the new configuration if the files have changed; threads of gRPC call this."""
        with self._lock:
            times = self._times()
            if times == self._seen:
                return None
            try:
                self._configuration = self._read()
            except ConfigError as error:
                # They may be half written: the next handshake looks again.
                log.warning(
                    "the renewed TLS files cannot be used, the old ones stay in use: %s", error.detail
                )
                return None
            self._seen = times
            log.info("new connections of gRPC use the renewed certificate in %s", self._files.certificate)
            return self._configuration

    def _read(self) -> grpc.ServerCertificateConfiguration:
        make_context(self._files)  # OpenSSL says in words what does not fit, and gRPC does not
        files = self._files
        try:
            certificate = files.certificate.read_bytes()
            key = certificate if files.key is None else files.key.read_bytes()
            roots = None if files.client_ca is None else files.client_ca.read_bytes()
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}") from error
        return grpc.ssl_server_certificate_configuration([(key, certificate)], roots)

    def _times(self) -> _FileTimes:
        times: list[tuple[int, int] | None] = []
        for file in self._files:
            try:
                status = None if file is None else file.stat()
            except OSError:
                status = None
            times.append(None if status is None else (status.st_ino, status.st_mtime_ns))
        return tuple(times)
