"""Decides for each request whose it is, and whether it may use its route."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

from inferpool.errors import Forbidden, InferpoolError, RequestError, Unauthorized
from inferpool.http.access.caller import ADMIN, EVERYONE, PUBLIC, SCOPES, Caller
from inferpool.http.access.refusals import Refusals
from inferpool.http.access.trusted_proxies import TrustedProxies, forwarded_by

if TYPE_CHECKING:
    from inferpool.http.access.client_certificates import CertificateCallers  # with mutual TLS alone
    from inferpool.http.access.tokens import TokenVerifier  # few servers take tokens

Headers = Iterable[tuple[bytes, bytes]]

_HOW: Final = "send a key in the header Authorization: Bearer or X-Api-Key"
_NAMES: Final = {scope: name for name, scope in SCOPES.items()}
_FROM_BROWSERS: Final = (b"origin", b"sec-fetch-site")
"""Headers that browsers send with requests of web pages."""

_LASTING: Final = ("missing", "unknown", "ambiguous")

MOST_ACCEPTED: Final = 4096
"""Accepted keys and tokens that are remembered; only their issuers can make new ones."""

KEYED: Final = "keyed"
OFF: Final = "off"
OPEN: Final = "open"


class Gate:
    """Knows the keys of the server. It belongs to the event loop, and never waits.

    Attributes:
        enabled: whether requests need keys. Without keys, a request costs this comparison.
        anonymous: the caller of a request without a key, which has the scopes that are public.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        enabled: bool = False,
        public: int = PUBLIC,
        admin: str = KEYED,
        refusals: Refusals | None = None,
        proxies: TrustedProxies | None = None,
    ) -> None:
        """Without keys unless `enabled`; `clock` is the predictor's.

        `public` is the sum of the scopes that need no key. `admin` says who may use the admin routes: `KEYED`
        for a key with their scope, `OFF` for nobody, `OPEN` for everyone but web pages if there are no keys.
        `refusals` counts the refused requests, by the clients behind `proxies`.
        """
        self.enabled = enabled
        self.anonymous = Caller("", "", public) if enabled else EVERYONE
        self.admin = admin
        self._clock = clock
        self._refusals = refusals
        self._proxies = proxies
        self._keys: Mapping[bytes, Caller] = {}
        self._tokens: TokenVerifier | None = None
        self._certificates: CertificateCallers | None = None
        # Callers of accepted requests by their keys: a digest costs more than the rest of the gate.
        self._accepted: dict[bytes, Caller] = {}
        self._changed: list[Callable[[], None]] = []

    def on_change(self, forget: Callable[[], None]) -> None:
        """Call `forget` whenever keys change, so that no caller of before is remembered."""
        self._changed.append(forget)

    def use(self, keys: Mapping[bytes, Caller]) -> None:
        """Accept `keys` from now on, and no others: callers by the SHA-256 digests of their keys."""
        self._keys = keys
        self.forget()

    def use_tokens(self, tokens: TokenVerifier) -> None:
        """Accept tokens as well as keys."""
        self._tokens = tokens
        self.on_change(tokens.forget)

    def use_certificates(self, callers: CertificateCallers) -> None:
        """Accept the certificates of clients, which TLS has verified, in place of keys."""
        self._certificates = callers

    def keyless(self, certificate: Mapping[str, Any] | None) -> Caller:
        """Return the caller of requests without a key whose client has shown `certificate`."""
        if certificate is None or self._certificates is None:
            return self.anonymous
        return self._certificates.of(certificate) or self.anonymous

    def forget(self) -> None:
        """Forget every caller that was remembered: keys have changed."""
        self._accepted.clear()
        for forget in self._changed:
            forget()

    def authorize(
        self, headers: Headers, needed: int, model: str | None, peer: str, keyless: Caller | None = None
    ) -> Caller:
        """Return whose request it is, as `check` does; raises the error that `check` returns."""
        outcome = self.check(headers, needed, model, peer, keyless)
        if isinstance(outcome, Caller):
            return outcome
        raise outcome

    def check(
        self, headers: Headers, needed: int, model: str | None, peer: str, keyless: Caller | None = None
    ) -> Caller | InferpoolError:
        """Return whose request it is, or why it is refused; `headers` have lower-case names.

        `needed` is the scope of its route, `model` the model that its path names, `peer` the address of its
        client, `keyless` the caller if the request has no key; None for `anonymous`.

        The error is Unauthorized, or Forbidden if the key lacks the scope, or NotReady for a token while the
        keys of its issuer are not known. It is returned, because raising it would double the cost of a
        refusal.
        """
        if not self.enabled:
            return EVERYONE if needed != ADMIN else self._closed(headers) or EVERYONE
        caller = self.anonymous if keyless is None else keyless
        if needed == PUBLIC:
            return caller
        try:
            secret = read_secret(headers)
            if secret is not None:
                known = self._accepted.get(secret)
                if known is None or known.valid_until <= self._clock():
                    known = self._identify(secret)
                    if known is None:
                        error = Unauthorized("the server does not know this key", reason="unknown")
                        return self._refused(error, caller, headers, peer)
                caller = known
            elif caller.valid_until <= self._clock():
                error = Unauthorized("the certificate of the client has expired", reason="expired")
                return self._refused(error, caller, headers, peer)
        except InferpoolError as raised:
            return self._refused(raised, caller, headers, peer)
        refusal = self._lacking(caller, needed, model)
        return caller if refusal is None else self._refused(refusal, caller, headers, peer)

    def may_know(self, secret: bytes) -> bool:
        """Return whether `secret` may be a key or a token that is accepted; False if it surely is none."""
        if secret in self._accepted or sha256(secret).digest() in self._keys:
            return True
        return self._tokens is not None and secret.count(b".") == 2

    def _identify(self, secret: bytes) -> Caller | None:
        """The caller whose key or token `secret` is; None if unknown; raises if it is not accepted."""
        # How long it takes to find a digest depends on digests alone, and nobody can choose a key whose
        # digest begins with given bytes. The table of accepted keys tells as little: Python finds them by a
        # hash with a random seed, and compares a key only if the whole hash is the same.
        digest = sha256(secret).digest()
        found = self._keys.get(digest)
        if found is None:
            if self._tokens is None or secret.count(b".") != 2:
                return None
            found = self._tokens.identify(secret, digest)
        elif found.valid_until <= self._clock():
            raise Unauthorized("this key has expired; ask for another one", reason="expired")
        if len(self._accepted) >= MOST_ACCEPTED:
            self._accepted.clear()
        self._accepted[secret] = found
        return found

    def _lacking(self, caller: Caller, needed: int, model: str | None) -> InferpoolError | None:
        """What keeps `caller` from using a route; None if nothing does."""
        if not caller.allows(needed):
            if caller is self.anonymous:
                return Unauthorized(f"this route needs a key; {_HOW}", reason="missing")
            return Forbidden(f'the key "{caller.key_id}" lacks the scope {_NAMES[needed]}')
        if needed == ADMIN and self.admin == OFF:
            return Forbidden("the admin routes are off: the server was started with --admin-routes off")
        if model is not None and not caller.may_predict(model):
            return model_forbidden(caller, model)
        return None

    def _refused(self, error: InferpoolError, caller: Caller, headers: Headers, peer: str) -> InferpoolError:
        """Count a refusal, and return its error."""
        if self._refusals is not None and isinstance(error, RequestError):
            forwarded = None if self._proxies is None else forwarded_by(headers)
            self.count_refusal(error, peer, forwarded, caller.key_id)
        return error

    def count_refusal(self, error: InferpoolError, peer: str, forwarded: bytes | None, key_id: str) -> None:
        """Count a request that was refused with `error`; `forwarded` has the values of X-Forwarded-For."""
        if self._refusals is not None:
            client = peer if self._proxies is None else self._proxies.client(peer, forwarded)
            reason = str(error.members.get("reason", "scope"))
            self._refusals.count(reason, client, key_id if reason == "scope" else "")

    def _closed(self, headers: Headers) -> InferpoolError | None:
        """Why an admin request is refused while there are no keys; None if it is not."""
        if self.admin != OPEN:
            return Forbidden(
                "the admin routes are off, because the server has no keys; start it with --keys-file, or"
                " change the models folder instead"
            )
        if any(name in _FROM_BROWSERS for name, _ in headers):
            # Any page that somebody opens could send such a request to the address of this machine.
            return Forbidden("without keys, the admin routes are not for web pages")
        return None


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


def is_lasting(error: Exception) -> bool:
    """Return whether the same request is refused with the same `error` until the keys change."""
    # A token may become valid with time, and so may the caller of a key with another scope.
    return isinstance(error, Unauthorized) and error.members.get("reason") in _LASTING


def model_forbidden(caller: Caller, model: str) -> Forbidden:
    """The error of a request for a model that is not among those of its key."""
    return Forbidden(f'the key "{caller.key_id}" lacks the scope predict:{model[:200]}')
