"""Whose request a proxy passes on: `X-Forwarded-For`, which is believed only if a known proxy sent it."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import Final

_MOST_HOPS: Final = 16
_MOST_BYTES: Final = 1024


class TrustedProxies:
    """The proxies whose `X-Forwarded-For` is believed."""

    def __init__(self, networks: Sequence[str]) -> None:
        """`networks` are addresses, or networks such as 10.0.0.0/8; `unix` is whoever uses a Unix socket."""
        self._networks = [ipaddress.ip_network(text) for text in networks if text != "unix"]
        self._unix = "unix" in networks

    def client(self, peer: str, forwarded: bytes | None) -> str:
        """Return the address of the client behind the proxies.

        `peer` is the other end of the connection, "" for a Unix socket. Each proxy adds the address that sent
        it the request, so the last address that is no proxy's is the client's. The client may have made up
        those before it.
        """
        if forwarded is None or not self._trusts(peer):
            return peer
        client = peer
        hops = forwarded[-_MOST_BYTES:].decode("latin-1").split(",")
        for hop in hops[: -_MOST_HOPS - 1 : -1]:
            address = _address(hop.strip())
            if not address:
                break
            client = address
            if not self._trusts(address):
                break
        return client

    def _trusts(self, peer: str) -> bool:
        if not peer:
            return self._unix
        try:
            address = ipaddress.ip_address(peer.partition("%")[0])
        except ValueError:
            return False
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return any(address in network for network in self._networks)


def forwarded_by(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """Return the values of X-Forwarded-For among headers with lower-case names; None if there is none."""
    values = [value for name, value in headers if name == b"x-forwarded-for"]
    return b",".join(values) if values else None


def make_proxies(networks: Sequence[str]) -> TrustedProxies | None:
    """Return the proxies of the setting; None if there are none."""
    return TrustedProxies(networks) if networks else None


def _address(hop: str) -> str:
    """Return the address of one hop, without the port that some proxies add; "" if it is none."""
    for text in (hop, hop.rpartition(":")[0], hop.partition("]")[0].removeprefix("[")):
        try:
            return str(ipaddress.ip_address(text))
        except ValueError:
            continue
    return ""
