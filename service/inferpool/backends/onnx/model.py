"""Models of ONNX Runtime on the CPU: sessions, and the conversion of tensors that numpy cannot hold."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from inferpool.backends.base import LoadedModel, LoadOptions, Rejection
from inferpool.backends.onnx.run_errors import find_rejection, refuse_empty
from inferpool.errors import LoadError
from inferpool.system.install_hints import install_command
from inferpool.tensors import ANY, JSON, Array, Signature, Tensors, names_text

# Since 1.29 the runtime stores a device id and a queue of events on disk, and sends the events.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

try:
    import onnxruntime as ort
except ImportError as error:
    raise LoadError(
        f"ONNX Runtime is not installed: {install_command('cpu')}, or 'inferpool[gpu]' on a machine"
        " with an NVIDIA driver (never both: they overwrite each other)"
    ) from error

BFLOAT16: Final = 16
"""BFLOAT16 in onnx.proto (`TensorProto.DataType`)."""


class OnnxModel(LoadedModel):
    """A session of ONNX Runtime. `run` is thread-safe and releases the GIL.

    The runtime computes the whole graph whichever outputs a run requests, and discards the others.
    """

    def __init__(self, session: Any, signature: Signature, fragile: str = "") -> None:
        """`fragile` is an operation of the model that ends the process on empty tensors, or ""."""
        self.signature = signature
        self._fragile = fragile
        self._session = session
        self._all_outputs = list(signature.outputs_by_name)
        # The options of each thread's last run. One of them stops that run, and no other.
        self._runs: dict[int, Any] = {}

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        """Run the session; raises what ONNX Runtime raises, and EmptyInput."""
        if self._fragile:
            refuse_empty(self._fragile, inputs)
        names = self._all_outputs if outputs is None else list(outputs)
        return dict(zip(names, self._session.run(names, inputs, self._begin_run()), strict=True))

    def stop_run(self, thread: int) -> None:
        """Let the thread's run end before the next operation, or the next turn of a loop."""
        options = self._runs.get(thread)
        if options is not None:
            options.terminate = True

    def release_memory(self) -> None:
        """Free what the session's arena keeps, which is as much as its largest run took.

        The runtime frees memory only at the end of a run. This run is told to end before its first operation,
        so what the model computes costs nothing, and cannot fail.
        """
        options = ort.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        options.terminate = True
        with contextlib.suppress(Exception):  # the run ends with an error, as it is told to
            self._session.run(self._all_outputs, _least_inputs(self.signature), options)

    def _begin_run(self) -> Any:
        """The options of a run that begins; without options, the session would make its own at each run."""
        options = self._runs[threading.get_ident()] = ort.RunOptions()
        return options

    def rejection(self, error: Exception) -> Rejection | None:
        """The operation that has refused its inputs, and the runtime's reason; None for another fault."""
        return find_rejection(error)

    def close(self) -> None:
        """Drop the session, which frees its memory."""
        del self._session


class BrainFloatModel(OnnxModel):
    """A session with BF16 inputs or outputs. The runtime's `run` has no arrays for BF16.

    A BF16 input is wrapped into a runtime value without a copy. A BF16 output is read from the memory of the
    runtime's value.
    """

    def __init__(self, session: Any, signature: Signature, fragile: str = "") -> None:
        """Raises LoadError if an output is BF16 and another input or output cannot be bound to memory."""
        super().__init__(session, signature, fragile)
        self._bf16_inputs = frozenset(spec.name for spec in signature.inputs if spec.datatype == "BF16")
        self._bf16_outputs = frozenset(spec.name for spec in signature.outputs if spec.datatype == "BF16")
        unbound = [
            *(f'input "{spec.name}" (strings)' for spec in signature.inputs if spec.datatype == "BYTES"),
            *(f'output "{spec.name}" (no tensor)' for spec in signature.outputs if spec.datatype == JSON),
        ]
        if self._bf16_outputs and unbound:
            raise LoadError(
                f"BF16 in output {names_text(sorted(self._bf16_outputs))} cannot be served together with"
                f" {' and '.join(unbound)}"
            )

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        """Run the session; raises what ONNX Runtime raises, and EmptyInput."""
        if self._fragile:
            refuse_empty(self._fragile, inputs)
        names = self._all_outputs if outputs is None else list(outputs)
        feeds = {
            name: _from_bits(tensor) if name in self._bf16_inputs else tensor
            for name, tensor in inputs.items()
        }
        if self._bf16_outputs.isdisjoint(names):
            return dict(zip(names, self._session.run(names, feeds, self._begin_run()), strict=True))
        binding = self._session.io_binding()
        for name, feed in feeds.items():
            value = ort.OrtValue.ortvalue_from_numpy(feed) if isinstance(feed, np.ndarray) else feed
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding, self._begin_run())
        return {
            name: _to_bits(value) if name in self._bf16_outputs else value.numpy()
            for name, value in zip(names, binding.get_outputs(), strict=True)
        }


def _least_inputs(signature: Signature) -> Tensors:
    """Inputs of the least size that the signature allows. The system gives their memory when it is read."""
    inputs: Tensors = {}
    for spec in signature.inputs:
        shape = [1 if size == ANY else size for size in spec.shape or ()]
        is_text = spec.datatype == "BYTES"
        inputs[spec.name] = np.full(shape, "", spec.dtype) if is_text else np.zeros(shape, spec.dtype)
    return inputs


def session_settings(options: LoadOptions) -> Any:
    """The session options (`ort.SessionOptions`) that all sessions share."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    # The runtime raises every error that is worth a log line. Its own log would repeat the error on stderr.
    settings.log_severity_level = 4
    # A spinning thread takes a core from the web side, and from the other models, to save microseconds.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return settings


def open_cpu_session(file: Path, options: LoadOptions) -> Any:
    """A session (`ort.InferenceSession`) on the CPU; raises what ONNX Runtime raises."""
    return ort.InferenceSession(
        str(file), session_settings(options), providers=["CPUExecutionProvider"], enable_fallback=0
    )


def runtime_version() -> str:
    """The version of ONNX Runtime: `1.31.1`."""
    version: str = ort.__version__
    return version


class _Bits:
    """The memory of a BF16 value, in the form from which numpy makes an array. Keeps the value alive."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(value.shape()),
            "typestr": np.dtype(np.uint16).str,
            "data": (value.data_ptr(), False),
        }


def _from_bits(bits: Array) -> Any:
    # The runtime ignores strides: it reads consecutive elements from the first element's address.
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.asarray(bits, order="C"), BFLOAT16)


def _to_bits(value: Any) -> Array:
    return np.asarray(_Bits(value))
