"""Sessions of ONNX Runtime that run a TensorRT plan, which is built once and kept in files.

*Experimental: TensorRT has not yet run on a GPU.*

Opening such a session builds the plan if its folder is empty. That takes minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import onnxruntime as ort

from inferpool.backends.base import LoadOptions, TensorRTPlan
from inferpool.backends.cuda.memory import load_library
from inferpool.errors import LoadError, Reason
from inferpool.system.gpus import gpu_index
from inferpool.system.install_hints import install_command

TENSORRT: Final = "TensorrtExecutionProvider"

_LIBRARIES: Final = ("libnvinfer.so.10", "libnvonnxparser.so.10")
"""The libraries that the TensorRT part of runtime 1.31.1 is linked to; other major versions do not work."""


def tensorrt_unavailable_reason() -> Reason | None:
    """Why no plan can run here; None if the runtime and the libraries support TensorRT."""
    if TENSORRT not in ort.get_available_providers():
        return f"the installed onnxruntime {ort.__version__} was built without TensorRT"
    try:
        for name in _LIBRARIES:
            load_library(name)
    except OSError as error:
        return f"TensorRT 10 is not installed ({error}): run {install_command('gpu,tensorrt')}"
    return None


def tensorrt_version() -> str:
    """The version of the installed TensorRT. A plan works with that version only."""
    library: Any = load_library(_LIBRARIES[0])
    return f"TensorRT {library.getInferLibVersion()}"


def tensorrt_options(options: LoadOptions, plan: TensorRTPlan, stream: int, half: bool) -> dict[str, str]:
    """The options of the TensorRT part (onnxruntime.ai, "TensorRT Execution Provider").

    `half` says that the model has FP16 tensors. TensorRT takes them only if it may round to FP16 throughout.
    """
    chosen = {
        "device_id": str(gpu_index(options.device)),
        "user_compute_stream": str(stream),
        "trt_fp16_enable": str(half),
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(plan.folder),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(plan.folder),
    }
    if plan.shapes:
        least = _shapes_text([(name, (1, *shape[1:])) for name, shape in plan.shapes])
        # Optimise for the largest batch: a full queue is served in batches of that size.
        most = _shapes_text(plan.shapes)
        chosen |= {
            "trt_profile_min_shapes": least,
            "trt_profile_opt_shapes": most,
            "trt_profile_max_shapes": most,
        }
    return chosen


def check_tensorrt(session: Any) -> None:
    """Raise LoadError unless TensorRT runs some of a session's nodes."""
    if TENSORRT not in session.get_providers():
        raise LoadError("ONNX Runtime could not start its TensorRT part")
    if not any(graph.ep_name == TENSORRT for graph in session.get_provider_graph_assignment_info()):
        raise LoadError("TensorRT takes none of the model's nodes")


def _shapes_text(shapes: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes)
