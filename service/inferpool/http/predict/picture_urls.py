"""Fetches pictures by their URLs, from hosts that the operator has named and from no others.

A caller must not reach through the server what only the server can reach. So a host is named together with
its scheme and port, and each address of it must be public or in a network that is named too. The connection
goes to the very address that was checked, and no redirect is followed.
"""

from __future__ import annotations

import io
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from http.client import HTTPException, HTTPResponse
from typing import Final, NamedTuple, TypeAlias

from inferpool.allowance import Allowance
from inferpool.errors import BodyTooLarge, ConfigError, InvalidInput
from inferpool.http.predict.host_lookups import HostLookups

MOST_BYTES: Final = 16 * 2**20
"""The largest file that is fetched."""
MOST_S: Final = 10.0
"""Seconds that the pictures of a request may take together."""
_MOST_URL: Final = 8192
_MOST_ADDRESSES: Final = 4
"""How many addresses of a host are tried."""
_PIECE_BYTES: Final = 256 * 1024
_URL: Final = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9._-]{1,253}|\[[0-9a-f:.]{2,45}\])(?P<port>:[0-9]{1,5})?"
    r"(?P<path>/[!-\"$-\[\]-~]*)?",
    re.IGNORECASE | re.ASCII,
)
"""No user, no fragment, no backslash, nothing but printable ASCII: there is one way to read such a URL."""
_PORTS: Final = {"http": 80, "https": 443}
_OK: Final = 200
_REDIRECTS: Final = range(300, 400)
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
_LOCAL: Final = tuple(map(ipaddress.ip_network, ("64:ff9b:1::/48", "fec0::/10", "::/96")))
"""NAT64 and sites of an own network, and IPv4 in the oldest form; Python takes them for public ones."""

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


class Origin(NamedTuple):
    """A scheme, a host in lower case, and a port."""

    scheme: str
    host: str
    port: int


