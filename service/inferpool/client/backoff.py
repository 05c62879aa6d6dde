"""How long a client waits before it repeats a request: as long as the server says, and a random time more.

The random time keeps clients that were refused together from coming back together.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Final

FIRST_S: Final = 0.1
"""The longest random time before the first repetition; it doubles with each."""
LONGEST_S: Final = 10.0
"""The longest random time before any repetition."""
MOST_WAIT_S: Final = 60.0
"""A server that says a longer time than this is not waited for."""


class Backoff:
    """Decides how long to wait before a request is repeated, and how often it is.

    Attributes:
        retries: how many times a request is repeated.
    """

    __slots__ = ("_random", "retries")

    def __init__(self, retries: int, fraction: Callable[[], float] = random.random) -> None:
        """Repeat at most `retries` times; `fraction` returns random numbers from 0 to 1."""
        if retries < 0:
            raise ValueError(f"retries is {retries}; expected a number from 0")
        self.retries = retries
        self._random = fraction

    def wait_s(self, attempt: int, retry_after_s: float | None) -> float | None:
        """Return the seconds until the repetition after the attempt number `attempt`, from 0; None for never.

        `retry_after_s` is what the server says, None if it says nothing.
        """
        if attempt >= self.retries or (retry_after_s is not None and retry_after_s > MOST_WAIT_S):
            return None
        longest = min(LONGEST_S, FIRST_S * 2.0 ** min(attempt, 16))
        return (retry_after_s or 0.0) + longest * self._random()


def read_retry_after(value: str | None, now: Callable[[], float] = time.time) -> float | None:
    """Return the seconds in a Retry-After header (RFC 9110, 10.2.3); None without a valid one.

    `now` returns the seconds since 1970, for a header that is a date.
    """
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now())
    except (ValueError, OverflowError):
        return None
