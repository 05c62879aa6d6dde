"""The figures that Inferpool has to reach beside its peers: `scripts/bench peers --check`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.peers.peers import PEERS
from benchmarks.peers.results import Results

OWN = "inferpool"
IN_PROCESS = "in-process"
BATCHING = [
    peer.name for peer in PEERS.values() if peer.batches and not peer.is_own and "floor" not in peer.name
]
OTHERS = [name for name, peer in PEERS.items() if not peer.is_own and "floor" not in name]


class Target(NamedTuple):
    """A target and the measured figure; None if a part was not measured."""

    wanted: str
    at_least: bool
    bound: float
    measured: float | None

    @property
    def holds(self) -> bool:
        """Whether it was measured and is reached."""
        if self.measured is None:
            return False
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound


class Figures:
    """Medians by workload, peer and level; a missing median is None, and so is every result of it."""

    def __init__(self, results: Results) -> None:
        self._results = results

    def of(self, workload: str, peer: str, level: int, figure: str) -> float | None:
        """A median."""
        spread = self._results.spread(workload, peer, level, figure)
        return None if spread is None else spread.median

    def ratio(self, workload: str, level: int, figure: str, peer: str) -> float | None:
        """Inferpool's figure by the peer's."""
        own, other = (self.of(workload, name, level, figure) for name in (OWN, peer))
        return own / other if own is not None and other else None

    def least(self, workload: str, level: int, figure: str, peers: list[str]) -> float | None:
        """The least among peers."""
        found = [value for name in peers if (value := self.of(workload, name, level, figure)) is not None]
        return min(found, default=None)

    def best(self, workload: str, peer: str, figure: str) -> float | None:
        """The most among levels."""
        levels = self._results.levels(workload, peer)
        return max(
            (value for level in levels if (value := self.of(workload, peer, level, figure))), default=None
        )

    def lost(self, workload: str, level: int) -> float | None:
        """Inferpool's requests without a good answer, of the worst round."""
        spreads = [self._results.spread(workload, OWN, level, name) for name in ("refused", "lost")]
        return None if None in spreads else sum(spread.most for spread in spreads if spread)


def targets(results: Results) -> Iterator[Target]:
    """Every target, in the order of the project's list."""
    figures = Figures(results)
    small, rate = "row-json", "requests_per_s"

    def at_least(wanted: str, bound: float, measured: float | None) -> Target:
        return Target(wanted, True, bound, measured)

    def at_most(wanted: str, bound: float, measured: float | None) -> Target:
        return Target(wanted, False, bound, measured)

    ratio = figures.ratio
    yield at_least("small JSON, 64: ≥ 1.5 × Mosec's requests/s", 1.5, ratio(small, 64, rate, "mosec"))
    yield at_most("small JSON, 64: ≤ 0.7 × Mosec's CPU a request", 0.7, ratio(small, 64, "cpu_us", "mosec"))
    alone = figures.of(small, OWN, 1, "p50_ms")
    yield at_most("small JSON, 1: median ≤ 0.25 ms", 0.25, alone)
    nearest = figures.least(small, 1, "p50_ms", BATCHING)
    times = nearest / alone if nearest and alone else None
    yield at_least("small JSON, 1: median ≥ 10 × below every batching peer's", 10, times)
    yield at_least(
        "image JSON, 16: ≥ 2.4 × Triton's requests/s", 2.4, ratio("image-json", 16, rate, "pytriton")
    )
    yield at_least("image JSON, 16: ≥ 3.5 × Mosec's requests/s", 3.5, ratio("image-json", 16, rate, "mosec"))
    yield at_least(
        "image binary, 16: ≥ 1.5 × Mosec's requests/s", 1.5, ratio("image-binary", 16, rate, "mosec")
    )
    ceiling = figures.of("resnet50", IN_PROCESS, 0, rate)
    best = figures.best("resnet50", OWN, rate)
    share = best / ceiling if best and ceiling else None
    yield at_least("ResNet-50: ≥ 0.97 of the best in-process loop's rows/s", 0.97, share)
    nearest = figures.least("resnet50", 16, "p99_ms", OTHERS)
    own = figures.of("resnet50", OWN, 16, "p99_ms")
    yield at_most(
        "ResNet-50, 16: p99 below every peer's (ratio to the nearest)",
        1.0,
        own / nearest if own and nearest else None,
    )
    yield at_most("small JSON: memory ≤ 110 MiB", 110, figures.of(small, OWN, 64, "pss_mib"))
    yield at_most("small JSON, 256: no errors", 0, figures.lost(small, 256))
    yield at_most("small JSON, 256: p99 below Mosec's (ratio)", 1.0, ratio(small, 256, "p99_ms", "mosec"))
