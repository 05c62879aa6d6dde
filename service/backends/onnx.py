"""ONNX models by ONNX Runtime. Nothing else in the project imports onnxruntime."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

# Since 1.29 the runtime would try to keep a device id on disk for its telemetry.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from service.backends.base import Backend, LoadedModel, LoadOptions
from service.errors import LoadError
from service.tensors import ANY, Signature, Tensors, TensorSpec

try:
    import onnxruntime as ort
except ImportError as error:
    raise LoadError(
        "ONNX Runtime is not installed: pip install 'inferpool[cpu]', or 'inferpool[gpu]' on a machine"
        " with an NVIDIA driver (never both: they overwrite each other)"
    ) from error

DATATYPES: Final = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
"""ONNX Runtime's type names to the protocol's."""


class OnnxBackend(Backend):
    """Loads `.onnx` files, by path, so that external data is looked for beside the model only."""

    name = "onnx"
    suffixes = (".onnx",)

    def load(self, file: Path, options: LoadOptions) -> LoadedModel:
        """Load `file` on `options.device`; raises LoadError."""
        return OnnxModel(file, options)

    def describe(self) -> str:
        """The runtime's version."""
        return f"onnxruntime {ort.__version__}"


class OnnxModel(LoadedModel):
    """A session of ONNX Runtime. `run` is thread-safe and releases the GIL."""

    def __init__(self, file: Path, options: LoadOptions) -> None:
        if options.device != "cpu":
            raise LoadError(f'device "{options.device}" is not supported by this build; use "cpu"')
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        # A spinning thread takes a core from the web side, and from the other models, to save microseconds.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(
                str(file), settings, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:  # the runtime raises a type of its own for every fault there is
            raise LoadError(f"ONNX Runtime cannot load {file.name}: {_first_line(error)}") from error
        self.signature = Signature(
            tuple(_spec(node) for node in self._session.get_inputs())
            + tuple(_spec(node, optional=True) for node in self._session.get_overridable_initializers()),
            tuple(_spec(node) for node in self._session.get_outputs()),
        )
        self._all_outputs = [spec.name for spec in self.signature.outputs]

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        """Run the session; raises what ONNX Runtime raises."""
        names = self._all_outputs if outputs is None else list(outputs)
        return dict(zip(names, self._session.run(names, inputs), strict=True))

    def close(self) -> None:
        """Drop the session, and with it its memory."""
        del self._session


def _spec(node: Any, *, optional: bool = False) -> TensorSpec:
    datatype = DATATYPES.get(node.type)
    if datatype is None:
        raise LoadError(f'"{node.name}" is a {node.type}, which cannot be served')
    shape = node.shape
    return TensorSpec(
        node.name,
        datatype,
        None if shape is None else tuple(size if isinstance(size, int) else ANY for size in shape),
        optional,
    )


def _first_line(error: Exception) -> str:
    """The runtime's own words, without its error numbers and source locations."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
