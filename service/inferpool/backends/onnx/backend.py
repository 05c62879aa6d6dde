"""The backend for ONNX Runtime. Nothing outside this folder imports onnxruntime.

Every datatype of the protocol can be an input or output; BF16 travels as its bits. An output that is no
tensor becomes lists and mappings (`JSON` in the signature). An input must be a tensor.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from inferpool.backends.base import Backend, LoadedModel, LoadOptions
from inferpool.backends.onnx.load_errors import check_file, readable_error
from inferpool.backends.onnx.model import BrainFloatModel, OnnxModel, open_cpu_session, runtime_version
from inferpool.backends.onnx.model_file import graph_operations
from inferpool.backends.onnx.run_errors import fragile_operation
from inferpool.backends.onnx.signature import read_signature
from inferpool.backends.row_verdict import Independence, RowVerdict
from inferpool.errors import LoadError, Reason, short_reason
from inferpool.system.gpus import CPU, gpu_support


class OnnxBackend(Backend):
    """Loads `.onnx` files by path. External data may lie in the file's folder and below, nowhere else.

    ONNX Runtime refuses external data elsewhere, however it is named, since 1.27. If the file is a symbolic
    link, its data may also be linked to the folder that contains the link's target.
    """

    name = "onnx"
    suffixes = (".onnx",)
    loads_at_once = True
    starts_threads_first = True

    def load(self, file: Path, options: LoadOptions) -> LoadedModel:
        """Load `file` on `options.device`; raises LoadError, or OutOfMemory on a GPU."""
        if options.device == CPU and not options.gpu.fp16:
            return load_on_cpu(file.absolute(), options)
        with gpu_support():
            from inferpool.backends.onnx.gpu import loading
        return loading.load(file.absolute(), options, partial(load_on_cpu, options=options))

    def read_rows(self, file: Path, options: LoadOptions) -> RowVerdict:
        """Analyse the graph of `file`, without its weights."""
        # The package takes a while to import, and is not needed if a plan was kept.
        from inferpool.backends.onnx.row_analysis.analysis import analyse_file

        try:
            return analyse_file(file)
        except Exception as error:  # noqa: BLE001 - a file that onnx cannot read is checked by runs alone
            return RowVerdict(Independence.UNKNOWN, f"the graph cannot be read: {short_reason(error)}")

    def gpu_unavailable_reason(self, file: Path) -> Reason | None:
        """Why not, if the installed runtime is built for CPUs only."""
        try:
            with gpu_support():
                from inferpool.backends.onnx.gpu import session
        except LoadError as error:
            return error.detail
        return session.cuda_unavailable_reason()

    def tensorrt_unavailable_reason(self) -> Reason | None:
        """Why not, if the runtime was built without TensorRT or TensorRT is not installed."""
        try:
            with gpu_support():
                from inferpool.backends.onnx.gpu import tensorrt
        except LoadError as error:
            return error.detail
        return tensorrt.tensorrt_unavailable_reason()

    def tensorrt_version(self) -> str:
        """The versions of the runtime and of TensorRT."""
        with gpu_support():
            from inferpool.backends.onnx.gpu import tensorrt
        return f"{self.describe()} {tensorrt.tensorrt_version()}"

    def describe(self) -> str:
        """The runtime's version."""
        return f"onnxruntime {runtime_version()}"


def load_on_cpu(file: Path, options: LoadOptions) -> LoadedModel:
    """Load `file`, an absolute path, on the CPU; raises LoadError."""
    check_file(file)
    try:
        session = open_cpu_session(file, options)
    except Exception as error:  # the runtime raises a type of its own for every fault there is
        raise LoadError(readable_error(file, str(error))) from error
    signature = read_signature(file, session)
    fragile = fragile_operation(graph_operations(file))
    if any(spec.datatype == "BF16" for spec in (*signature.inputs, *signature.outputs)):
        return BrainFloatModel(session, signature, fragile)
    return OnnxModel(session, signature, fragile)
