"""Sessions of ONNX Runtime on an NVIDIA GPU. Every node runs there, or the session is refused.

By default, ONNX Runtime silently serves from the CPU when a library is missing, the driver is too old or a
node has no kernel; it reports that on stderr only. This module switches that fallback off and checks the
libraries beforehand. Afterwards it reads from the session on which device each node runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import onnxruntime as ort

from inferpool.backends.base import LoadOptions
from inferpool.backends.cuda.capture_gate import DEVICE_GATE
from inferpool.backends.cuda.memory import CudaMemory, load_library
from inferpool.backends.onnx.gpu.tensorrt import TENSORRT, check_tensorrt, tensorrt_options
from inferpool.backends.onnx.load_errors import readable_error
from inferpool.backends.onnx.model_file import graph_values
from inferpool.errors import LoadError, OutOfMemory, Reason, UnfitForGpu
from inferpool.system.gpus import check_cuda, cuda_driver, gpu_index
from inferpool.system.install_hints import install_command, uninstall_command

CUDA: Final = "CUDAExecutionProvider"

NO_GRAPH: Final = -1
"""The `gpu_graph_id` of a run without a graph."""

SHAPE_OPERATORS: Final = frozenset(
    {"Shape", "Size", "Gather", "Concat", "Slice", "Squeeze", "Unsqueeze", "Reshape", "Cast", "Identity",
     "Add", "Sub", "Mul", "Div", "Mod", "Neg", "Min", "Max", "Floor", "Ceil", "ReduceProd", "ReduceMax",
     "ReduceMin", "ReduceSum", "Range", "Equal", "Greater", "Less", "Not", "And", "Or", "Where",
     "ConstantOfShape", "Constant", "Expand", "ScatterND", "GatherND", "Split", "Transpose", "NonZero"}
)  # fmt: skip
"""The operators of arithmetic with shapes, which exporters write for dimensions of any size."""

_LIBRARIES: Final = (
    ("libcudart.so.{cuda}", "CUDA's runtime"),
    ("libcublasLt.so.{cuda}", "cuBLAS"),
    ("libcublas.so.{cuda}", "cuBLAS"),
    ("libcurand.so.10", "cuRAND"),
    ("libcudnn.so.9", "cuDNN 9"),
)
"""The libraries that the runtime's CUDA part is linked to or loads, each after the libraries it needs."""

_OPTIONAL: Final = ("libnvrtc.so.{cuda}", "libcufft.so.12")
"""The libraries that the CUDA part loads if a model needs them."""

_FATAL: Final = 4
"""The severity of fatal errors in ONNX Runtime's log (`ORT_LOGGING_LEVEL_FATAL`)."""

_FP16: Final = 10
"""FLOAT16 in onnx.proto (`TensorProto.DataType`)."""

_NO_MEMORY: Final = re.compile(
    r"out of memory|ALLOC_FAILED|Failed to allocate memory|smaller than requested bytes", re.IGNORECASE
)


def cuda_unavailable_reason() -> Reason | None:
    """Why the installed runtime cannot use a GPU; None if it was built for GPUs."""
    if CUDA in ort.get_available_providers():
        return None
    return (
        f"the installed onnxruntime {ort.__version__} is built for CPUs only:"
        f" run {uninstall_command('onnxruntime')}, then {install_command('gpu')}"
    )


def load_libraries(needed: str, load: Callable[[str], object] | None = None) -> None:
    """Load the libraries of CUDA `needed` (`13.0`), so that the runtime finds them.

    `load` opens a library by its name; None means `load_library`, which also searches NVIDIA's wheels. Raises
    LoadError for the first library that cannot be loaded.
    """
    load = load or load_library
    cuda = needed.partition(".")[0]
    for pattern, title in _LIBRARIES:
        try:
            load(pattern.format(cuda=cuda))
        except OSError as error:
            raise LoadError(
                f"{title} cannot be loaded ({error}); onnxruntime {ort.__version__} needs CUDA {cuda} and"
                f" cuDNN 9: run {install_command('gpu')}"
            ) from error
    for pattern in _OPTIONAL:
        with contextlib.suppress(OSError):
            load(pattern.format(cuda=cuda))


class GraphsRefused(LoadError):
    """The runtime opens no session that captures CUDA graphs of this model; `detail` says why."""


def open_memory(options: LoadOptions) -> CudaMemory:
    """Memory for a session on `options.device`, and the stream in which the session is to run.

    Raises LoadError if a library or the driver is missing, and OutOfMemory.
    """
    check_cuda(cuda_driver(), ort.cuda_version, f"onnxruntime {ort.__version__}")
    load_libraries(ort.cuda_version)
    return CudaMemory(gpu_index(options.device), int(ort.cuda_version.partition(".")[0]))


def open_session(
    file: Path, options: LoadOptions, settings: Any, stream: int, content: bytes = b""
) -> tuple[Any, Mapping[str, int]]:
    """A session on `options.device` that queues its work in `stream`, and its CPU nodes by kind.

    Args:
        file: an absolute path.
        options: the load options.
        settings: new session options, which this function changes.
        stream: the handle of a CUDA stream.
        content: the bytes of the model, if `file` does not exist.

    Raises:
        LoadError: a node would run on the CPU that must not, or the runtime refuses the model.
        GraphsRefused: the runtime refuses to capture graphs; without graphs the session may open.
        OutOfMemory: the GPU has too little memory for the model.
    """
    # cuDNN's front end reports every plan that it passes over as an error.
    # Errors that matter are raised as well.
    ort.set_default_logger_severity(_FATAL)
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if options.gpu.cpu_nodes == "none":
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = _session(file, options, settings, stream, content)
    except Exception as error:  # the runtime raises a type of its own for every fault there is
        if options.gpu.graphs and "graph capture feature" in str(error):
            raise GraphsRefused(_refusal(str(error))) from error
        if is_out_of_memory(error):
            raise OutOfMemory(f"{options.device} has no memory for the model: {error}") from error
        if "fallback to CPU EP has been explicitly disabled" not in str(error):
            raise LoadError(readable_error(file, str(error))) from error
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "0")
        session = _session(file, options.with_gpu(graphs=False), settings, stream, content)
    providers = session.get_providers()
    if CUDA not in providers:
        raise LoadError(
            f"ONNX Runtime could not start its CUDA part on {options.device}, only {', '.join(providers)};"
            f" it needs CUDA {ort.cuda_version} and cuDNN 9, and found {found_versions(ort.cuda_version)}"
        )
    on_cpu = cpu_nodes(session)
    check_nodes(on_cpu, options)
    if options.gpu.tensorrt is not None:
        check_tensorrt(session)
    return session, on_cpu


