"""Who sent a request, and what its key allows: plain values that every part of a request may read."""

from __future__ import annotations

import math
from typing import Final

PUBLIC: Final = 0
"""A route that needs no key."""
PREDICT: Final = 1
READ: Final = 2
METRICS: Final = 4
ADMIN: Final = 8
ANY_KEY: Final = 16
"""What a path without a route needs: some valid key, so that strangers cannot probe for routes."""

SCOPES: Final = {"predict": PREDICT, "read": READ, "metrics": METRICS, "admin": ADMIN}
"""The scopes by the names that keys and tokens give them."""


class Caller:
    """Who sent a request. A caller never changes, and holds no secret.

    Attributes:
        tenant: to whom the key belongs; "" for a request without a key.
        key_id: the public name of the key, or of the token's subject; "" for a request without a key.
        scopes: the sum of the scopes that the key has.
        models: the models that `PREDICT` is limited to; None for all models.
        valid_until: the moment at which the key expires, by the predictor's clock; infinity if it does not.
    """

    __slots__ = ("key_id", "models", "scopes", "tenant", "valid_until")

    def __init__(
        self,
        tenant: str,
        key_id: str,
        scopes: int,
        models: frozenset[str] | None = None,
        valid_until: float = math.inf,
    ) -> None:
        self.tenant = tenant
        self.key_id = key_id
        self.scopes = scopes
        self.models = models
        self.valid_until = valid_until

    def allows(self, needed: int) -> bool:
        """Return whether the caller has the scope `needed`: PUBLIC, or one of the other constants."""
        return needed == PUBLIC or (self.scopes & needed) != 0

    def may_predict(self, model: str) -> bool:
        """Return whether the caller may use `model`; `PREDICT` was checked before."""
        models = self.models
        return models is None or model in models


NOBODY: Final = Caller("", "", PUBLIC, frozenset())
"""The caller of a request that the gate has not let pass."""

EVERYONE: Final = Caller("", "", PREDICT | READ | METRICS | ADMIN | ANY_KEY)
"""The caller of every request while the server has no keys. The gate decides itself about admin routes."""
