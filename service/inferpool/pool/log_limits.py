"""Log lines that others can cause at will: of each kind one a minute, which says how many went unsaid.

What a model says of a failure may quote what it was given, and a log is no place for that.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Final

import numpy as np

from inferpool.tensors import Array, Tensors

EVERY_S: Final = 60.0
"""Seconds between two lines of one kind."""


MOST_CHARACTERS: Final = 400
"""Of what a model says; both ends of a longer message are left, for it is those that say what is wrong."""
_MOST_ELEMENTS: Final = 100_000
"""Among more inputs no number of a message is looked for: it is taken for one of them."""
_NUMBER: Final = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?(?!\w)")
_OMITTED: Final = "…"


def redact_error(error: Exception, inputs: Tensors) -> Exception:
    """An error to log in place of `error`, which `inputs` made a model raise: it quotes nothing of them.

    It has the same name and comes from the same place. Numbers that are among the inputs are left out, and
    all of a message where there is text among them, for what of it is quoted cannot be told.
    """
    try:
        said = _without(inputs, error)
    except Exception:  # noqa: BLE001 - an error may not even be able to say what it is
        said = _OMITTED
    kind = type(error)
    stand_in: type[Exception] = type(kind.__qualname__, (Exception,), {"__module__": kind.__module__})
    return stand_in(said).with_traceback(error.__traceback__)


def _without(inputs: Tensors, error: Exception) -> str:
    """What `error` says, but for what it quotes of `inputs`."""
    if any(tensor.dtype.kind == "O" for tensor in inputs.values()):
        return _OMITTED
    said = str(error)
    if len(said) > MOST_CHARACTERS:
        half = MOST_CHARACTERS // 2
        said = f"{said[:half]} {_OMITTED} {said[-half:]}"
    if sum(tensor.size for tensor in inputs.values()) > _MOST_ELEMENTS:
        return _NUMBER.sub(_OMITTED, said)
    given = np.concatenate([np.ravel(tensor).astype(np.float64) for tensor in inputs.values()])
    return _NUMBER.sub(lambda number: _OMITTED if _is_among(given, number[0]) else number[0], said)


def _is_among(given: Array, number: str) -> bool:
    value = float(number)
    with np.errstate(all="ignore"):
        # As rounded as tensors are printed.
        return bool((np.abs(given - value) <= 1e-3 * abs(value)).any())


class LogLimiter:
    """Decides which lines are written; safe to share between threads."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives moments in seconds."""
        self._clock = clock
        self._lock = threading.Lock()
        self._said: dict[str, float] = {}
        self._unsaid: dict[str, int] = {}

    def unsaid(self, kind: str) -> int | None:
        """How many of `kind` went unsaid since the last that was said; None where this one is to as well.

        There must be but few kinds, and none that a client can make up.
        """
        with self._lock:
            now = self._clock()
            said = self._said.get(kind)
            if said is not None and now < said + EVERY_S:
                self._unsaid[kind] = self._unsaid.get(kind, 0) + 1
                return None
            self._said[kind] = now
            return self._unsaid.pop(kind, 0)
