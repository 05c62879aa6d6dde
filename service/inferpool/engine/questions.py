"""The questions of a web process that an engine has not answered yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from inferpool.engine.records import ASK, ASK_FIELDS, ProtocolError, json_record

MOST_QUESTIONS: Final = 256
"""Questions that may be without a reply at a time."""

Then = Callable[[Any], None]


class Questions:
    """Numbers questions, and finds the callback that waits for a reply."""

    __slots__ = ("_last", "_waiting")

    def __init__(self) -> None:
        self._waiting: dict[int, Then] = {}
        self._last = 0

    @property
    def are_many(self) -> bool:
        """Whether no further question may be asked now."""
        return len(self._waiting) >= MOST_QUESTIONS

    def record(self, message: object, then: Then) -> bytes:
        """Return the record of a question, a JSON value, whose reply goes to `then`."""
        self._last = self._last % 0xFFFFFFFF + 1
        record = json_record(ASK_FIELDS, ASK, self._last, message)
        self._waiting[self._last] = then
        return record

    def take(self, number: int) -> Then:
        """Return the callback of a question that is answered; raises ProtocolError if it was not asked."""
        then = self._waiting.pop(number, None)
        if then is None:
            raise ProtocolError(f"a reply to question {number} came, which was not asked")
        return then

    def take_all(self) -> list[Then]:
        """Return the callbacks of all questions: they get no reply, because the engine is gone."""
        waiting = list(self._waiting.values())
        self._waiting.clear()
        return waiting
