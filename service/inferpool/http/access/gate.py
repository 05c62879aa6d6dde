"""Decides for each request whose it is, and whether it may use its route."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from typing import Final

from inferpool.errors import Forbidden, InferpoolError, Unauthorized
from inferpool.http.access.caller import ADMIN, EVERYONE, SCOPES, Caller

Headers = Iterable[tuple[bytes, bytes]]

_HOW: Final = "send a key in the header Authorization: Bearer or X-Api-Key"
_NAMES: Final = {scope: name for name, scope in SCOPES.items()}


class Gate:
    """Knows the keys of the server. It belongs to the event loop, and never waits.

    Attributes:
        enabled: whether requests need keys. Without keys, a request costs this comparison.
        anonymous: the caller of a request without a key, which has the scopes that are public.
    """

    def __init__(self, clock: Callable[[], float], *, enabled: bool = False, public: int = 0) -> None:
        """`clock` is the predictor's; `public` is the sum of the scopes that need no key."""
        self.enabled = enabled
        self.anonymous = Caller("", "", public) if enabled else EVERYONE
        self._clock = clock
        self._keys: Mapping[bytes, Caller] = {}
        self._changed: list[Callable[[], None]] = []

    def on_change(self, forget: Callable[[], None]) -> None:
        """Call `forget` whenever the keys change, so that callers are not remembered."""
        self._changed.append(forget)

    def use(self, keys: Mapping[bytes, Caller]) -> None:
        """Accept `keys` from now on, and no others: callers by the SHA-256 digests of their secrets."""
        self._keys = keys
        for forget in self._changed:
            forget()

    def authorize(self, headers: Headers, needed: int, model: str | None, peer: str) -> Caller:
        """Return whose request it is; `headers` have lower-case names.

        `needed` is the scope of its route, `model` the model that its path names, `peer` the address of its
        client.

        Raises Unauthorized, or Forbidden if the key lacks the scope.
        """
        if not self.enabled:
            if needed == ADMIN:
                raise admin_disabled()
            return EVERYONE
        try:
            caller = self._identify(headers)
            self._check(caller, needed, model)
        except InferpoolError:
            raise
        return caller

    def _identify(self, headers: Headers) -> Caller:
        secret = read_secret(headers)
        if secret is None:
            return self.anonymous
        digest = sha256(secret).digest()
        caller = self._keys.get(digest)
        if caller is None:
            raise Unauthorized("the server does not know this key", reason="unknown")
        if caller.valid_until <= self._clock():
            raise Unauthorized("this key has expired; ask for another one", reason="expired")
        return caller

    def _check(self, caller: Caller, needed: int, model: str | None) -> None:
        if not caller.allows(needed):
            if caller is self.anonymous:
                raise Unauthorized(f"this route needs a key; {_HOW}", reason="missing")
            raise Forbidden(f'the key "{caller.key_id}" lacks the scope {_NAMES[needed]}')
        if model is not None and not caller.may_predict(model):
            raise model_forbidden(caller, model)


def read_secret(headers: Headers) -> bytes | None:
    """Return the key of a request, None if it has none; raises Unauthorized if it has two different ones."""
    found: bytes | None = None
    for name, value in headers:
        if name == b"authorization":
            scheme, _, secret = value.partition(b" ")
            if scheme.lower() != b"bearer":
                continue  # of a proxy, perhaps
        elif name == b"x-api-key":
            secret = value
        else:
            continue
        secret = secret.strip()
        if found is not None and secret != found:
            raise Unauthorized("the request has two different keys; send one", reason="ambiguous")
        found = secret
    return found


def admin_disabled() -> Forbidden:
    """The error of every admin route while the server has no keys."""
    return Forbidden("the admin routes are off, because the server has no keys; start it with --keys-file")


def model_forbidden(caller: Caller, model: str) -> Forbidden:
    """The error of a request for a model that is not among those of its key."""
    return Forbidden(f'the key "{caller.key_id}" lacks the scope predict:{model[:200]}')