def _session(file: Path, options: LoadOptions, settings: Any, stream: int, content: bytes) -> Any:
    half = options.gpu.fp16 or (not content and _takes_fp16(file))
    providers = [(CUDA, provider_options(options, stream, half=half))]
    if options.gpu.tensorrt is not None:
        # Nodes that TensorRT does not take run on the next provider.
        providers.insert(0, (TENSORRT, tensorrt_options(options, options.gpu.tensorrt, stream, half)))
    with DEVICE_GATE.open():
        return ort.InferenceSession(content or str(file), settings, providers=providers, enable_fallback=0)


def _takes_fp16(file: Path) -> bool:
    """Whether the graph has an input or output in FP16; False for a file that the runtime will refuse."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return any(value.element == _FP16 for value in graph_values(file))
    return False


def _refusal(error: str) -> Reason:
    if "control flow" in error:
        return "the model has control flow (If, Loop or Scan)"
    if "have not been partitioned" in error:
        return "some of its nodes run on the CPU"
    return f"ONNX Runtime refused: {error}"


def provider_options(options: LoadOptions, stream: int, *, half: bool = False) -> dict[str, str]:
    """The options of the CUDA part (onnxruntime.ai, "CUDA Execution Provider").

    `half` says that the model computes in FP16.
    """
    chosen = {
        "device_id": str(gpu_index(options.device)),
        # By default the arena doubles, which may take the memory that another model needs.
        "arena_extend_strategy": "kSameAsRequested",
        # Trying all algorithms found no quicker ones on an H200, and "DEFAULT" takes 3 to 9 times as long.
        "cudnn_conv_algo_search": "HEURISTIC",
        # The tensor cores take channels last: 1.2 times the rows of ResNet-50 in FP16 and TF32 on an H200.
        # In FP32, which does not use them, it was 0.85 times.
        "prefer_nhwc": str(int(half or options.gpu.tf32)),
        "use_tf32": str(int(options.gpu.tf32)),
        # Copies are queued in the same stream, so that no thread waits between a copy and the run.
        "user_compute_stream": str(stream),
        "enable_cuda_graph": str(int(options.gpu.graphs)),
    }
    if options.gpu.memory_bytes is not None:
        chosen["gpu_mem_limit"] = str(options.gpu.memory_bytes)
    return chosen


def run_options(streamed: bool, graph: int = NO_GRAPH) -> Any:
    """Run options for graph number `graph`. A `streamed` run returns before the device has finished."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    options.add_run_config_entry("disable_synchronize_execution_providers", str(int(streamed)))
    return options


def cpu_nodes(session: Any) -> dict[str, int]:
    """The number of nodes of each kind that a session runs on the CPU."""
    return dict(
        Counter(
            node.op_type
            for graph in session.get_provider_graph_assignment_info()
            if graph.ep_name == "CPUExecutionProvider"
            for node in graph.get_nodes()
        )
    )


def check_nodes(nodes: Mapping[str, int], options: LoadOptions) -> None:
    """Raise UnfitForGpu if `options` do not allow all of `nodes`, the CPU nodes by kind, on the CPU."""
    if not nodes or options.gpu.cpu_nodes == "any":
        return
    others = nodes.keys() - SHAPE_OPERATORS
    if options.gpu.cpu_nodes == "shapes" and not others:
        return
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(nodes.items()))
    advice = 'gpu.cpu_nodes = "any" in model.toml allows that'
    if not others:
        advice = 'they may be arithmetic with shapes, which gpu.cpu_nodes = "shapes" in model.toml allows'
    raise UnfitForGpu(f"{sum(nodes.values())} nodes would run on the CPU: {listed}; {advice}")


def found_versions(needed: str) -> str:
    """The versions of CUDA's runtime and cuDNN that this process loads, as text for an error."""
    cuda = needed.partition(".")[0]
    found = []
    with contextlib.suppress(OSError, AttributeError):
        number = ctypes.c_int()
        ctypes.CDLL(f"libcudart.so.{cuda}").cudaRuntimeGetVersion(ctypes.byref(number))
        found.append(f"CUDA {number.value // 1000}.{number.value % 1000 // 10}")
    with contextlib.suppress(OSError, AttributeError):
        version = ctypes.CDLL("libcudnn.so.9").cudnnGetVersion
        version.restype = ctypes.c_size_t
        found.append("cuDNN {}.{}.{}".format(*_cudnn(version())))
    return " and ".join(found) or "neither"


def is_out_of_memory(error: Exception) -> bool:
    """Whether `error`, raised by the runtime, says that the GPU has no memory left."""
    return bool(_NO_MEMORY.search(str(error)))


def _cudnn(version: int) -> tuple[int, int, int]:
    """The parts of a version number: cuDNN writes 9.10.2 as 91002."""
    return version // 10000, version % 10000 // 100, version % 100
