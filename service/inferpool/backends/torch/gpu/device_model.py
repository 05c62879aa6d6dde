"""A model of PyTorch on a GPU: a stream and page-locked memory of its own, so that instances overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from inferpool.backends.base import DeviceModel, LoadOptions
from inferpool.backends.cuda.memory import ALONE
from inferpool.backends.cuda.staging import stage
from inferpool.backends.torch.gpu.cuda_graphs import CudaRecorder, Recorder, Recording, spare_captures
from inferpool.backends.torch.gpu.normaliser import TorchNormaliser
from inferpool.backends.torch.model import Runnable, to_array
from inferpool.backends.torch.signature import Place
from inferpool.errors import LoadError, OutOfMemory
from inferpool.pixel_table import Normalisation, run_shapes
from inferpool.system.gpus import check_cuda, cuda_driver
from inferpool.tensors import Array, Signature, Tensors, TensorSpec, name_text

_KEPT_SHAPES: Final = 1024
"""Shapes of inputs whose memory is kept; texts have three inputs, some 32 lengths and nine batch sizes."""


def lacks_cuda() -> str:
    """Why the PyTorch that is installed cannot use a GPU; "" if it was built for that."""
    if torch.version.cuda is not None:
        return ""
    return f"the torch {torch.__version__} that is installed is the one for CPUs"


def prepare_gpu(options: LoadOptions) -> None:
    """Make `options.device` ready for a model; raises LoadError, which says what is missing."""
    if lacks := lacks_cuda():
        raise LoadError(lacks)
    check_cuda(cuda_driver(), torch.version.cuda or "", f"torch {torch.__version__}")
    if options.tf32 or options.memory_bytes is not None:
        raise LoadError("gpu.tf32 and gpu.memory_bytes are for ONNX models: PyTorch has them for all or none")
    # Rounding as TF32 is on for convolutions unless it is turned off.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        raise LoadError(f"PyTorch cannot use {options.device}: {error}") from error
    spare_captures()


class _Room(NamedTuple):
    """Memory for an input: page-locked, as an array and as a tensor, and a tensor on the device."""

    staged: Array
    host: Any
    device: Any


class TorchDeviceModel(DeviceModel):
    """A model whose weights are on a device, run from and to memory that is used again for every run."""

    def __init__(
        self,
        runnable: Runnable,
        outputs: Mapping[Place, TensorSpec],
        device: str,
        recorder: Recorder | None = None,
        normalisation: Normalisation | None = None,
    ) -> None:
        """`outputs` are all that the model gives, by where they stand in what it returns.

        `device` is `cuda:N`, or `cpu`, where the same happens without a stream. `recorder` is what records
        runs there; None is that of CUDA on a GPU, and none elsewhere. `normalisation` is of an input that
        may come as pixels too.
        """
        self.signature = Signature(runnable.inputs, tuple(outputs.values()))
        self.form = runnable.form
        self.max_rows = runnable.max_rows
        self._runnable: Runnable | None = runnable
        self._places = {spec.name: place for place, spec in outputs.items()}
        self._device = torch.device(device)
        self._stream: Any = None
        self._rooms: dict[tuple[object, ...], _Room] = {}
        self._pixels: dict[int, _Room] = {}
        self._normaliser: TorchNormaliser | None = None
        if normalisation is not None:
            datatype = self.signature.inputs_by_name[normalisation.input].datatype
            self._normaliser = TorchNormaliser(normalisation, datatype, self._device)
            self.normalises = True
        self._recordings: dict[tuple[object, ...], tuple[dict[str, _Room], Recording]] = {}
        if self._device.type == "cuda":
            # The weights have been copied there by another stream.
            with ALONE:
                torch.cuda.synchronize(self._device)
            self._stream = torch.cuda.Stream(self._device)
            recorder = recorder or CudaRecorder(self._stream)
        self._recorder = recorder
        self.capturable = recorder is not None and not runnable.waits
        self.graphs = runnable.waits or "none were asked for"

    def begin(self) -> None:
        """Let this thread run beside others that capture."""
        if self._recorder is not None:
            self._recorder.enter()
        super().begin()

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        """Run as it is; raises what PyTorch raises, and OutOfMemory."""
        return self._run([inputs], self._shapes([inputs], None), None, outputs)

    def run_padded(
        self, parts: Sequence[Tensors], rows: int, outputs: Sequence[str] | None = None
    ) -> Tensors:
        """Run the rows of all parts among `rows`; raises what PyTorch raises, and OutOfMemory."""
        return self._run(parts, self._shapes(parts, rows), rows, outputs)

    def capture(self, parts: Sequence[Tensors], rows: int | None) -> Tensors:
        """Record the run of these shapes; raises whatever keeps it from that."""
        assert self._runnable is not None
        assert self._recorder is not None
        shapes = self._shapes(parts, rows)
        rooms = {name: self._room(name, shape) for name, shape in shapes.items()}
        with torch.inference_mode(), self._on_stream():
            self._fill(rooms, parts)
            feeds = {name: room.device for name, room in rooms.items()}
            recording = self._recorder.record(partial(self._runnable.forward, feeds))
        # It has the addresses of these rooms for as long as it is there.
        self._recordings[rows, *shapes.items()] = rooms, recording
        self.graphs = True
        return self._run(parts, shapes, rows, None)

    def uncapture(self, reason: str) -> None:
        """Drop what was recorded."""
        self.graphs = reason
        for _, recording in self._recordings.values():
            recording.drop()
        self._recordings.clear()
        self._trim()

    def close(self) -> None:
        """Drop the module, and give its memory back to the driver."""
        if self._runnable is not None:
            self._runnable.release()
        self._runnable = None
        self._rooms.clear()
        self._pixels.clear()
        self._normaliser = None
        self.uncapture("it is closed")

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
                recorded = self._recordings.get((rows, *shapes.items()))
                if recorded is None:
                    rooms = {name: self._room(name, shape) for name, shape in shapes.items()}
                    used = self._fill(rooms, parts)
                    leaves = self._runnable.forward({name: room.device for name, room in rooms.items()})
                else:
                    used = self._fill(recorded[0], parts)
                    leaves = recorded[1].replay()
                answer = {}
                for name in self._places if outputs is None else outputs:
                    leaf = leaves.get(self._places[name])
                    if leaf is None:
                        raise RuntimeError(f"the model gave no output {name_text(name)}")
                    answer[name] = to_array((leaf if rows is None else leaf[:used]).to("cpu", copy=True))
        except torch.OutOfMemoryError as error:
            self._trim()
            raise OutOfMemory(str(error)) from error
        return answer

    def _room(self, name: str, shape: tuple[int, ...]) -> _Room:
        key = (name, *shape)
        room = self._rooms.get(key)
        if room is None:
            if len(self._rooms) >= _KEPT_SHAPES:
                del self._rooms[next(iter(self._rooms))]
            room = self._rooms[key] = self._make_room(self.signature.inputs_by_name[name], shape)
        return room

    def _make_room(self, spec: TensorSpec, shape: tuple[int, ...]) -> _Room:
        dtype = torch.from_numpy(np.empty(0, spec.dtype)).dtype
        bits = torch.empty(shape, dtype=dtype, pin_memory=self._stream is not None)
        host = bits.view(torch.bfloat16) if spec.datatype == "BF16" else bits
        return _Room(bits.numpy(), host, torch.empty_like(host, device=self._device))

    def _shapes(self, parts: Sequence[Tensors], rows: int | None) -> dict[str, tuple[int, ...]]:
        return run_shapes(parts, rows, None if self._normaliser is None else self._normaliser.normalisation)

    def _fill(self, rooms: Mapping[str, _Room], parts: Sequence[Tensors]) -> int:
        """Queue what brings all inputs to the device; returns the number of rows."""
        used, pixels, normaliser = 0, "", self._normaliser
        if normaliser is not None and normaliser.normalisation.is_among(parts[0]):
            pixels = normaliser.normalisation.input
        for name, room in rooms.items():
            tensors = [part[name] for part in parts]
            if normaliser is not None and name == pixels:
                used = self._normalise(normaliser, tensors, room)
            else:
                used = stage(room.staged, tensors)
                room.device.copy_(room.host, non_blocking=True)
        return used

    def _normalise(self, normaliser: TorchNormaliser, tensors: Sequence[Array], room: _Room) -> int:
        """Queue what brings pixels to the device and makes of them what the model takes."""
        rows, used = len(room.staged), sum(map(len, tensors))
        pixels = self._pixels.get(rows)
        if pixels is None:
            spec = normaliser.normalisation.spec
            pixels = self._pixels[rows] = self._make_room(spec, (rows, *tensors[0].shape[1:]))
        stage(pixels.staged[:used], tensors)
        pixels.device[:used].copy_(pixels.host[:used], non_blocking=True)
        normaliser.run(pixels.device[:used], room.device)
        return used

    def _trim(self) -> None:
        """Give back to the driver what is not in use; it waits for the device, which a capture must not."""
        if self._stream is not None:
            with ALONE:
                torch.cuda.empty_cache()

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
