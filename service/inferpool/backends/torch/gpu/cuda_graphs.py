"""Runs of PyTorch on a GPU as CUDA graphs: recorded once for a shape, and launched as a whole from then on.

A recorded run reads its inputs and leaves its outputs at the same addresses each time. Only one may be
recorded at a time in a process, and whoever waits for the whole device meanwhile breaks it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

import torch

from inferpool.backends.cuda.memory import ALONE
from inferpool.backends.torch.model import WARM_RUNS, OutputTree

_THREAD_LOCAL: Final = 1
"""As cuda.h numbers the modes of captures (`CUstreamCaptureMode`)."""

_WAITING: Final = frozenset(
    {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero",
     "aten::nonzero_numpy", "aten::argwhere", "aten::masked_select", "aten::bincount", "aten::unique_dim",
     "aten::unique_consecutive", "aten::_unique", "aten::_unique2", "prim::tolist"}
)  # fmt: skip
"""Operations that need to know on the host what the device has computed."""


def waits(operations: Iterable[str]) -> str:
    """Why a run of these operations cannot be recorded; "" if that has to be tried.

    PyTorch 2.13 keeps the memory of a recording that failed until the process ends (pytorch/pytorch#190348):
    so what is known to fail is not tried.
    """
    found = next((operation for operation in operations if operation in _WAITING), None)
    return "" if found is None else f"{found} waits for the device in the middle of a run"


def operations(graph: Any) -> Iterable[str]:
    """The operations of a graph of TorchScript's runtime, and of the blocks in it."""
    for node in graph.nodes():
        yield node.kind()
        for block in node.blocks():
            yield from operations(block)


def spare_captures() -> None:
    """Let no capture of another thread, as ONNX Runtime makes them, forbid this one to allocate."""
    mode = ctypes.c_int(_THREAD_LOCAL)
    ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


class Recording(Protocol):
    """A run that can be repeated."""

    def replay(self) -> OutputTree:
        """Run it again; the outputs lie where they lay before."""

    def drop(self) -> None:
        """Give back its memory."""


class Recorder(Protocol):
    """Records the runs of one model."""

    def enter(self) -> None:
        """Make the calling thread fit to run the model while others record."""

    def record(self, run: Callable[[], OutputTree]) -> Recording:
        """Run it until it is warm, and once more to record it; raises whatever keeps it from that."""


class CudaRecorder:
    """Records in the stream that the model runs in, with memory that its recordings share.

    They may share it because they never run at the same time, and nothing is read of one after another ran.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._pool: Any = None

    def enter(self) -> None:
        """Let it allocate while others capture."""
        spare_captures()

    def record(self, run: Callable[[], OutputTree]) -> Recording:
        """Record it in a mode that leaves other threads alone."""
        with ALONE:
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
