"""ONNX Runtime. Nothing else in the project imports onnxruntime.

Every datatype that the protocol can name goes in and out, BF16 as its bits. What is no tensor comes out as
Python's lists and mappings (`JSON` in the signature), and cannot go in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

# Since 1.29 the runtime would keep a device id and a queue of events on disk, and send them.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from inferpool.errors import LoadError, OutOfMemory, UnfitForGpu
from inferpool.system.install_hints import install_command

try:
    import onnxruntime as ort
except ImportError as error:
    raise LoadError(
        f"ONNX Runtime is not installed: {install_command('cpu')}, or 'inferpool[gpu]' on a machine"
        " with an NVIDIA driver (never both: they overwrite each other)"
    ) from error

from inferpool.backends.base import Backend, LoadedModel, LoadOptions
from inferpool.backends.onnx.gpu.bound_model import BoundModel, bindable
from inferpool.backends.onnx.gpu.fp16 import in_half
from inferpool.backends.onnx.gpu.normaliser import open_normaliser
from inferpool.backends.onnx.gpu.session import Uncapturable, lacks_cuda, open_memory, open_session
from inferpool.backends.onnx.gpu.tensorrt import lacks_tensorrt, tensorrt_version
from inferpool.backends.onnx.load_errors import check_file, reason
from inferpool.backends.onnx.signature import read_signature
from inferpool.tensors import JSON, Array, Signature, Tensors, names_text

_BFLOAT16: Final = 16
"""BFLOAT16 in onnx.proto (`TensorProto.DataType`)."""


class OnnxBackend(Backend):
    """Loads `.onnx` files, by path: external data may lie in the file's folder and below, nowhere else.

    ONNX Runtime refuses it elsewhere, since 1.27 whichever way it is named. Where the file is a link, its
    data may be linked to the folder that it leads to.
    """

    name = "onnx"
    suffixes = (".onnx",)

    def load(self, file: Path, options: LoadOptions) -> LoadedModel:
        """Load `file` on `options.device`; raises LoadError, or OutOfMemory on a GPU."""
        if not options.fp16:
            return _load(lambda: nullcontext(file.absolute()), options)
        try:
            return _load(partial(in_half, file.absolute(), options.kept), options)
        except UnfitForGpu as error:
            raise UnfitForGpu(f"{error.detail}; with gpu.fp16 = false there may be fewer") from error

    def gpu_unavailable_reason(self, file: Path) -> str:
        """Why not, where the runtime that is installed is the one for CPUs."""
        return lacks_cuda()

    def lacks_engines(self) -> str:
        """Why not, where the runtime or TensorRT lacks."""
        return lacks_tensorrt()

    def engine_version(self) -> str:
        """The runtime's version, and TensorRT's."""
        return f"{self.describe()} {tensorrt_version()}"

    def describe(self) -> str:
        """The runtime's version."""
        return f"onnxruntime {ort.__version__}"


class OnnxModel(LoadedModel):
    """A session of ONNX Runtime. `run` is thread-safe and releases the GIL.

    The runtime's inference builds compute the whole graph whichever outputs are asked for; the others are
    thrown away within it.
    """

    def __init__(self, session: Any, signature: Signature) -> None:
        self.signature = signature
        self._session = session
        self._all_outputs = list(signature.outputs_by_name)

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        """Run the session; raises what ONNX Runtime raises."""
        names = self._all_outputs if outputs is None else list(outputs)
        return dict(zip(names, self._session.run(names, inputs), strict=True))

    def close(self) -> None:
        """Drop the session, and with it its memory."""
        del self._session


class BrainFloatModel(OnnxModel):
    """A session with BF16 among its inputs or outputs, for which the runtime's `run` has no arrays.

    Such inputs are handed over as values that wrap their bits; such outputs are read where they lie.
    """

    def __init__(self, session: Any, signature: Signature) -> None:
        """Raises LoadError where BF16 comes out of a session with tensors that cannot be bound beside it."""
        super().__init__(session, signature)
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
        """Run the session; raises what ONNX Runtime raises."""
        names = self._all_outputs if outputs is None else list(outputs)
        feeds = {
            name: _from_bits(tensor) if name in self._bf16_inputs else tensor
            for name, tensor in inputs.items()
        }
        if self._bf16_outputs.isdisjoint(names):
            return dict(zip(names, self._session.run(names, feeds), strict=True))
        binding = self._session.io_binding()
        for name, feed in feeds.items():
            value = ort.OrtValue.ortvalue_from_numpy(feed) if isinstance(feed, np.ndarray) else feed
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        return {
            name: _to_bits(value) if name in self._bf16_outputs else value.numpy()
            for name, value in zip(names, binding.get_outputs(), strict=True)
        }


class _Bits:
    """The memory of a BF16 value in the form that numpy takes arrays from; it keeps the value alive."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(value.shape()),
            "typestr": np.dtype(np.uint16).str,
            "data": (value.data_ptr(), False),
        }


def _from_bits(bits: Array) -> Any:
    # The runtime reads the elements from the first one's address on, whatever the strides are.
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.asarray(bits, order="C"), _BFLOAT16)


def _to_bits(value: Any) -> Array:
    return np.asarray(_Bits(value))


_Opened: TypeAlias = Callable[[], AbstractContextManager[Path]]
"""Gives the file to load, which is there for as long as the context lasts."""


def _load(opened: _Opened, options: LoadOptions) -> LoadedModel:
    if options.device != "cpu":
        return _on_gpu(opened, options)
    with opened() as file:
        session = _open(file, options)
        signature = read_signature(file, session)
    if any(spec.datatype == "BF16" for spec in (*signature.inputs, *signature.outputs)):
        return BrainFloatModel(session, signature)
    return OnnxModel(session, signature)


def _on_gpu(opened: _Opened, options: LoadOptions) -> LoadedModel:
    if options.engine is not None and (lacks := lacks_tensorrt()):
        raise LoadError(lacks)
    memory = open_memory(options)
    plainly = replace(options, graphs=False)

    def plain() -> Any:
        with opened() as file:
            return open_session(file, plainly, _settings(plainly), memory.stream)[0]

    try:
        refused = ""
        with opened() as file:
            check_file(file)
            try:
                session, left = open_session(file, options, _settings(options), memory.stream)
            except Uncapturable as error:
                refused = error.detail
                session, left = open_session(file, plainly, _settings(plainly), memory.stream)
            signature = read_signature(file, session)
        if not bindable(signature):
            raise UnfitForGpu(
                'a GPU takes tensors of numbers only; instances.devices = ["cpu"] is for others'
            )
    except BaseException:
        memory.close()
        raise
    model = BoundModel(session, signature, options.device, memory, left, streamed=True)
    if refused:
        model.graphs, model.capturable = refused, False
    elif options.graphs:
        model.plain = plain
    if options.normalise is not None:
        try:
            model.normaliser = open_normaliser(options.normalise, options, _settings(plainly), memory)
            model.normalises = True
        except (LoadError, OutOfMemory) as error:
            model.normalises = error.detail
    return model


def _open(file: Path, options: LoadOptions) -> Any:
    check_file(file)
    try:
        return ort.InferenceSession(
            str(file), _settings(options), providers=["CPUExecutionProvider"], enable_fallback=0
        )
    except Exception as error:  # the runtime raises a type of its own for every fault there is
        raise LoadError(reason(file, str(error))) from error


def _settings(options: LoadOptions) -> Any:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    # Whatever is worth a line is raised too; the runtime would write it to stderr itself, in its own form.
    settings.log_severity_level = 4
    # A spinning thread takes a core from the web side, and from the other models, to save microseconds.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return settings
