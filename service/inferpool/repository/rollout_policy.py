"""Whether a canary is to be promoted or rolled back: a sequential test, which may be looked at at any time.

A fixed interval, looked at after each request, sooner or later calls every canary worse. So the shares of
requests that fail, and that are slow, have *confidence sequences*: intervals that hold the true share at all
moments together with a given probability. For a share p of which s of n requests were seen, the mixture of
likelihood ratios over all p' in [0, 1]

    M(p) = ∫ p'^s (1 - p')^(n - s) dp' / (p^s (1 - p)^(n - s)) = 1 / ((n + 1) C(n, s) p^s (1 - p)^(n - s))

is a martingale with mean 1 if p is the true share. By Ville's inequality it never reaches 1/a but with the
probability a. The interval is all p with M(p) < 1/a.

Sources: H. Robbins, "Statistical methods related to the law of the iterated logarithm", Annals of
Mathematical Statistics 41 (1970), 1397-1409. S. Howard, A. Ramdas, J. McAuliffe and J. Sekhon, "Time-uniform,
nonparametric, nonasymptotic confidence sequences", Annals of Statistics 49 (2021), 1055-1080.

The errors of all tests together are bounded: a canary that is as good as the stable version is rolled back
with a probability of at most `ERROR`, however long it runs. The test takes requests to be independent of one
another. If a few callers send most of them, and a caller's requests stay on one side, that is not so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from inferpool.errors import Reason
from inferpool.observe.families import TRIAL_BOUNDS
from inferpool.repository.traffic import PROMOTED, ROLLED_BACK, CanaryState

ERROR: Final = 0.01
"""How probable it may be that a canary is rolled back that is as good as the stable version."""
SLOWER: Final = 1.25
LATER_S: Final = 0.0005
"""A canary may take a quarter longer and half a millisecond more: smaller models have colder caches when they
run more rarely."""
_FAILURE_ERROR: Final = ERROR / 4
"""Half of the error is for failures, and half of that for either version."""
_STEPS: Final = 60


class Interval(NamedTuple):
    """The shares that are possible, from `low` to `high`."""

    low: float
    high: float


class Decision(NamedTuple):
    """What is to become of a canary, and why."""

    state: CanaryState
    reason: Reason


@dataclass(frozen=True, slots=True)
class TrialCounts:
    """What is counted of one of the two versions.

    Attributes:
        failures: requests that ended with an error that no client has caused.
        by_time: requests that were answered, by queue and compute time: one number for each of
            `TRIAL_BOUNDS`, and one for those above all.
    """

    failures: int = 0
    by_time: tuple[int, ...] = (0,) * (len(TRIAL_BOUNDS) + 1)

    @property
    def answered(self) -> int:
        """Requests that were answered with outputs."""
        return sum(self.by_time)

    @property
    def requests(self) -> int:
        """Requests that count."""
        return self.answered + self.failures

    def slower_than(self, bound: int) -> int:
        """Requests that took longer than `TRIAL_BOUNDS[bound]`."""
        return sum(self.by_time[bound + 1 :])

    def quantile_s(self, share: float) -> float | None:
        """About how many seconds a `share` of the answered requests took at most; None without any."""
        target, seen = share * self.answered, 0
        for index, count in enumerate(self.by_time):
            seen += count
            if count and seen >= target:
                return TRIAL_BOUNDS[min(index, len(TRIAL_BOUNDS) - 1)]
        return None


def _compared_bounds() -> list[tuple[int, int]]:
    """For each bound of the stable version: the bound that requests of the canary are to keep as often."""
    pairs = []
    for stable, bound in enumerate(TRIAL_BOUNDS):
        allowed = SLOWER * bound + LATER_S
        canary = next((index for index, other in enumerate(TRIAL_BOUNDS) if other >= allowed), None)
        if canary is not None:
            pairs.append((canary, stable))
    return pairs


_BOUNDS: Final = _compared_bounds()
_TIME_ERROR: Final = ERROR / 4 / len(_BOUNDS)


def interval(seen: int, requests: int, error: float) -> Interval:
    """The confidence sequence of a share of which `seen` of `requests` were seen.

    The true share is outside of the intervals of any number of requests with a probability of `error` at
    most.
    """
    if not requests:
        return Interval(0.0, 1.0)
    others = requests - seen
    limit = (
        math.log(error) + math.lgamma(seen + 1) + math.lgamma(others + 1) - math.lgamma(requests + 2)
    )  # the least logarithm of the likelihood of a share in the interval

    def holds(share: float) -> bool:
        if share in (0.0, 1.0):
            return (seen if share == 0.0 else others) == 0
        return seen * math.log(share) + others * math.log1p(-share) > limit

    middle = seen / requests
    return Interval(_edge(holds, middle, 0.0), _edge(holds, middle, 1.0))


class _Test(NamedTuple):
    """Two shares to be compared: what was seen of the canary, and of the stable version."""

    seen: int
    requests: int
    stable_seen: int
    stable_requests: int
    error: float
    what: str
    stable_what: str


def _tests(canary: TrialCounts, stable: TrialCounts) -> Iterator[_Test]:
    yield _Test(
        canary.failures, canary.requests, stable.failures, stable.requests, _FAILURE_ERROR, "failed", "fail"
    )
    for mine, theirs in _BOUNDS:
        yield _Test(
            canary.slower_than(mine), canary.answered, stable.slower_than(theirs), stable.answered,
            _TIME_ERROR, f"took more than {1000 * TRIAL_BOUNDS[mine]:.3g} ms",
            f"take more than {1000 * TRIAL_BOUNDS[theirs]:.3g} ms",
        )  # fmt: skip


def _edge(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """Where a condition that holds `inside` ends on the way to `outside`, just outside."""
    if holds(outside):
        return outside
    for _ in range(_STEPS):
        between = (inside + outside) / 2
        if holds(between):
            inside = between
        else:
            outside = between
    return outside


def decide(canary: TrialCounts, stable: TrialCounts, least_requests: int) -> Decision | None:
    """What is to become of a canary; None if that is not certain yet.

    It is rolled back as soon as its share of failures or of slow requests is certainly above that of the
    stable version. It is promoted once each version has answered `least_requests`, and no such share is above
    what that of the stable version may be.
    """
    inside = True
    for test in _tests(canary, stable):
        seen, requests, stable_seen, stable_requests, error, what, stable_what = test
        # Almost always the canary's share is not even seen to be higher.
        if not seen or seen * stable_requests <= stable_seen * requests:
            continue
        own, other = interval(seen, requests, error), interval(stable_seen, stable_requests, error)
        if own.low > other.high:
            return Decision(
                ROLLED_BACK,
                f"{seen} of {requests} requests {what}: certainly more than {100 * own.low:.3g} %; of the"
                f" stable version's, certainly less than {100 * other.high:.3g} % {stable_what}",
            )
        inside = inside and seen / requests <= other.high
    if inside and min(canary.requests, stable.requests) >= least_requests:
        return Decision(
            PROMOTED,
            f"{canary.failures} of {canary.requests} requests failed, and {stable.failures} of"
            f" {stable.requests} of the stable version's; it is not slower",
        )
    return None
