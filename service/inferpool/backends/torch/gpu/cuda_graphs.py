"""CUDA graphs of PyTorch: a run is recorded once for each shape and replayed as a whole afterwards.

A recorded run reads its inputs from, and writes its outputs to, the same addresses each time. Only one run in
a process may be recorded at a time. A thread that waits for the whole device breaks the recording.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

import torch

from inferpool.backends.cuda.capture_gate import DEVICE_GATE
from inferpool.backends.torch.model import WARM_RUNS, OutputTree
from inferpool.errors import Reason

_THREAD_LOCAL: Final = 1
"""The capture mode in cuda.h (`CUstreamCaptureMode`)."""

_BLOCKING: Final = frozenset(
    {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero",
     "aten::nonzero_numpy", "aten::argwhere", "aten::masked_select", "aten::bincount", "aten::unique_dim",
     "aten::unique_consecutive", "aten::_unique", "aten::_unique2", "prim::tolist"}
)  # fmt: skip
"""Operations for which the host needs a result of the device in the middle of a run."""


def record_obstacle(operations: Iterable[str]) -> Reason | None:
    """Why a run of these operations cannot be recorded; None if an attempt is worth it.

    PyTorch 2.13 keeps the memory of a failed recording until the process ends (pytorch/pytorch#190348), so an
    attempt that is known to fail is not made.
    """
    found = next((operation for operation in operations if operation in _BLOCKING), None)
    return None if found is None else f"{found} waits for the device in the middle of a run"


def allow_allocation() -> None:
    """Let this thread allocate while ONNX Runtime captures a graph on another thread."""
    mode = ctypes.c_int(_THREAD_LOCAL)
    ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


class Recording(Protocol):
    """A recorded run."""

    def replay(self) -> OutputTree:
        """Run again. The outputs have the same addresses as before."""

    def drop(self) -> None:
        """Free the memory of the recording."""


class Recorder(Protocol):
    """Records runs of one model."""

    def enter(self) -> None:
        """Prepare the calling thread to run the model while other threads record."""

    def record(self, run: Callable[[], OutputTree]) -> Recording:
        """Call `run` until it is warm, then record it; raises whatever prevents the recording."""


class CudaRecorder:
    """Records in the model's stream. All recordings of the model share memory.

    Sharing is safe: recordings never run at once, and the outputs of one are read before the next runs.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._pool: Any = None

    def enter(self) -> None:
        """Let the thread allocate while other threads capture."""
        allow_allocation()

    def record(self, run: Callable[[], OutputTree]) -> Recording:
        """Record in a mode that does not affect other threads."""
        with DEVICE_GATE.capture():
            for _ in range(WARM_RUNS):
                run()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    leaves = run()
            except BaseException:
                graph.reset()
                raise
        self._pool = graph.pool()
        return _CudaRecording(graph, leaves)


class _CudaRecording:
    def __init__(self, graph: Any, leaves: OutputTree) -> None:
        self._graph = graph
        self._leaves = leaves

    def replay(self) -> OutputTree:
        self._graph.replay()
        return self._leaves

    def drop(self) -> None:
        self._graph.reset()
        self._leaves = {}
