"""How fast explanations run: at once while the server is idle, in small parts with rests beside predictions.

A prediction waits while a batch of passes runs, and while a thread of an explanation has the GIL. Neither can
be interrupted. So beside predictions all explanations of a process take turns, a part is as small as a
prediction allows, and after each part they rest for a multiple of what the part took.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

BUSY_S: Final = 1.0
"""The server counts as idle once no prediction has been answered for so long."""
LOOK_S: Final = 0.05
"""How often the threads look for predictions of other processes."""
REST: Final = 19.0
"""Times what a part took: the explanations of a process take a twentieth of the time."""
LONGEST_REST_S: Final = 0.1
"""Slow models would need minutes with longer rests."""
REST_BETWEEN_S: Final = 0.1
"""The rest after an explanation: the event loop reads, checks and answers a request for one at a stretch."""
MARGIN: Final = 0.8
"""The share of the time left in which the passes are to run that an estimate needs at least."""
FIRST_ROWS: Final = 16
SLOWER: Final = 1.25
SLOWER_S: Final = 0.25e-3
"""A part may take so many times, and so much longer than, the quickest part: those of few rows."""
TRY_AFTER: Final = 8
"""After so many parts of a size that were in time, twice as many rows are tried whatever they took before."""
_GONE_S: Final = 0.1
"""How often a thread that waits for its turn looks whether its client is gone."""


class SharedTurn:
    """The turn that all explanations of a process share. Its methods are for their threads."""

    def __init__(
        self,
        clock: Callable[[], float],
        last_prediction: Callable[[], float],
        sleep: Callable[[threading.Event, float], object] = threading.Event.wait,
    ) -> None:
        """`last_prediction` tells when a process has answered one, or infinity while one runs here."""
        self._clock = clock
        self._last_prediction = last_prediction
        self._sleep = sleep
        self._lock = threading.Lock()
        # The first one has the turn. A plain lock would go back to the thread that has just released it.
        self._queue: deque[threading.Event] = deque()
        self._free_at = -math.inf
        self._looked = -math.inf
        self._busy = False

    @property
    def waiting(self) -> int:
        """How many threads have the turn or wait for it."""
        return len(self._queue)

    def is_busy(self) -> bool:
        """Whether there are predictions."""
        now = self._clock()
        if now - self._looked >= LOOK_S:
            self._looked = now
            self._busy = now - self._last_prediction() < BUSY_S
        return self._busy

    def take_turn(self, until: float, gone: threading.Event, longest_s: float) -> bool:
        """Wait for the turn of a thread, and then at most `longest_s` for the end of the last rest.

        False if it is the moment `until` before, or the client is `gone`.
        """
        mine = threading.Event()
        with self._lock:
            self._queue.append(mine)
            if self._queue[0] is mine:
                mine.set()
        while not mine.wait(max(0.0, min(_GONE_S, until - self._clock()))):
            if gone.is_set() or self._clock() >= until:
                self._leave_queue(mine)
                return False
        rest_s = min(self._free_at - self._clock(), until - self._clock(), longest_s)
        if rest_s > 0:
            self._sleep(gone, rest_s)
        return True

    def end_turn(self, rest_s: float) -> None:
        """Let other threads have their turn; the next part begins after `rest_s`."""
        self._free_at = self._clock() + rest_s
        self._leave_queue(self._queue[0])

    def _leave_queue(self, mine: threading.Event) -> None:
        with self._lock:
            had_turn = self._queue[0] is mine
            self._queue.remove(mine)
            if had_turn and self._queue:
                self._queue[0].set()


class PartSize:
    """How many rows a part has beside predictions: as many as take little longer than a few rows do.

    Other work of the machine can make any part slow. So a larger part is tried again from time to time, and a
    part that is slow although it has few rows becomes the one that others are compared with.

    Attributes:
        rows: the rows of the next part.
    """

    def __init__(self) -> None:
        self.rows = FIRST_ROWS
        self._quickest_s = math.inf
        self._quickest_rows = 0
        self._in_time = 0

    def ran(self, rows: int, seconds: float) -> None:
        """Take note that a part of `rows` has run for `seconds`."""
        if seconds < self._quickest_s:
            self._quickest_s, self._quickest_rows = seconds, rows
        most_s = max(SLOWER * self._quickest_s, self._quickest_s + SLOWER_S)
        if seconds > most_s:
            if rows <= self._quickest_rows:
                self._quickest_s, self._quickest_rows = seconds, rows
            elif rows <= self.rows:  # else it ran while there were no predictions
                self.rows = max(1, self._quickest_rows, self.rows // 2)
                self._in_time = 0
        elif rows >= self.rows:
            self._in_time += 1
            if self._in_time >= TRY_AFTER or self._twice_as_long(rows, seconds) <= most_s:
                self.rows = 2 * rows
                self._in_time = 0

    def _twice_as_long(self, rows: int, seconds: float) -> float:
        """Return an estimate of the seconds that twice as many `rows` take."""
        if 2 * rows <= self._quickest_rows:
            return self._quickest_s
        more_rows = rows - self._quickest_rows
        if more_rows <= 0:
            return 2 * seconds
        return seconds + rows * (seconds - self._quickest_s) / more_rows


class Turns:
    """The turns of one explanation, from the first part of its work to the last; for its thread."""

    def __init__(self, shared: SharedTurn, clock: Callable[[], float], gone: threading.Event) -> None:
        self.size = PartSize()
        self.least_rows = 0
        self._shared = shared
        self._clock = clock
        self._gone = gone
        self._has_turn = False
        self._began = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether a part has to be small, because there are predictions."""
        return self._has_turn

    def begin(self, until: float) -> None:
        """Begin the first part."""
        self._take(until, LONGEST_REST_S)

    def next_part(self, until: float, rows: int) -> None:
        """End a part and begin the next one; `rows` have been run.

        The rest is shorter if `least_rows` would not have been run by the moment `until` otherwise.
        """
        took_s = self._leave()
        longest_s = LONGEST_REST_S
        missing = self.least_rows - rows
        if missing > 0:
            # Before each part, every other explanation has one.
            parts = math.ceil(missing / self.size.rows) * (1 + self._shared.waiting)
            longest_s = min(longest_s, MARGIN * (until - self._clock()) / parts - took_s)
        self._take(until, longest_s)

    def end(self) -> None:
        """End the last part."""
        self._leave(REST_BETWEEN_S)

    def _take(self, until: float, longest_s: float) -> None:
        if self._shared.is_busy():
            self._has_turn = self._shared.take_turn(until, self._gone, longest_s)
        self._began = self._clock()

    def _leave(self, least_s: float = 0.0) -> float:
        took_s = self._clock() - self._began
        if self._has_turn:
            self._has_turn = False
            self._shared.end_turn(max(least_s, min(REST * took_s, LONGEST_REST_S)))
        return took_s
