"""A PyTorch model on a GPU, with its own stream and page-locked memory, so that instances overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from inferpool.backends.base import REPLAYED, DeviceModel, LoadOptions, Rejection
from inferpool.backends.cuda.capture_gate import DEVICE_GATE
from inferpool.backends.cuda.staging import stage
from inferpool.backends.torch.autograd import differentiate
from inferpool.backends.torch.gpu.cuda_graphs import (
    CudaRecorder,
    Recorder,
    Recording,
    allow_allocation,
    record_obstacle,
)
from inferpool.backends.torch.gpu.normaliser import TorchNormaliser
from inferpool.backends.torch.model import Runnable, StartedModel, to_array
from inferpool.backends.torch.run_errors import find_rejection
from inferpool.errors import LoadError, OutOfMemory, Reason, Verdict, short_reason
from inferpool.gradient_names import are_gradients
from inferpool.pixel_table import Normalisation, run_shapes
from inferpool.system.gpus import check_cuda, cuda_driver
from inferpool.tensors import Array, Signature, Tensors, TensorSpec, name_text

_KEPT_SHAPES: Final = 1024
"""Input shapes whose memory is kept. Texts have three inputs, some 32 lengths and nine batch sizes."""


def cuda_unavailable_reason() -> Reason | None:
    """Why the installed PyTorch cannot use a GPU; None if it was built for GPUs."""
    if torch.version.cuda is not None:
        return None
    return f"the installed torch {torch.__version__} is built for CPUs only"


def prepare_gpu(options: LoadOptions) -> None:
    """Prepare `options.device` for a model; raises LoadError, which says what is missing."""
    if reason := cuda_unavailable_reason():
        raise LoadError(reason)
    check_cuda(cuda_driver(), torch.version.cuda or "", f"torch {torch.__version__}")
    if options.gpu.tf32 or options.gpu.memory_bytes is not None:
        raise LoadError(
            "gpu.tf32 and gpu.memory_bytes are for ONNX models only: PyTorch sets them for all models at once"
        )
    # By default PyTorch rounds convolutions to TF32.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        raise LoadError(f"PyTorch cannot use {options.device}: {error}") from error
    allow_allocation()


class _InputBuffer(NamedTuple):
    """Memory for an input: a page-locked array, the same memory as a tensor, and a tensor on the device."""

    staged: Array
    host: Any
    device: Any


class TorchDeviceModel(DeviceModel):
    """A model with its weights on a device. All runs of a shape use the same input memory."""

    def __init__(
        self,
        started: StartedModel,
        device: str,
        recorder: Recorder | None = None,
        normalisation: Normalisation | None = None,
        rounding: str = "",
    ) -> None:
        """Args:
        started: the model and its outputs.
        device: `cuda:N`, or `cpu` (in tests), where everything happens without a stream.
        recorder: records runs; None means CUDA's recorder on a GPU, and no recorder on the CPU.
        normalisation: of the input that may also arrive as pixels.
        rounding: see `LoadedModel.rounding`.
        """
        runnable, outputs = started
        self.signature = Signature(runnable.inputs, tuple(outputs.values()))
        self.form = runnable.form
        self.max_rows = runnable.max_rows
        self.rounding = rounding
        self._runnable: Runnable | None = runnable
        self._paths = {spec.name: path for path, spec in outputs.items()}
        self._device = torch.device(device)
        self._stream: Any = None
        self._buffers: dict[tuple[object, ...], _InputBuffer] = {}
        self._pixels: dict[int, _InputBuffer] = {}
        self._normaliser: TorchNormaliser | None = None
        if normalisation is not None:
            datatype = self.signature.inputs_by_name[normalisation.input].datatype
            self._normaliser = TorchNormaliser(normalisation, datatype, self._device)
            self.takes_pixels = Verdict(True, "pixels are normalised on the GPU")
        self._recordings: dict[tuple[object, ...], tuple[dict[str, _InputBuffer], Recording]] = {}
        if self._device.type == "cuda":
            # Another stream copied the weights to the device.
            with DEVICE_GATE.work():
                torch.cuda.synchronize(self._device)
            self._stream = torch.cuda.Stream(self._device)
            recorder = recorder or CudaRecorder(self._stream)
        self._recorder = recorder
        obstacle = record_obstacle(runnable.operations)
        self.can_capture = recorder is not None and obstacle is None
        self.graphs = Verdict(False, obstacle or "none were asked for")

    def begin(self) -> None:
        """Let this thread run the model while other threads record."""
        if self._recorder is not None:
            self._recorder.enter()

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        """Run without padding; raises what PyTorch raises, and OutOfMemory."""
        return self._run([inputs], self._shapes([inputs], None), None, outputs)

    def run_padded(
        self, parts: Sequence[Tensors], rows: int, outputs: Sequence[str] | None = None
    ) -> Tensors:
        """Run all rows, padded to `rows`; raises what PyTorch raises, and OutOfMemory."""
        return self._run(parts, self._shapes(parts, rows), rows, outputs)

    def capture(self, parts: Sequence[Tensors], rows: int | None) -> Tensors:
        """Record the run of these shapes; raises whatever prevents the recording."""
        assert self._runnable is not None
        assert self._recorder is not None
        shapes = self._shapes(parts, rows)
        buffers = {name: self._buffer(name, shape) for name, shape in shapes.items()}
        with torch.inference_mode(), self._on_stream():
            self._fill(buffers, parts)
            feeds = {name: buffer.device for name, buffer in buffers.items()}
            recording = self._recorder.record(partial(self._runnable.forward, feeds))
        # The recording uses the addresses of these buffers, so they stay as long as it does.
        self._recordings[rows, *shapes.items()] = buffers, recording
        self.graphs = REPLAYED
        return self._run(parts, shapes, rows, None)

    def uncapture(self, reason: Reason) -> None:
        """Drop all recordings."""
        self.graphs = Verdict(False, reason)
        for _, recording in self._recordings.values():
            recording.drop()
        self._recordings.clear()
        self._trim()

    def rejection(self, error: Exception) -> Rejection | None:
        """The operation that has refused its inputs, and PyTorch's reason; None for another fault."""
        return find_rejection(error)

    def close(self) -> None:
        """Drop the module and return its memory to the driver."""
        if self._runnable is not None:
            self._runnable.release()
        self._runnable = None
        self._buffers.clear()
        self._pixels.clear()
        self._normaliser = None
        self.uncapture("the model is closed")

    def _run(
        self,
        parts: Sequence[Tensors],
        shapes: Mapping[str, tuple[int, ...]],
        rows: int | None,
        outputs: Sequence[str] | None,
    ) -> Tensors:
        assert self._runnable is not None  # no run follows the close
        try:
            with torch.inference_mode(), self._on_stream():
                wants_gradients = outputs is not None and are_gradients(outputs)
                recorded = None if wants_gradients else self._recordings.get((rows, *shapes.items()))
                if recorded is None:
                    buffers = {name: self._buffer(name, shape) for name, shape in shapes.items()}
                    used = self._fill(buffers, parts)
                    feeds = {name: buffer.device for name, buffer in buffers.items()}
                    with DEVICE_GATE.work():
                        if outputs is not None and wants_gradients:
                            found = differentiate(self._runnable.forward, feeds, outputs, self._paths)
                            return {
                                name: to_array(tensor if rows is None else tensor[:used])
                                for name, tensor in found.items()
                            }
                        leaves = self._runnable.forward(feeds)
                else:
                    used = self._fill(recorded[0], parts)
                    leaves = recorded[1].replay()
                arrays = {}
                for name in self._paths if outputs is None else outputs:
                    leaf = leaves.get(self._paths[name])
                    if leaf is None:
                        raise RuntimeError(f"the model returned no output {name_text(name)}")
                    arrays[name] = to_array((leaf if rows is None else leaf[:used]).to("cpu", copy=True))
        except torch.OutOfMemoryError as error:
            self._trim()
            raise OutOfMemory(str(error)) from error
        return arrays

    def lost(self) -> Reason | None:
        """Ask twice: the first answer may be the error of an earlier call, which a good context forgets."""
        fault: Reason | None = None
        if self._stream is not None:
            for _ in range(2):
                try:
                    torch.cuda.mem_get_info(self._device)
                    return None
                except RuntimeError as error:
                    fault = short_reason(error)
        return fault

    def _buffer(self, name: str, shape: tuple[int, ...]) -> _InputBuffer:
        key = (name, *shape)
        buffer = self._buffers.get(key)
        if buffer is None:
            if len(self._buffers) >= _KEPT_SHAPES:
                del self._buffers[next(iter(self._buffers))]
            buffer = self._buffers[key] = self._make_buffer(self.signature.inputs_by_name[name], shape)
        return buffer

    def _make_buffer(self, spec: TensorSpec, shape: tuple[int, ...]) -> _InputBuffer:
        dtype = torch.from_numpy(np.empty(0, spec.dtype)).dtype
        bits = torch.empty(shape, dtype=dtype, pin_memory=self._stream is not None)
        host = bits.view(torch.bfloat16) if spec.datatype == "BF16" else bits
        return _InputBuffer(bits.numpy(), host, torch.empty_like(host, device=self._device))

    def _shapes(self, parts: Sequence[Tensors], rows: int | None) -> dict[str, tuple[int, ...]]:
        return run_shapes(parts, rows, None if self._normaliser is None else self._normaliser.normalisation)

    def _fill(self, buffers: Mapping[str, _InputBuffer], parts: Sequence[Tensors]) -> int:
        """Queue the copies of all inputs to the device; returns the number of rows."""
        used, pixel_input, normaliser = 0, "", self._normaliser
        if normaliser is not None and normaliser.normalisation.is_among(parts[0]):
            pixel_input = normaliser.normalisation.input
        for name, buffer in buffers.items():
            tensors = [part[name] for part in parts]
            if normaliser is not None and name == pixel_input:
                used = self._normalise(normaliser, tensors, buffer)
            else:
                used = stage(buffer.staged, tensors)
                buffer.device.copy_(buffer.host, non_blocking=True)
        return used

    def _normalise(self, normaliser: TorchNormaliser, tensors: Sequence[Array], buffer: _InputBuffer) -> int:
        """Queue the copy of pixels to the device and their normalisation into `buffer`."""
        rows, used = len(buffer.staged), sum(map(len, tensors))
        pixels = self._pixels.get(rows)
        if pixels is None:
            spec = normaliser.normalisation.spec
            pixels = self._pixels[rows] = self._make_buffer(spec, (rows, *tensors[0].shape[1:]))
        stage(pixels.staged[:used], tensors)
        pixels.device[:used].copy_(pixels.host[:used], non_blocking=True)
        normaliser.run(pixels.device[:used], buffer.device)
        return used

    def _trim(self) -> None:
        """Return unused memory to the driver. This waits for the device, which would break a capture."""
        if self._stream is not None:
            with DEVICE_GATE.work():
                torch.cuda.empty_cache()

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
