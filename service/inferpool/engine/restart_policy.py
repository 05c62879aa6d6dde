"""Decides what becomes of an engine that has died, and of the versions that it ran or loaded.

Plain rules with a clock that the caller gives. An engine has all versions of a device, or one version only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

Version: TypeAlias = tuple[str, int]
"""The name of a model and the number of a version."""

CRASHES: Final = 3
"""A version that crashes its engine so often within `WINDOW_S` gets an engine of its own."""
WINDOW_S: Final = 600.0
LOAD_CRASHES: Final = 2
"""A version that ends its own engine so often while it loads there has failed."""
FIRST_PAUSE_S: Final = 1.0
"""Pause before the first restart of an engine that dies again and again; it doubles up to `MOST_PAUSE_S`."""
MOST_PAUSE_S: Final = 30.0
EARLY_S: Final = 5.0
"""A process that dies so soon after its start, without anything to blame, pauses before the next start."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do after the death of an engine.

    Attributes:
        isolate: versions that leave the engine and get engines of their own, in the order of their crashes.
        fail: versions that are not loaded again, with the reason.
        pause_s: seconds to wait before the engine is started again.
    """

    isolate: Sequence[Version] = ()
    fail: Mapping[Version, str] = field(default_factory=dict)
    pause_s: float = 0.0


class RestartPolicy:
    """Counts the crashes of versions and engines."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._crashes: dict[tuple[str, Version], deque[float]] = {}
        self._load_crashes: dict[tuple[str, Version], int] = {}
        self._loaded: set[Version] = set()
        self._pauses: dict[str, float] = {}

    def died(
        self,
        engine: str,
        how: str,
        lived_s: float,
        *,
        own: Version | None = None,
        running: Collection[Version] = (),
        confirmed: Collection[Version] = (),
        loading: Collection[Version] = (),
    ) -> Decision:
        """Decide after `engine` died, as `how` says, `lived_s` seconds after its start.

        `own` is the version of an engine that has one only, None for the engine of a device. `running` are
        the versions of which it ran batches, and `loading` those that it was loading. In a version of
        `confirmed` a request ran that had been running at an earlier crash, so it is to blame.
        """
        if own is None:
            # A load that has worked before is a suspect like a run. A new one is isolated at once.
            suspects = sorted({*running, *(version for version in loading if version in self._loaded)})
            crashed = [version for version in suspects if self._count(engine, version) >= CRASHES]
            new = sorted({*loading} - self._loaded - {*crashed})
            blamed = bool(running or loading)
            return Decision((*crashed, *new), {}, self._pause(engine, blamed=blamed, lived_s=lived_s))
        version = own
        if version in loading:
            key = (engine, version)
            crashes = self._load_crashes[key] = self._load_crashes.get(key, 0) + 1
            if crashes >= LOAD_CRASHES:
                return Decision((), {version: f"its load ended the engine {crashes} times; the last {how}"})
            return Decision()
        if version in confirmed:
            crashes = self._count(engine, version)
            if crashes >= CRASHES:
                minutes = WINDOW_S / 60
                often = f"its runs ended engines of its own {CRASHES} times in {minutes:.0f} minutes"
                return Decision((), {version: f"{often}; the last {how}"})
            return Decision((), {}, min(MOST_PAUSE_S, FIRST_PAUSE_S * 2 ** (crashes - 1)))
        return Decision((), {}, self._pause(engine, blamed=False, lived_s=lived_s))

    def loaded(self, engine: str, version: Version) -> None:
        """Take note that `engine` has loaded a version: a later crash of its load there counts anew."""
        self._load_crashes.pop((engine, version), None)
        self._loaded.add(version)

    def _count(self, engine: str, version: Version) -> int:
        """Count a crash of `version`; returns how many there were within WINDOW_S."""
        now = self._clock()
        times = self._crashes.setdefault((engine, version), deque())
        times.append(now)
        while times[0] <= now - WINDOW_S:
            times.popleft()
        return len(times)

    def _pause(self, engine: str, *, blamed: bool, lived_s: float) -> float:
        """The pause before the next start; none if a version is blamed, because versions are isolated."""
        if blamed or lived_s >= EARLY_S:
            self._pauses.pop(engine, None)
            return 0.0
        pause_s = min(MOST_PAUSE_S, 2 * self._pauses.get(engine, FIRST_PAUSE_S / 2))
        self._pauses[engine] = pause_s
        return pause_s
