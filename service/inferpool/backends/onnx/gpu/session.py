"""Sessions of ONNX Runtime on an NVIDIA GPU, where every node runs there or the session is refused.

Asked for CUDA, the runtime of its own accord serves from the CPU where a library is missing, the driver is
too old or a node has no kernel, and says so on stderr alone. So that is switched off, what it needs is
looked at before, and where its nodes are is read from it afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import onnxruntime as ort

from inferpool.backends.base import LoadOptions
from inferpool.backends.cuda.memory import ALONE, CudaMemory, load_library
from inferpool.backends.onnx.gpu.tensorrt import TENSORRT, check_tensorrt, tensorrt_options
from inferpool.backends.onnx.load_errors import reason
from inferpool.backends.onnx.model_file import graph_values
from inferpool.errors import LoadError, OutOfMemory, UnfitForGpu
from inferpool.system.gpus import check_cuda, cuda_driver, gpu_index
from inferpool.system.install_hints import install_command, uninstall_command

CUDA: Final = "CUDAExecutionProvider"

NO_GRAPH: Final = -1
"""The `gpu_graph_id` of a run that is neither captured nor replayed."""

SHAPE_OPERATORS: Final = frozenset(
    {"Shape", "Size", "Gather", "Concat", "Slice", "Squeeze", "Unsqueeze", "Reshape", "Cast", "Identity",
     "Add", "Sub", "Mul", "Div", "Mod", "Neg", "Min", "Max", "Floor", "Ceil", "ReduceProd", "ReduceMax",
     "ReduceMin", "ReduceSum", "Range", "Equal", "Greater", "Less", "Not", "And", "Or", "Where",
     "ConstantOfShape", "Constant", "Expand", "ScatterND", "GatherND", "Split", "Transpose", "NonZero"}
)  # fmt: skip
"""What arithmetic with shapes is made of; exporters write it for dimensions that vary."""

_LIBRARIES: Final = (
    ("libcudart.so.{cuda}", "CUDA's runtime"),
    ("libcublasLt.so.{cuda}", "cuBLAS"),
    ("libcublas.so.{cuda}", "cuBLAS"),
    ("libcurand.so.10", "cuRAND"),
    ("libcudnn.so.9", "cuDNN 9"),
)
"""What the runtime's CUDA part is linked to, or loads itself; in the order in which they need each other."""

_OPTIONAL: Final = ("libnvrtc.so.{cuda}", "libcufft.so.12")
"""What it loads itself where a model needs it."""

_FP16: Final = 10
"""FLOAT16 in onnx.proto (`TensorProto.DataType`)."""

_NO_MEMORY: Final = re.compile(
    r"out of memory|ALLOC_FAILED|Failed to allocate memory|smaller than requested bytes", re.IGNORECASE
)


def lacks_cuda() -> str:
    """Why the runtime that is installed cannot use a GPU; "" if it was built for that."""
    if CUDA in ort.get_available_providers():
        return ""
    return (
        f"the onnxruntime {ort.__version__} that is installed is the one for CPUs:"
        f" {uninstall_command('onnxruntime')}, then {install_command('gpu')}"
    )


def load_libraries(needed: str, load: Callable[[str], object] | None = None) -> None:
    """Load what CUDA `needed` (`13.0`) consists of, so that the runtime finds it; `load` opens a library.

    Those of NVIDIA's wheels are found wherever they are installed. Raises LoadError for the first that is
    not to be had.
    """
    load = load or load_library
    cuda = needed.partition(".")[0]
    for pattern, what in _LIBRARIES:
        try:
            load(pattern.format(cuda=cuda))
        except OSError as error:
            raise LoadError(
                f"{what} cannot be loaded ({error}); onnxruntime {ort.__version__} needs CUDA {cuda} and"
                f" cuDNN 9: {install_command('gpu')}"
            ) from error
    for pattern in _OPTIONAL:
        with contextlib.suppress(OSError):
            load(pattern.format(cuda=cuda))


class Uncapturable(LoadError):
    """The runtime opens no session that could capture graphs of this model; the detail says why."""


def open_memory(options: LoadOptions) -> CudaMemory:
    """Memory for a session on `options.device`, and the stream that it is to run in.

    Raises LoadError where a library or a driver is missing; OutOfMemory.
    """
    check_cuda(cuda_driver(), ort.cuda_version, f"onnxruntime {ort.__version__}")
    load_libraries(ort.cuda_version)
    return CudaMemory(gpu_index(options.device), int(ort.cuda_version.partition(".")[0]))


