"""How slow a client may be, in sending a request and in reading its answer."""

from __future__ import annotations

from typing import Final

STALLED_S: Final = 60.0
LEAST_BYTES: Final = 64 * 1024
"""Who sends or reads fewer bytes than this in `STALLED_S` seconds, and is not done with it, is hung up on."""


class SlowClientTimer:
    """The pace of the request that is coming in.

    Time goes by windows: a request of which the first brings too little, or the second, is too slow, however
    fast it came before. Nothing is done for a request but to begin, nor for bytes but to count them.

    Attributes:
        size: bytes that have come, of all requests.
    """

    __slots__ = ("_before", "_since", "size")

    def __init__(self) -> None:
        self.size = 0
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """A window begins: that of a new request, or of one that has been held up from here."""
        self._since = now
        self._before = self.size

    def left_s(self, now: float) -> float:
        """Seconds until it is worth another look; none are left where the request is too slow."""
        left_s = self._since + STALLED_S - now
        if left_s <= 0 and self.size - self._before >= LEAST_BYTES:
            self.begin(now)
            return STALLED_S
        return left_s
