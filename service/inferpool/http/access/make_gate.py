"""Makes the gate that the settings describe, and what keeps its keys up to date."""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

from inferpool.errors import ConfigError
from inferpool.http.access.caller import PUBLIC, SCOPES
from inferpool.http.access.client_certificates import CertificateCallers
from inferpool.http.access.gate import KEYED, OFF, OPEN, Gate
from inferpool.http.access.key_file import parse_scopes
from inferpool.http.access.key_file_watch import KeyFileWatch
from inferpool.http.access.refusals import Refusals
from inferpool.http.access.trusted_proxies import make_proxies
from inferpool.observe.metrics import Metrics
from inferpool.settings import Settings
from inferpool.system.install_hints import install_command

log = logging.getLogger(__name__)


class KeySource(Protocol):
    """What keeps keys up to date in a thread of its own."""

    def start(self, loop: Any) -> None:
        """Start; changes take effect on the event loop `loop`."""

    def close(self) -> None:
        """End."""


def has_keys(settings: Settings) -> bool:
    """Whether requests need keys, tokens, or certificates in their place."""
    return settings.keys_file is not None or settings.jwt_keys is not None or bool(settings.tls_client_scopes)


def check_exposure(settings: Settings) -> None:
    """Warn if anyone on the network may use the server; raises ConfigError if anyone may administer it."""
    if has_keys(settings) or settings.tls_client_ca_file is not None:
        return
    if _is_local(settings.host):
        return
    if settings.unix_socket is not None and settings.grpc_port is None:
        return  # gRPC listens on `host`, whatever HTTP does
    if settings.admin_routes == "on":
        raise ConfigError(
            f"admin_routes is on, and everyone who reaches {settings.host} could use them; set --keys-file,"
            " or listen on 127.0.0.1"
        )
    log.warning(
        "everyone who reaches %s may use every model, because the server has no keys; set --keys-file, or"
        " listen on 127.0.0.1",
        settings.host,
    )


def make_gate(
    settings: Settings, clock: Callable[[], float], metrics: Metrics
) -> tuple[Gate, list[KeySource]]:
    """The gate for `settings`, whose moments are those of `clock`, and the sources of its keys.

    Raises ConfigError if keys cannot be read, or settings do not fit together.
    """
    if not has_keys(settings):
        return Gate(clock, admin=OPEN if settings.admin_routes == "on" else KEYED), []
    public = sum(SCOPES[name] for name in set(settings.public_scopes)) | PUBLIC
    admin = OFF if settings.admin_routes == "off" else KEYED
    gate = Gate(
        clock,
        enabled=True,
        public=public,
        admin=admin,
        refusals=Refusals(metrics, clock),
        proxies=make_proxies(settings.trusted_proxies),
    )
    sources: list[KeySource] = []
    if settings.keys_file is not None:
        sources.append(KeyFileWatch(settings.keys_file, gate, clock, metrics))
    if settings.jwt_keys is not None:
        sources.append(_add_tokens(gate, settings, clock, metrics))
    if settings.tls_client_scopes:
        try:
            callers = CertificateCallers(settings.tls_client_scopes, public, clock, time.time)
        except ValueError as error:
            raise ConfigError(f"tls_client_scopes: {error}") from None
        gate.use_certificates(callers)
    return gate, sources


def _add_tokens(gate: Gate, settings: Settings, clock: Callable[[], float], metrics: Metrics) -> KeySource:
    """Let `gate` accept tokens."""
    # Imported late, because few servers take tokens.
    from inferpool.http.access.jwks import JwksWatch
    from inferpool.http.access.tokens import TokenVerifier

    try:
        import jwt  # noqa: F401 - an extra, which may not be installed
    except ImportError as error:
        raise ConfigError(f"jwt_keys needs a package that is missing: {install_command('jwt')}") from error
    assert settings.jwt_keys is not None  # the caller has looked
    assert settings.jwt_issuer is not None  # the settings need both
    scope_map = dict(pair.split("=", 1) for pair in settings.jwt_scopes)
    try:
        parse_scopes(list(scope_map.values()))
    except ValueError as error:
        raise ConfigError(f"jwt_scopes: {error}") from None
    keys = JwksWatch(settings.jwt_keys, gate.forget, clock, metrics)
    gate.use_tokens(
        TokenVerifier(
            keys,
            issuer=settings.jwt_issuer,
            audience=settings.jwt_audience,
            algorithms=settings.jwt_algorithms,
            scope_claim=settings.jwt_scope_claim,
            scope_map=scope_map,
            tenant_claim=settings.jwt_tenant_claim,
            clock=clock,
            wall_clock=time.time,
        )
    )
    return keys


def _is_local(host: str) -> bool:
    """Whether only programs of this machine reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
