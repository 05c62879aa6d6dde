"""How the requests for a model are shared out beside its labels: a canary that answers some, and a shadow.

Plain values. The engine that decides about a model's labels holds them, and they reach web processes with the
catalog. They do not outlast the server: after a restart the stable version answers everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, TypeAlias

from inferpool.errors import Reason

CanaryState: TypeAlias = Literal["running", "promoted", "rolled_back", "ended"]
RUNNING: Final[CanaryState] = "running"
PROMOTED: Final[CanaryState] = "promoted"
ROLLED_BACK: Final[CanaryState] = "rolled_back"
ENDED: Final[CanaryState] = "ended"

BY_REQUEST: Final = "request_id"
BY_KEY: Final = "key"
BY_TENANT: Final = "tenant"
BY_HEADER: Final = "header:"
"""How a choice by a header begins; the header's name follows."""


@dataclass(frozen=True, slots=True)
class Canary:
    """A version that answers a share of the requests that name no version.

    Attributes:
        version: the canary.
        stable: the version that answers the other requests.
        share: the share of the canary, from 0 to 1.
        by: whose hash decides about a request: `BY_REQUEST`, `BY_KEY`, `BY_TENANT`, or `BY_HEADER` with a
            name. A request without a key or that header goes to the stable version.
        least_requests: how many requests each of the two has answered when the canary may be promoted; 0 if
            only people end it.
        state: `running`, or how it has ended.
        reason: why it has ended.
    """

    version: int
    stable: int
    share: float
    by: str = BY_REQUEST
    least_requests: int = 0
    state: CanaryState = RUNNING
    reason: Reason = ""


@dataclass(frozen=True, slots=True)
class Shadow:
    """A version that gets copies of a share of the requests that the stable version has answered."""

    version: int
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """How the requests for a model are shared out.

    Attributes:
        number: tells what is counted for it from what was counted for an earlier one.
        canary: None if there is none.
        shadow: None if there is none.
    """

    number: int
    canary: Canary | None = None
    shadow: Shadow | None = None

    @property
    def running(self) -> Canary | None:
        """The canary that runs; None if there is none, or if it has ended."""
        return self.canary if self.canary is not None and self.canary.state == RUNNING else None

    def ended(self, state: CanaryState, reason: Reason) -> Traffic:
        """The same after the end of its canary."""
        assert self.canary is not None
        return replace(self, canary=replace(self.canary, state=state, reason=reason))

    def to_json(self) -> dict[str, Any]:
        """The values as JSON."""
        return asdict(self)


def traffic_from_json(sent: Mapping[str, Any] | None) -> Traffic | None:
    """What `Traffic.to_json` wrote; None for None."""
    if sent is None:
        return None
    canary, shadow = sent["canary"], sent["shadow"]
    return Traffic(
        sent["number"],
        None if canary is None else Canary(**canary),
        None if shadow is None else Shadow(**shadow),
    )
