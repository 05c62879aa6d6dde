"""Tells runs that ONNX Runtime refuses because of their inputs from faults of the machine or the runtime."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from inferpool.backends.base import Rejection
from inferpool.backends.onnx.load_errors import without_noise
from inferpool.tensors import Tensors, name_text, shape_text

FRAGILE: Final = frozenset(("DynamicQuantizeLSTM", "Einsum", "GRU", "LSTM", "RNN", "Unique"))
"""Operations that end the process on a tensor with an empty dimension, by SIGABRT or SIGFPE.

Seen in ONNX Runtime 1.31 on the CPU, where some 90 other operations either ran or refused such tensors.
"""
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


class EmptyInput(ValueError):
    """An input without elements that would end the process."""

    def __init__(self, operation: str, name: str, shape: tuple[int, ...]) -> None:
        """`name` and `shape` are those of the input, `operation` is the one that cannot run it."""
        super().__init__(
            f"tensor {name_text(name)} has shape {shape_text(shape)}; this operation takes no empty tensors"
        )
        self.operation = operation


def fragile_operation(operations: Iterable[str]) -> str:
    """The first of `operations` that ends the process on an empty tensor; "" if there is none."""
    return next((operation for operation in sorted(operations) if operation in FRAGILE), "")


def refuse_empty(operation: str, inputs: Tensors) -> None:
    """Raise EmptyInput if a tensor has no elements, for a model with the fragile `operation`."""
    for name, tensor in inputs.items():
        if not tensor.size:
            raise EmptyInput(operation, name, tensor.shape)


def find_rejection(error: Exception) -> Rejection | None:
    """The operation that has refused the inputs of a run, and its reason; None if `error` is another fault.

    Every operation checks the sizes and indexes that it gets. A model that runs other inputs, as the server
    has seen at load, fails such a check only because of this input.
    """
    if isinstance(error, EmptyInput):
        return Rejection(error.operation, str(error))
    if not type(error).__module__.startswith("onnxruntime."):
        return None
    text = without_noise(str(error))
    if _FAULTS.search(text):
        return None
    found = _NODE.search(text)
    if found is not None:
        return Rejection(found[1], found[2].strip())
    return Rejection("", text) if _INPUT.search(text) else None