def open_session(
    file: Path, options: LoadOptions, settings: Any, stream: int, content: bytes = b""
) -> tuple[Any, Mapping[str, int]]:
    """A session on `options.device`, which queues its work in `stream`; and its nodes on the CPU, by kind.

    `content` is what would be in `file`, an absolute path, where there is no such file.

    Raises LoadError where nodes would run on the CPU that must not; Uncapturable where that is all that is
    wrong; OutOfMemory where the GPU has no room for the model.
    """
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if options.cpu_nodes == "none":
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = _session(file, options, settings, stream, content)
    except Exception as error:  # the runtime raises a type of its own for every fault there is
        if options.graphs and "graph capture feature" in str(error):
            raise Uncapturable(_uncapturable(str(error))) from error
        if is_out_of_memory(error):
            raise OutOfMemory(f"{options.device} has no memory for the model: {error}") from error
        if "fallback to CPU EP has been explicitly disabled" not in str(error):
            raise LoadError(reason(file, str(error))) from error
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "0")
        session = _session(file, replace(options, graphs=False), settings, stream, content)
    providers = session.get_providers()
    if CUDA not in providers:
        raise LoadError(
            f"ONNX Runtime could not start its CUDA part on {options.device}, only {', '.join(providers)};"
            f" it needs CUDA {ort.cuda_version} and cuDNN 9, and found {found_versions(ort.cuda_version)}"
        )
    left = cpu_nodes(session)
    check_nodes(left, options)
    if options.engine is not None:
        check_tensorrt(session)
    return session, left


def _session(file: Path, options: LoadOptions, settings: Any, stream: int, content: bytes) -> Any:
    providers = [(CUDA, provider_options(options, stream))]
    if options.engine is not None:
        # What TensorRT does not take falls to the next.
        half = options.fp16 or any(value.element == _FP16 for value in graph_values(file))
        providers.insert(0, (TENSORRT, tensorrt_options(options, options.engine, stream, half)))
    with ALONE:
        return ort.InferenceSession(content or str(file), settings, providers=providers, enable_fallback=0)


def _uncapturable(error: str) -> str:
    if "control flow" in error:
        return "it has control flow (If, Loop or Scan)"
    if "have not been partitioned" in error:
        return "some of its nodes run on the CPU"
    return f"ONNX Runtime refused: {error}"


def provider_options(options: LoadOptions, stream: int) -> dict[str, str]:
    """How the CUDA part is to work (onnxruntime.ai, "CUDA Execution Provider")."""
    chosen = {
        "device_id": str(gpu_index(options.device)),
        # Twice what was there, as it grows by default, may be all that another model would have needed.
        "arena_extend_strategy": "kSameAsRequested",
        # To try all algorithms takes seconds for every new shape, and those it would find are no quicker.
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": str(int(options.tf32)),
        # Copies are queued in the same, so that nobody need wait between them and the run.
        "user_compute_stream": str(stream),
        "enable_cuda_graph": str(int(options.graphs)),
    }
    if options.memory_bytes is not None:
        chosen["gpu_mem_limit"] = str(options.memory_bytes)
    return chosen


def run_options(streamed: bool, graph: int = NO_GRAPH) -> Any:
    """Options of runs as graph number `graph`; a `streamed` one returns before the device is done."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    options.add_run_config_entry("disable_synchronize_execution_providers", str(int(streamed)))
    return options


def cpu_nodes(session: Any) -> dict[str, int]:
    """How many nodes of each kind a session runs on the CPU."""
    return dict(
        Counter(
            node.op_type
            for graph in session.get_provider_graph_assignment_info()
            if graph.ep_name == "CPUExecutionProvider"
            for node in graph.get_nodes()
        )
    )


def check_nodes(left: Mapping[str, int], options: LoadOptions) -> None:
    """Raise UnfitForGpu where nodes are `left` on the CPU that `options` do not allow there."""
    if not left or options.cpu_nodes == "any":
        return
    others = left.keys() - SHAPE_OPERATORS
    if options.cpu_nodes == "shapes" and not others:
        return
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(left.items()))
    advice = 'gpu.cpu_nodes = "any" in model.toml allows that'
    if not others:
        advice = 'they may be arithmetic with shapes, which gpu.cpu_nodes = "shapes" in model.toml allows'
    raise UnfitForGpu(f"{sum(left.values())} nodes would run on the CPU: {listed}; {advice}")


def found_versions(needed: str) -> str:
    """The versions of CUDA's runtime and cuDNN that this process loads, for people."""
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
    """Whether the runtime means by `error` that the GPU has no memory left."""
    return bool(_NO_MEMORY.search(str(error)))


def _cudnn(version: int) -> tuple[int, int, int]:
    """9.10.2 is written 91002."""
    return version // 10000, version % 10000 // 100, version % 100
