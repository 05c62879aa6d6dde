"""Sessions of ONNX Runtime that run what TensorRT has made of a model: an engine, built once, kept in files.

Whoever opens such a session builds the engine where its folder has none, which takes minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import onnxruntime as ort

from inferpool.backends.base import Engine, LoadOptions
from inferpool.backends.cuda.memory import load_library
from inferpool.errors import LoadError
from inferpool.system.gpus import gpu_index
from inferpool.system.install_hints import install_command

TENSORRT: Final = "TensorrtExecutionProvider"

_LIBRARIES: Final = ("libnvinfer.so.10", "libnvonnxparser.so.10")
"""What the runtime's TensorRT part is linked to, besides CUDA (1.31.1; no other major version will do)."""


def lacks_tensorrt() -> str:
    """Why no engine can be run here; "" if it looks as if one could be."""
    if TENSORRT not in ort.get_available_providers():
        return f"the onnxruntime {ort.__version__} that is installed was built without TensorRT"
    try:
        for name in _LIBRARIES:
            load_library(name)
    except OSError as error:
        return f"TensorRT 10 is not installed ({error}): {install_command('gpu,tensorrt')}"
    return ""


def tensorrt_version() -> str:
    """TensorRT's version, for which alone an engine is good; it is installed."""
    library: Any = load_library(_LIBRARIES[0])
    return f"TensorRT {library.getInferLibVersion()}"


def tensorrt_options(options: LoadOptions, engine: Engine, stream: int, half: bool) -> dict[str, str]:
    """How the TensorRT part is to work (onnxruntime.ai, "TensorRT Execution Provider").

    `half` says that the model has FP16, which TensorRT takes only where it may round to that throughout.
    """
    chosen = {
        "device_id": str(gpu_index(options.device)),
        "user_compute_stream": str(stream),
        "trt_fp16_enable": str(half),
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(engine.folder),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(engine.folder),
    }
    if engine.shapes:
        least = _profile([(name, (1, *shape[1:])) for name, shape in engine.shapes])
        # It is quickest at the largest batch, which is what a queue that is full is worked off in.
        most = _profile(engine.shapes)
        chosen |= {
            "trt_profile_min_shapes": least,
            "trt_profile_opt_shapes": most,
            "trt_profile_max_shapes": most,
        }
    return chosen


def check_tensorrt(session: Any) -> None:
    """Raise LoadError unless TensorRT runs at least some of a session's nodes."""
    if TENSORRT not in session.get_providers():
        raise LoadError("ONNX Runtime could not start its TensorRT part")
    if not any(graph.ep_name == TENSORRT for graph in session.get_provider_graph_assignment_info()):
        raise LoadError("TensorRT takes none of its nodes")


def _profile(shapes: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes)
