"""HTTP for stores: one client with time limits, credentials and errors that name no secret."""

from __future__ import annotations

import logging
import netrc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from inferpool import __version__
from inferpool.errors import StoreError, StoreUnreachable
from inferpool.repository.stores.store import CredentialsRefused, StoreChanged
from inferpool.system.install_hints import install_command

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 30.0
"""How long a server may send nothing."""
CONNECT_TIMEOUT_S: Final = 10.0
MOST_JSON_BYTES: Final = 16 * 2**20
TRIES: Final = 4
"""How often a small document is asked for: a listing, a manifest, or the headers of a file."""
PAUSE_S: Final = 0.4
"""Pause before the second try; each later one is twice as long."""
_RETRIED: Final = (408, 425, 429)
_Answer = TypeVar("_Answer")


class _TimedOut(StoreUnreachable):
    """A server that has not answered in time. Another try would take as long again."""


class WebClient:
    """Asks one server, and those that it redirects to. Credentials go to the first one alone.

    Attributes:
        http: the client of httpx.
    """

    def __init__(
        self,
        shown: str,
        credentials: tuple[str, str] | None = None,
        token: str = "",
        may_ask: Callable[[str], bool] | None = None,
    ) -> None:
        """`shown` names the store in errors; `credentials` are a user and a password.

        With `may_ask`, only addresses for which that is true are asked, whatever redirects to others.
        """
        try:
            import httpx
        except ImportError as error:
            raise StoreError(f"{shown} needs the package httpx: {install_command('stores')}") from error
        self._shown = shown
        self._errors: type[Exception] = httpx.HTTPError
        self._timeout: type[Exception] = httpx.TimeoutException
        self._may_ask = may_ask
        self.http = httpx.Client(
            auth=credentials,
            timeout=httpx.Timeout(TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            follow_redirects=True,
            max_redirects=10,
            event_hooks={"request": [] if may_ask is None else [self._allow]},
            headers={
                "User-Agent": f"inferpool/{__version__}",
                # A content that the server compresses on the way has no parts that could be asked for.
                "Accept-Encoding": "identity",
                **({"Authorization": f"Bearer {token}"} if token else {}),
            },
        )

    def close(self) -> None:
        """End all connections."""
        self.http.close()

    def _allow(self, request: httpx.Request) -> None:
        if self._may_ask is not None and not self._may_ask(str(request.url)):
            raise StoreError(
                f"{self._shown} redirects to {request.url.host}, which is not below a prefix of the setting"
                " load_from"
            )

    def head(self, url: str) -> Mapping[str, str]:
        """The headers of a file. A server that answers no HEAD is asked for the file, without reading it."""

        def ask() -> Mapping[str, str]:
            reply = self.http.head(url)
            if reply.status_code in (400, 403, 405, 501):  # signed addresses are good for one method
                with self.http.stream("GET", url) as stream:
                    self.check(stream)
                    reply = stream
            else:
                self.check(reply)
            headers: Mapping[str, str] = reply.headers
            return headers

        return self._tried(ask)

    def json(self, url: str, headers: Mapping[str, str] | None = None) -> tuple[Any, httpx.Response]:
        """A JSON document, and the response that had it."""
        import json

        body, reply = self.get(url, headers or {})
        try:
            return json.loads(body), reply
        except ValueError:
            raise StoreError(f"{self._shown}: the server answers with something else than JSON") from None

    def get(
        self, url: str, headers: Mapping[str, str], statuses: tuple[int, ...] = ()
    ) -> tuple[bytes, httpx.Response]:
        """A small document, and its response; `statuses` are no errors."""

        def ask() -> tuple[bytes, httpx.Response]:
            with self.http.stream("GET", url, headers=dict(headers)) as reply:
                if reply.status_code not in statuses:
                    self.check(reply)
                body = bytearray()
                for piece in reply.iter_bytes():
                    body += piece
                    if len(body) > MOST_JSON_BYTES:
                        raise StoreError(f"{self._shown}: the server's answer has no end")
                return bytes(body), reply

        return self._tried(ask)

    def _tried(self, ask: Callable[[], _Answer]) -> _Answer:
        """What `ask` returns. It is called again if a connection is cut, or if the server is busy."""
        for number in range(1, TRIES + 1):
            try:
                try:
                    return ask()
                except self._errors as error:
                    raise self._unreachable(error) from None
            except StoreUnreachable as error:
                if number == TRIES or isinstance(error, _TimedOut):
                    raise
                log.info("%s; asked again", error.detail)
                time.sleep(PAUSE_S * 2 ** (number - 1))
        raise AssertionError("the last try returns or raises")

    def read(
        self, url: str, start: int, end: int | None, headers: Mapping[str, str] | None = None
    ) -> Iterator[bytes]:
        """The bytes of a file from `start` to before `end`; `headers` hold the condition for that."""
        own = dict(headers or {})
        whole = start == 0 and end is None
        if not whole:
            own["Range"] = f"bytes={start}-" + ("" if end is None else str(end - 1))
        try:
            with self.http.stream("GET", url, headers=own) as reply:
                if reply.status_code in (412, 416):
                    raise StoreChanged(f"{self._shown} has changed while it was read")
                self.check(reply)
                if not whole and reply.status_code != 206:
                    raise StoreChanged(f"{self._shown}: the server sends no parts of the file any more")
                if not whole and not reply.headers.get("content-range", "").startswith(f"bytes {start}-"):
                    raise StoreError(f"{self._shown}: the server sends another part than the one asked for")
                yield from reply.iter_raw()  # as it comes: with a size, a cut would lose what has come
        except self._errors as error:
            raise self._unreachable(error) from None

    def check(self, reply: httpx.Response) -> None:
        """Raise StoreError unless a request has succeeded."""
        if reply.url.scheme == "http" and any(hop.url.scheme == "https" for hop in reply.history):
            raise StoreError(f"{self._shown} redirects to a server without TLS, which is not followed")
        status = reply.status_code
        if status < 300:
            return
        said = f"{self._shown}: HTTP status {status} {reply.reason_phrase}".rstrip()
        if status >= 500 or status in _RETRIED:
            raise StoreUnreachable(said)
        if status in (401, 403):
            raise CredentialsRefused(f"{said}; the credentials are missing, or allow too little")
        raise StoreError(said)

    def _unreachable(self, error: Exception) -> StoreUnreachable:
        # The texts of httpx name hosts and reasons, never an address with its query.
        reason = str(error) or type(error).__name__
        if "://" in reason:
            reason = type(error).__name__
        kind = _TimedOut if isinstance(error, self._timeout) else StoreUnreachable
        return kind(f"{self._shown}: {reason}")


def netrc_credentials(host: str) -> tuple[str, str] | None:
    """The user and password of a host in the file `.netrc`; None if there are none."""
    file = Path(os.environ.get("NETRC") or Path("~/.netrc").expanduser())
    try:
        found = netrc.netrc(str(file)).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return (found[0], found[2] or "") if found is not None else None
