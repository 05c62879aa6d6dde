"""What becomes of one version: what is wanted of it, what it is, and the next step from one to the other.

Plain rules without threads, files or clocks of their own. A version that serves goes on serving while another
load of the same version runs beside it, and a load that fails leaves it alone.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final, Literal, TypeAlias

from inferpool.errors import Reason

Phase: TypeAlias = Literal["queued", "fetch", "verify", "load", "prove", "measure", "warm", "check_samples"]
"""What a load does at the moment."""

QUEUED: Final[Phase] = "queued"
FETCH: Final[Phase] = "fetch"
VERIFY: Final[Phase] = "verify"
LOAD: Final[Phase] = "load"
PROVE: Final[Phase] = "prove"
MEASURE: Final[Phase] = "measure"
WARM: Final[Phase] = "warm"
CHECK_SAMPLES: Final[Phase] = "check_samples"
PHASES: Final[tuple[Phase, ...]] = (QUEUED, FETCH, VERIFY, LOAD, PROVE, MEASURE, WARM, CHECK_SAMPLES)
"""The phases of a load, in their order. A load may skip some of them."""

Step: TypeAlias = Literal["begin_load", "cancel_load", "begin_drain"]
BEGIN_LOAD: Final[Step] = "begin_load"
CANCEL_LOAD: Final[Step] = "cancel_load"
BEGIN_DRAIN: Final[Step] = "begin_drain"

Actual: TypeAlias = Literal["unloaded", "ready", "draining", "failed"]
UNLOADED: Final[Actual] = "unloaded"
READY: Final[Actual] = "ready"
DRAINING: Final[Actual] = "draining"
FAILED: Final[Actual] = "failed"


class VersionLifecycle:
    """The lifecycle of one version.

    A *source* is any value that is equal for equal files and settings of the version.

    Attributes:
        wanted: the source that is to be served; None if the version is not to be served.
        actual: what the version is, whatever loads beside it.
        served: the source that serves; None unless `actual` is `ready` or `draining`.
        loading: the source that loads at the moment; None if no load is under way.
        phase: the phase of that load; None if no load is under way.
        reason: why the last load failed; empty if it did not.
        warm_until: until when a version that is no longer wanted goes on serving, in seconds of the
            caller's clock.
    """

    __slots__ = ("_again", "_cancelling", "_tried", "actual", "loading", "phase", "reason", "served",
                 "wanted", "warm_until")  # fmt: skip

    def __init__(self) -> None:
        self.wanted: Hashable | None = None
        self.actual: Actual = UNLOADED
        self.served: Hashable | None = None
        self.loading: Hashable | None = None
        self.phase: Phase | None = None
        self.reason: Reason = ""
        self.warm_until = 0.0
        self._tried: Hashable | None = None
        self._cancelling = False
        self._again = False

    # The wanted state.

    def want(self, source: Hashable, *, retry: bool = False) -> None:
        """Serve `source` from now on. A source whose load has failed is loaded again only with `retry`."""
        self.wanted = source
        if retry:
            self._tried = None

    def load_again(self) -> None:
        """Load the source that serves once more, beside itself."""
        self._again = True

    def unwant(self, warm_until: float = 0.0) -> None:
        """Serve the version no more; if it is ready, it goes on until `warm_until`."""
        if self.wanted is not None or warm_until < self.warm_until:
            self.warm_until = warm_until
        self.wanted = None
        self._tried = None

    def fail(self, source: Hashable, reason: Reason) -> None:
        """Take note that `source` cannot be loaded, without a load; a version that serves goes on."""
        self.wanted = self._tried = source
        self.reason = reason
        if self.actual == UNLOADED:
            self.actual = FAILED

    def step(self, now: float) -> Step | None:
        """What to do next; None if there is nothing to do at `now`."""
        if self.loading is not None:
            if self._cancelling or self.loading == self.wanted:
                return None
            return CANCEL_LOAD
        if self.actual == DRAINING:
            return None
        if self.wanted is None:
            return BEGIN_DRAIN if self.actual == READY and now >= self.warm_until else None
        if self.wanted == self.served and self._again:
            return BEGIN_LOAD
        if self.wanted in (self._tried, self.served):
            return None
        return BEGIN_LOAD

    @property
    def settled(self) -> bool:
        """Whether the version is what is wanted of it, as far as it can be; a warm one counts as unloaded."""
        if self.loading is not None or self.actual == DRAINING:
            return False
        return self.wanted is None or self.wanted in (self._tried, self.served)

    @property
    def succeeded(self) -> bool:
        """Whether the version serves the source that is wanted."""
        return self.actual == READY and self.wanted is not None and self.served == self.wanted

    # What happens.

    def load_begun(self) -> None:
        """Take note that `BEGIN_LOAD` was obeyed."""
        assert self.loading is None, "one load of a version at a time"
        assert self.wanted is not None
        self.loading, self.phase, self._cancelling = self.wanted, QUEUED, False
        self._again = False
        self._tried = (
            None  # if this load is given up for the source that failed before, that one is tried again
        )
        if self.actual == FAILED:
            self.actual = UNLOADED
        self.reason = ""

    def entered(self, phase: Phase) -> None:
        """Take note of the phase of the load. A load never goes back to an earlier phase."""
        if self.phase is not None and PHASES.index(phase) > PHASES.index(self.phase):
            self.phase = phase

    def cancel_begun(self) -> None:
        """Take note that `CANCEL_LOAD` was obeyed; `loaded`, `load_failed` or `cancelled` follows."""
        self._cancelling = True

    def loaded(self) -> None:
        """Take note that the load has ended well, and that what it loaded serves from now on."""
        assert self.loading is not None
        self.actual, self.served = READY, self.loading
        self._end_load()

    def load_failed(self, reason: Reason) -> None:
        """Take note that the load has failed."""
        assert self.loading is not None
        self._tried, self.reason = self.loading, reason
        if self.actual == UNLOADED:
            self.actual = FAILED
        self._end_load()

    def cancelled(self) -> None:
        """Take note that the load has ended because of `CANCEL_LOAD`."""
        assert self.loading is not None
        self._end_load()

    def drain_begun(self) -> None:
        """Take note that `BEGIN_DRAIN` was obeyed: the version takes no more requests."""
        assert self.actual == READY
        self.actual = DRAINING

    def drained(self) -> None:
        """Take note that the version has answered its last request, and that its memory is free."""
        assert self.actual == DRAINING
        self.actual, self.served = UNLOADED, None

    def unloaded(self) -> None:
        """Take note that nobody wants a version that has failed."""
        assert self.actual == FAILED
        self.actual, self.reason = UNLOADED, ""

    def _end_load(self) -> None:
        self.loading = self.phase = None
        self._cancelling = False
