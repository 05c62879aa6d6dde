"""Verifies the tokens of an issuer (JWT, RFC 7519) and finds out what they allow."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from inferpool.errors import NotReady, Unauthorized
from inferpool.http.access.caller import Caller
from inferpool.http.access.jwks import JwksWatch, PublicKey
from inferpool.http.access.key_file import parse_scopes

LEEWAY_S: Final = 30.0
"""By how much the clocks of the issuer and this machine may differ."""
MOST_TOKENS: Final = 4096
"""Verified tokens that are remembered. Only an issuer can make new ones."""
MOST_TOKEN_BYTES: Final = 16 * 1024

_LATEST: Final = 2**40
"""A moment in seconds that no token outlives; larger ones may be no numbers for a clock."""
_TENANT: Final = re.compile(r"[A-Za-z0-9._@|:/+-]{1,128}")
_TEXTS: Final = {
    "ExpiredSignatureError": "it has expired",
    "InvalidAudienceError": "its audience is another one",
    "InvalidIssuerError": "its issuer is another one",
    "ImmatureSignatureError": "it is not valid yet",
    "InvalidSignatureError": "its signature is wrong",
    "MissingRequiredClaimError": "a claim is missing: exp, iss and aud are needed",
}


class TokenVerifier:
    """Finds the callers of tokens; for the event loop alone.

    Verifying a signature costs tens of microseconds, so that tokens that were verified are remembered.
    """

    def __init__(
        self,
        keys: JwksWatch,
        *,
        issuer: str,
        audience: Sequence[str],
        algorithms: Sequence[str],
        scope_claim: str,
        scope_map: Mapping[str, str],
        tenant_claim: str,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        """Accept tokens of `issuer` for one of `audience`, signed by one of `keys` with one of `algorithms`.

        The values of the claim `scope_claim` are scopes; `scope_map`, if it is not empty, has their meanings.
        """
        self._keys = keys
        self._issuer = issuer
        self._audience = list(audience)
        self._algorithms = frozenset(algorithms)
        self._scope_claim = scope_claim
        self._scope_map = scope_map
        self._tenant_claim = tenant_claim
        self._clock = clock
        self._wall_clock = wall_clock
        self._verified: dict[bytes, Caller] = {}

    def forget(self) -> None:
        """Forget the verified tokens: their keys may no longer be valid."""
        self._verified.clear()

    def identify(self, token: bytes, digest: bytes) -> Caller:
        """Return the caller of a token; `digest` is its SHA-256.

        Raises Unauthorized, or NotReady until the keys of the issuer are known.
        """
        caller = self._verified.get(digest)
        if caller is not None:
            if caller.valid_until <= self._clock():
                raise _refused("it has expired", "expired")
            return caller
        caller = self._verify(token)
        if len(self._verified) >= MOST_TOKENS:
            self._verified.clear()
        self._verified[digest] = caller
        return caller

    def _verify(self, token: bytes) -> Caller:
        import jwt

        if len(token) > MOST_TOKEN_BYTES:
            raise _refused("it is too long")
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise _refused("it cannot be read") from None
        algorithm = header.get("alg")
        # The list has no algorithm of shared secrets, and not "none".
        if not isinstance(algorithm, str) or algorithm not in self._algorithms:
            raise _refused("its algorithm is not allowed here")
        if "crit" in header:
            raise _refused("it has critical extensions, which this server does not know")
        reason = "its signature is wrong"
        for found in self._candidates(header.get("kid"), algorithm):
            try:
                claims = jwt.decode(
                    token, found.key, algorithms=[algorithm], audience=self._audience, issuer=self._issuer,
                    leeway=LEEWAY_S, options={"require": ["exp", "iss", "aud"]},
                )  # fmt: skip
            except jwt.InvalidSignatureError:
                continue  # another key without a name may be the right one
            except (jwt.PyJWTError, TypeError, ValueError, OverflowError, RecursionError) as error:
                name = type(error).__name__
                reason = _TEXTS.get(name, "it cannot be read")
                raise _refused(reason, "expired" if name == "ExpiredSignatureError" else "token") from None
            return self._caller(claims)
        raise _refused(reason)

    def _candidates(self, name: object, algorithm: str) -> list[PublicKey]:
        """The keys that may have signed a token; raises if there is none."""
        keys = self._keys.keys
        if keys is None:
            self._keys.refresh_soon()
            raise NotReady("the keys of the issuer of tokens are not known yet; try again later")
        if name is None:
            named = [key for several in keys.values() for key in several]
        else:
            named = keys.get(name, []) if isinstance(name, str) else []
        found = [key for key in named if algorithm in key.algorithms]
        if not found:
            self._keys.refresh_soon()
            raise _refused(
                "no key of the issuer has its name and algorithm; if the issuer has a new key, retry"
            )
        return found

    def _caller(self, claims: Mapping[str, Any]) -> Caller:
        tenant = _claim(claims, self._tenant_claim)
        if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant):
            raise _refused(f'its claim "{self._tenant_claim}" names no tenant')
        subject = claims.get("sub", tenant)
        key_id = subject if isinstance(subject, str) and _TENANT.fullmatch(subject) else tenant
        given = _claim(claims, self._scope_claim)
        values = given.split() if isinstance(given, str) else given if isinstance(given, list) else []
        scopes, models = parse_scopes([scope for value in values if (scope := self._scope(value))])
        left_s = min(int(claims["exp"]), _LATEST) + LEEWAY_S - self._wall_clock()
        return Caller(tenant, key_id, scopes, models, self._clock() + left_s)

    def _scope(self, value: object) -> str | None:
        """The scope that a value of the claim means; None for one of another service."""
        if not isinstance(value, str):
            return None
        scope = self._scope_map.get(value) if self._scope_map else value
        try:
            parse_scopes([scope] if scope else [])
        except ValueError:
            return None
        return scope


def _claim(claims: Mapping[str, Any], name: str) -> Any:
    """The claim `name`, or what a path such as `realm_access.roles` leads to."""
    if name in claims:
        return claims[name]
    value: Any = claims
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _refused(why: str, reason: str = "token") -> Unauthorized:
    return Unauthorized(f"the token is not accepted: {why}", reason=reason)
