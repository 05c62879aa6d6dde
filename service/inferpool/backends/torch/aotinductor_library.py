"""The compiled library of an AOTInductor package, called without the interpreter lock.

The functions are those of torch/csrc/inductor/aoti_runtime/interface.h, which the packages of all PyTorch
versions have. Each function returns 0, or 1 for a failure.
"""

from __future__ import annotations

import _ctypes
import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p, py_object
from pathlib import Path
from typing import Final

import torch

_capsule: Final = ctypes.PYFUNCTYPE(py_object, c_void_p, c_char_p, c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_pointer: Final = ctypes.PYFUNCTYPE(c_void_p, py_object, c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
_PREFIX: Final = "AOTInductorModelContainer"


class LibraryError(RuntimeError):
    """A function of the library failed; the text is the library's error."""


class Library:
    """A compiled model. Several threads may call `run` at once; `run` does not hold the interpreter lock.

    Attributes:
        call: the trees of arguments and of outputs, as PyTorch serialises them.
    """

    def __init__(self, file: Path, runners: int) -> None:
        """Load `file`, which may be removed afterwards. Up to `runners` runs may be in progress at once.

        Raises OSError if `file` is no such library, and LibraryError if it cannot create its model.
        """
        self._library = ctypes.CDLL(str(file))
        self._container = c_void_p()
        self._run = self._function("Run", c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_void_p)
        create = self._library[f"{_PREFIX}CreateWithDevice"]
        create.argtypes = [c_void_p, c_size_t, c_char_p, c_char_p]
        self._check(create(byref(self._container), runners, b"cpu", None))
        self._inputs = self._number("GetNumInputs")
        self._outputs = self._number("GetNumOutputs")
        arguments, outputs = c_char_p(), c_char_p()
        self._check(
            self._function("GetCallSpec", c_void_p, c_void_p)(
                self._container, byref(arguments), byref(outputs)
            )
        )
        self.call = ((arguments.value or b"").decode(), (outputs.value or b"").decode())

    @property
    def needs_weights(self) -> bool:
        """Whether the library was compiled without its weights. Then it must not run."""
        entries, count = c_void_p(), c_size_t()
        function = self._function("ExtractConstantsMapEntries", c_void_p, c_void_p, ctypes.c_bool)
        self._check(function(self._container, byref(entries), byref(count), False))
        return count.value < self._number("GetNumConstants")

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """The outputs for `tensors`, both in the flat order of `call`; raises LibraryError."""
        if len(tensors) != self._inputs:
            raise LibraryError(f"got {len(tensors)} tensors, expected {self._inputs}")
        # The library takes ownership of the input handles. The output handles become ours.
        capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)
        input_handles = (c_void_p * self._inputs)(*(_pointer(capsule, None) for capsule in capsules))
        output_handles = (c_void_p * self._outputs)()
        self._check(
            self._run(self._container, input_handles, self._inputs, output_handles, self._outputs, None, None)
        )
        capsules = [_capsule(handle, None, None) for handle in output_handles if handle]
        outputs = iter(torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(capsules))
        return [next(outputs) if handle else None for handle in output_handles]

    def close(self) -> None:
        """Free the library's memory. No run is in progress and none follows."""
        self._function("Delete")(self._container)
        _ctypes.dlclose(self._library._handle)

    def _function(self, name: str, *kinds: type) -> ctypes._NamedFuncPointer:
        function = self._library[_PREFIX + name]
        function.argtypes = [c_void_p, *kinds]
        function.restype = c_int
        return function

    def _number(self, name: str) -> int:
        number = c_size_t()
        self._check(self._function(name, POINTER(c_size_t))(self._container, byref(number)))
        return number.value

    def _check(self, status: int) -> None:
        if status:
            text = c_char_p()
            self._library.AOTInductorGetLastError(byref(text))
            raise LibraryError((text.value or b"the library gives no reason").decode(errors="replace"))