class PictureUrls:
    """The hosts that pictures may come from; safe to share between threads."""

    def __init__(self, named: Iterable[str], tls: ssl.SSLContext | None = None) -> None:
        """Read the values of `--image-urls`. `tls` verifies hosts; None takes the system's authorities.

        Raises ConfigError for a value that is neither a host, nor an origin, nor a network.
        """
        self._origins: set[Origin] = set()
        self._networks: list[Network] = []
        self._given_tls = tls
        self._lookups = HostLookups()
        for text in named:
            if "/" in text and "://" not in text:
                try:
                    self._networks.append(ipaddress.ip_network(text))
                except ValueError as error:
                    raise ConfigError(f"--image-urls: {error}") from None
                continue
            found = _URL.fullmatch(text if "://" in text else f"https://{text}")
            if found is None or found["path"] is not None:
                raise ConfigError(
                    f'--image-urls: "{text}" is neither a host such as images.example.com, nor an origin such'
                    " as http://images.local:9000, nor a network such as 10.0.0.0/8"
                )
            self._origins.add(_origin(found))

    def fetch(self, url: str, allowance: Allowance, until: float) -> bytes:
        """Return the file at `url`, whose bytes are taken from `allowance` before they are read.

        `until` is a moment of `time.monotonic`. Raises InvalidInput with the reason if the URL is not among
        those that may be fetched, or if there is no file; BodyTooLarge if the file is too large; and what
        `Allowance.take` raises.
        """
        found = _URL.fullmatch(url) if len(url) <= _MOST_URL else None
        if found is None:
            raise InvalidInput(f"it is no URL without user and fragment, of at most {_MOST_URL} bytes")
        origin = _origin(found)
        if origin not in self._origins:
            raise InvalidInput("pictures are fetched only from the hosts that --image-urls names")
        most = min(MOST_BYTES, allowance.most_bytes)
        try:
            with self._connect(origin, until) as connection:
                connection.sendall(_request(origin, found["path"] or "/"))
                response = HTTPResponse(_TimedSocket(connection, until), method="GET")  # type: ignore[arg-type]
                response.begin()
                return _read(response, most, allowance)
        except TimeoutError:
            raise InvalidInput(f"{origin.host} did not answer in time") from None
        # ValueError is what http.client raises for a length that is no number.
        except (OSError, HTTPException, ValueError) as error:
            raise InvalidInput(f"{origin.host} did not send the picture: {_reason(error)}") from None

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return self._given_tls or ssl.create_default_context()

    def _connect(self, origin: Origin, until: float) -> socket.socket:
        """Connect to an address of a host that was checked; raises OSError, and InvalidInput without one."""
        error: OSError | None = None
        for address in self._addresses(origin, until):
            try:
                raw = socket.create_connection((str(address), origin.port), _left(until))
            except TimeoutError:
                raise
            except OSError as problem:
                error = problem
                continue
            if origin.scheme == "http":
                return raw
            try:
                raw.settimeout(_left(until))
                return self._tls.wrap_socket(raw, server_hostname=origin.host.strip("[]"))
            except BaseException:
                raw.close()
                raise
        raise error or OSError("no address")

    def _addresses(self, origin: Origin, until: float) -> list[Address]:
        host = origin.host.strip("[]")
        try:
            answers = self._lookups.find(host, origin.port, until)
        except UnicodeError:
            answers = []
        addresses = [ipaddress.ip_address(str(found[0]).partition("%")[0]) for *_, found in answers]
        # An address that stands in the list itself was named.
        allowed = [address for address in addresses if _is_literal(host) or self._is_allowed(address)]
        if not allowed:
            raise InvalidInput(f"{origin.host} has no public address, and --image-urls has no network for it")
        return allowed[:_MOST_ADDRESSES]

    def _is_allowed(self, address: Address) -> bool:
        if any(address in network for network in self._networks):
            return True
        return _is_public(address)


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return "its certificate is not valid"
    if isinstance(error, socket.gaierror):
        return "its name has no address"
    return "the connection failed" if isinstance(error, OSError) else "its response is no valid HTTP"


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_public(address: Address) -> bool:
    """Return whether an address, and the IPv4 address in it if it has one, is one of the internet."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(inner)
        if address.teredo is not None or any(address in network for network in _LOCAL):
            return False
    return address.is_global and not address.is_multicast


def _origin(found: re.Match[str]) -> Origin:
    scheme, port = found["scheme"].lower(), found["port"]
    return Origin(scheme, found["host"].lower(), int(port[1:]) if port else _PORTS[scheme])


def _request(origin: Origin, path: str) -> bytes:
    host = origin.host if origin.port == _PORTS[origin.scheme] else f"{origin.host}:{origin.port}"
    return (
        f"GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: inferpool\r\nAccept: image/*\r\n"
        "Accept-Encoding: identity\r\nConnection: close\r\n\r\n"
    ).encode("ascii")


def _left(until: float) -> float:
    """The seconds until a moment; raises TimeoutError if it is over."""
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _TimedSocket:
    """What `HTTPResponse` needs of a socket, with one deadline for everything that is read."""

    def __init__(self, connection: socket.socket, until: float) -> None:
        self._raw = _TimedReads(connection, until)

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return the file that the response is read from."""
        return io.BufferedReader(self._raw)


class _TimedReads(io.RawIOBase):
    def __init__(self, connection: socket.socket, until: float) -> None:
        self._connection = connection
        self._until = until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._connection.settimeout(_left(self._until))
        return self._connection.recv_into(buffer)


def _read(response: HTTPResponse, most: int, allowance: Allowance) -> bytes:
    if response.status in _REDIRECTS:
        raise InvalidInput("its host answers with a redirect, which is not followed; send the URL itself")
    if response.status != _OK:
        raise InvalidInput(f"its host answers with status {response.status}")
    if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise InvalidInput("its host sends the picture compressed")
    length = response.length
    if length is not None and length > most:
        raise _too_large(most)
    size = most if length is None else length
    # Twice, because a buffer that grows is copied. A list of pieces of a byte each would take much more.
    allowance.take(2 * size, "fetching a picture")
    buffer = io.BytesIO()
    for piece in _pieces(response, most):
        buffer.write(piece)
    file = buffer.getvalue()
    if length is not None and len(file) < length:
        raise InvalidInput("its host ended the connection before the end of the picture")
    allowance.give_back(2 * size - len(file))
    return file


def _pieces(response: HTTPResponse, most: int) -> Iterator[bytes]:
    received = 0
    while piece := response.read1(_PIECE_BYTES):
        received += len(piece)
        if received > most:
            raise _too_large(most)
        yield piece


def _too_large(most: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"the picture at the URL has more than {most} bytes, the most that is fetched", limit=most
    )
