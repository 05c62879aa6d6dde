"""Measures versions again, on an idle machine, that were measured while the machine was busy.

A plan of a busy machine gives the same answers, but its times are too long, and its instances and batches may
be badly chosen. Such a version is loaded once more, beside itself, when nothing else happens. The new plan
takes over in one step, as a new version does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from inferpool.pool.ports import VersionKey
from inferpool.system.cpu_wait import waited_share
from inferpool.system.priority import at_low_priority

log = logging.getLogger(__name__)

BUSY_SHARE: Final = 0.1
"""The share of waiting from which a measurement counts as that of a busy machine."""
IDLE_S: Final = 60.0
"""How long the server must have had no request and no load before."""
PAUSE_S: Final = 60.0
"""Pause before the second try of a version; each further one is twice as long."""
MOST_TRIES: Final = 6
"""How often a version is measured again at most: a machine may never be idle."""
LOOK_S: Final = 10.0
"""Pause between two looks."""


@dataclass(slots=True)
class _Doubtful:
    """A version whose measurement is doubtful.

    Attributes:
        tries: how often it was measured again.
        not_before: when it may be measured again.
    """

    tries: int
    not_before: float


class IdleMeasuring:
    """The versions whose measurements are doubtful, and when the next one is measured again.

    `due` may be called in another thread than the other methods.
    """

    def __init__(self) -> None:
        self._doubtful: dict[VersionKey, _Doubtful] = {}
        self._last_work: object = None
        self._idle_since = 0.0

    def measured(self, key: VersionKey, waited: float, now: float) -> bool:
        """Take note of a version that is ready, and of the share of waiting while it was measured.

        Returns whether it will be measured again.
        """
        known = self._doubtful.pop(key, None)
        tries = 0 if known is None else known.tries
        if waited < BUSY_SHARE or tries >= MOST_TRIES:
            return False
        self._doubtful[key] = _Doubtful(tries, now + PAUSE_S * 2**tries)
        return True

    def forget(self, key: VersionKey) -> None:
        """Take note of a version that serves no longer."""
        self._doubtful.pop(key, None)

    @property
    def waits(self) -> bool:
        """Whether there is any version to be measured again."""
        return bool(self._doubtful)

    def due(self, now: float, work: object, waited_share: Callable[[], float]) -> VersionKey | None:
        """The version to measure again now; None if there is none, or the machine is not idle.

        `work` is a value that differs from the last call's if the server had anything to do meanwhile.
        `waited_share` measures whether other programs leave a core.
        """
        if work != self._last_work:
            self._last_work, self._idle_since = work, now
            return None
        if now - self._idle_since < IDLE_S:
            return None
        found = list(self._doubtful.items())
        ready = [(key, doubtful) for key, doubtful in found if doubtful.not_before <= now]
        if not ready or waited_share() >= BUSY_SHARE:
            return None
        key, doubtful = ready[0]
        if self._doubtful.get(key) is not doubtful:
            return None  # it was unloaded or loaded meanwhile
        doubtful.tries += 1
        doubtful.not_before = now + PAUSE_S * 2**doubtful.tries
        return key


class IdleWatch:
    """A thread that has versions measured again. It runs while any measurement is doubtful."""

    def __init__(
        self,
        clock: Callable[[], float],
        work: Callable[[], object],
        measure_again: Callable[[VersionKey], None],
    ) -> None:
        """Watch nothing yet.

        Args:
            work: what differs if the server had anything to do since it was last asked.
            measure_again: begins another load of a version that serves.
        """
        self._clock = clock
        self._work = work
        self._measure_again = measure_again
        self._measuring = IdleMeasuring()
        self._lock = threading.Lock()
        self._runs = False
        self._stopped = False

    def measured(self, key: VersionKey, waited: float) -> None:
        """Take note of a version that is ready, and of the share of waiting while it was measured."""
        if self._measuring.measured(key, waited, self._clock()):
            log.info(
                "%s/%d was measured while others had the cores for %.0f %% of the time; it is measured again"
                " when the machine is idle",
                *key,
                100 * waited,
            )
            with self._lock:  # the thread may be about to end
                if not self._runs:
                    self._runs = True
                    threading.Thread(target=self._run, name="idle", daemon=True).start()

    def forget(self, key: VersionKey) -> None:
        """Take note of a version that serves no longer."""
        self._measuring.forget(key)

    def stop(self) -> None:
        """Have nothing measured again any more."""
        self._stopped = True

    def _run(self) -> None:
        while not self._stopped:
            time.sleep(LOOK_S)
            with self._lock:
                if not self._measuring.waits:
                    self._runs = False
                    return
            self.look(self._clock())

    def look(self, now: float) -> None:
        """Have a version measured again if the machine is idle at last."""
        due = self._measuring.due(now, self._work(), lambda: at_low_priority(waited_share))
        if due is not None:
            self._measure_again(due)
