"""Tells runs that ONNX Runtime refuses because of their inputs from faults of the machine or the runtime."""

from __future__ import annotations

import re
from typing import Final

from inferpool.backends.base import Rejection
from inferpool.backends.onnx.load_errors import without_noise

_NODE: Final = re.compile(
    r"Non-zero status code returned while running (\S+) node\. Name:'.*?' Status Message: (.*)", re.DOTALL
)
"""How the runtime reports an operation that has refused its inputs, in every version since 1.0."""
_INPUT: Final = re.compile(
    r"Got invalid dimensions for input|Invalid rank for input|Unexpected input data type"
)
"""How it reports an input that the graph itself does not take."""
_FAULTS: Final = re.compile(
    r"allocat|out of memory|bad_alloc|not enough memory|CUDA|CUDNN|CUBLAS|cuda error|TensorRT"
    r"|terminate flag|not implemented|NOT_IMPLEMENTED|EP_FAIL",
    re.IGNORECASE,
)
"""Words of errors that no other input would avoid for sure."""


def find_rejection(error: Exception) -> Rejection | None:
    """The operation that has refused the inputs of a run, and its reason; None if `error` is another fault.

    Every operation checks the sizes and indexes that it gets. A model that runs other inputs, as the server
    has seen at load, fails such a check only because of this input.
    """
    if not type(error).__module__.startswith("onnxruntime."):
        return None
    text = without_noise(str(error))
    if _FAULTS.search(text):
        return None
    found = _NODE.search(text)
    if found is not None:
        return Rejection(found[1], found[2].strip())
    return Rejection("", text) if _INPUT.search(text) else None
