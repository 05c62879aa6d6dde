"""Takes the inputs of a request out of error messages, before they are logged or sent.

A model's error message may quote the model's inputs, and a log is no place for those. It may also name files
of this machine, which are nobody else's business.
"""

from __future__ import annotations

import re
from typing import Final

import numpy as np

from inferpool.backends.base import Rejection
from inferpool.tensors import Array, Tensors

MAX_CHARACTERS: Final = 400
"""Of an error message. A longer one keeps its beginning and its end, which usually say what is wrong."""
_MAX_ELEMENTS: Final = 100_000
"""With more input elements, all numbers in a message are omitted, because a search would take long."""
_NUMBER: Final = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?(?!\w)")
_PATH: Final = re.compile(r"(?:[A-Za-z]:)?(?:[\w.~@+-]*[/\\])+[\w.@+-]+(?::\d+)?")
_OMITTED: Final = "…"


def redact_error(error: Exception, inputs: Tensors) -> Exception:
    """Return an error to log in place of `error`, which `inputs` made a model raise, without any of `inputs`.

    The returned error has the same type name and traceback. Numbers that are among the inputs are omitted. If
    an input is text, the whole message is omitted, because quoted text cannot be told from other text.
    """
    try:
        message = _without_inputs(str(error), inputs)
    except Exception:  # noqa: BLE001 - an error may raise when it is turned into text
        message = _OMITTED
    kind = type(error)
    stand_in: type[Exception] = type(kind.__qualname__, (Exception,), {"__module__": kind.__module__})
    return stand_in(message).with_traceback(error.__traceback__)


def refusal_text(rejection: Rejection, inputs: Tensors) -> str:
    """Return one line for the client that says why a model refuses `inputs`, without any of them.

    Numbers that are among the inputs are omitted, and so are paths. If an input is text, only the operation
    that refuses it is named.
    """
    parts = ["the model refuses this input", rejection.operation]
    try:
        reason = " ".join(_PATH.sub(_OMITTED, _without_inputs(rejection.reason, inputs)).split())
        parts.append("" if reason == _OMITTED else reason)
    except Exception:  # noqa: BLE001 - the error is answered, with or without the reason
        parts.append("")
    return ": ".join(filter(None, parts))


def _without_inputs(message: str, inputs: Tensors) -> str:
    if any(tensor.dtype.kind == "O" for tensor in inputs.values()):
        return _OMITTED
    if len(message) > MAX_CHARACTERS:
        half = MAX_CHARACTERS // 2
        message = f"{message[:half]} {_OMITTED} {message[-half:]}"
    if sum(tensor.size for tensor in inputs.values()) > _MAX_ELEMENTS:
        return _NUMBER.sub(_OMITTED, message)
    given = np.concatenate([np.ravel(tensor).astype(np.float64) for tensor in inputs.values()])
    return _NUMBER.sub(lambda number: _OMITTED if _is_among(given, number[0]) else number[0], message)


def _is_among(given: Array, number: str) -> bool:
    value = float(number)
    with np.errstate(all="ignore"):
        # Printed tensors are rounded.
        return bool((np.abs(given - value) <= 1e-3 * abs(value)).any())
