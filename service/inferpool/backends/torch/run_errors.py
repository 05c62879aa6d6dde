"""Tells runs that PyTorch refuses because of their inputs from faults of the machine or of PyTorch."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Final

import torch

from inferpool.backends.base import Rejection
from inferpool.backends.torch.aotinductor_library import LibraryError
from inferpool.errors import short_reason

_REFUSALS: Final = (RuntimeError, IndexError, ValueError, AssertionError, torch.jit.Error, LibraryError)
"""The types that operations, guards of exported programs and checks of compiled code raise."""
_FAULTS: Final = re.compile(
    r"allocat|out of memory|INTERNAL ASSERT|please report|CUDA|cuDNN|CUBLAS|cuda error|not implemented"
    r"|NotImplementedError|could not create a primitive",
    re.IGNORECASE,
)
"""Words of errors that no other input would avoid for sure."""
_TYPE: Final = re.compile(r"^(?:[\w.]+\.)?[A-Z]\w*(?:Error|Exception): ")
_MARK: Final = re.compile(r"^( *)~+ <--- HERE$")
"""Marks the call that failed, in the line below, where an error quotes the code of TorchScript."""
_CALL: Final = re.compile(r"torch\.(\w+)\(")


class NotDifferentiable(Exception):
    """The gradients of an output cannot be computed; the text is the reason."""


def find_rejection(error: Exception) -> Rejection | None:
    """The operation that has refused the inputs of a run, and its reason; None for another fault."""
    if isinstance(error, NotDifferentiable):
        return Rejection("", str(error))
    if not isinstance(error, _REFUSALS) or isinstance(error, NotImplementedError | torch.OutOfMemoryError):
        return None
    reason = short_reason(error)
    if _FAULTS.search(reason):
        return None
    return Rejection(_operation(str(error)), _TYPE.sub("", reason))


def _operation(text: str) -> str:
    """The operation that the innermost mark in a traceback of TorchScript points to; empty without one."""
    lines = text.partition("original code")[0].splitlines()
    found = ""
    for line, below in pairwise(lines):
        mark = _MARK.match(below)
        if mark is not None:
            call = _CALL.match(line, len(mark[1]))
            found = call[1] if call is not None else ""
    return found
