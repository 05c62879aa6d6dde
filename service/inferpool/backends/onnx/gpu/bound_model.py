"""A session of ONNX Runtime whose inputs and outputs stay in the same memory for every run.

Rows are copied from the requests straight into page-locked memory, and from there to the GPU in one copy for
each input. Outputs travel back the same way. A shape that has run before allocates nothing. If the session
runs in the stream of the copies, all of this is queued at once and waited for once.

A run of one shape can be captured as a CUDA graph. ONNX Runtime then launches the whole graph instead of its
kernels one by one when the same shape runs again. The runtime keeps graphs by thread, and tells graphs apart
by a number that each run names (`gpu_graph_id`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np

from inferpool.backends.base import REPLAYED, DeviceModel, Rejection
from inferpool.backends.cuda.capture_gate import DEVICE_GATE
from inferpool.backends.cuda.memory import Memory
from inferpool.backends.cuda.staging import Buffer, stage
from inferpool.backends.onnx.gpu.normaliser import Normaliser
from inferpool.backends.onnx.gpu.session import is_out_of_memory, run_options
from inferpool.backends.onnx.model import BFLOAT16
from inferpool.backends.onnx.run_errors import find_rejection
from inferpool.errors import OutOfMemory, Reason, Verdict
from inferpool.pixel_table import run_shapes
from inferpool.tensors import ANY, JSON, Array, Signature, Tensors, TensorSpec

_KEPT_BINDINGS: Final = 256
"""Shapes whose bindings are kept. Texts of all lengths in all batch sizes may have more shapes."""


def bindable(signature: Signature) -> bool:
    """Whether every input and output is a tensor of numbers with its own memory on a device."""
    specs = (*signature.inputs, *signature.outputs)
    return len({spec.name for spec in specs}) == len(specs) and all(
        spec.datatype not in ("BYTES", JSON) for spec in specs
    )


@dataclass(slots=True)
class _Binding:
    """A binding for inputs of certain shapes.

    A binding keeps its memory when a larger shape gets new memory.

    Attributes:
        binding: ONNX Runtime's `IOBinding`.
        order: the names of all outputs, in the order in which the binding returns them.
        inputs: name to host array and device address.
        outputs: the same for the outputs whose shapes are known before the run.
        options: the run options (`ort.RunOptions`).
        unknown: the names of the outputs whose shapes are not known before the run.
    """

    binding: Any
    order: Sequence[str]
    inputs: Mapping[str, tuple[Array, int]]
    outputs: Mapping[str, tuple[Array, int]]
    options: Any
    unknown: Sequence[str]


class BoundModel(DeviceModel):
    """A session that reads its inputs from `memory` and writes its outputs there."""

    def __init__(
        self,
        session: Any,
        signature: Signature,
        device: str,
        memory: Memory,
        cpu_nodes: Mapping[str, int],
        *,
        streamed: bool = False,
        graphs_refused: Reason | None = None,
        open_without_graphs: Callable[[], Any] | None = None,
        normaliser: Normaliser | None = None,
        takes_pixels: Verdict | None = None,
        rounding: str = "",
    ) -> None:
        """`signature` is `bindable`; `cpu_nodes` are the nodes that the session runs on the CPU.

        Args:
            session: ONNX Runtime's session.
            signature: its inputs and outputs.
            device: `cuda:N`, or `cpu` in tests.
            memory: owned, and closed, by this model.
            cpu_nodes: the number of nodes of each kind.
            streamed: whether the session runs in the stream of `memory`.
            graphs_refused: why the runtime opened no session that captures graphs; None if it did.
            open_without_graphs: opens a session without graphs, for a session that can capture graphs.
            normaliser: writes pixels into the input that they belong to.
            takes_pixels: why there is no `normaliser`, if pixels were asked for.
            rounding: see `LoadedModel.rounding`.
        """
        self.signature = signature
        self.cpu_nodes = cpu_nodes
        self.rounding = rounding
        reason = graphs_refused or _capture_obstacle(signature, cpu_nodes)
        self.graphs = Verdict(False, reason or "none were asked for")
        self.can_capture = reason is None
        if normaliser is not None:
            self.takes_pixels = Verdict(True, "pixels are normalised on the GPU")
        elif takes_pixels is not None:
            self.takes_pixels = takes_pixels
        self._normaliser = normaliser
        self._open_without_graphs = open_without_graphs
        self._streamed = streamed
        self._options = run_options(streamed)
        self._running = self._options
        self._ids = itertools.count(1)
        self._session = session
        kind, _, index = device.partition(":")
        self._device = (kind, int(index or 0))
        self._memory = memory
        self._buffers: dict[str, Buffer] = {}
        self._bindings: dict[tuple[object, ...], _Binding] = {}
        self._names = list(signature.outputs_by_name)

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        """Run without padding; raises what ONNX Runtime raises, and OutOfMemory."""
        if any(not tensor.size for tensor in inputs.values()):  # nothing to copy
            names = self._names if outputs is None else list(outputs)
            options = self._running = run_options(False)
            with DEVICE_GATE.work():
                return dict(zip(names, self._session.run(names, inputs, options), strict=True))
        return self._run([inputs], self._shapes([inputs], None), None, outputs)

    def run_padded(
        self, parts: Sequence[Tensors], rows: int, outputs: Sequence[str] | None = None
    ) -> Tensors:
        """Run all rows, padded to `rows`; raises what ONNX Runtime raises, and OutOfMemory."""
        shapes = self._shapes(parts, rows)
        if any(0 in shape for shape in shapes.values()):
            joined = {name: np.concatenate([part[name] for part in parts]) for name in shapes}
            return self.run(joined, outputs)
        return self._run(parts, shapes, rows, outputs)

    def stop_run(self, thread: int) -> None:
        """Let the run end before its next operation. A CUDA graph, or queued work, runs to its end."""
        self._running.terminate = True

    def begin(self) -> None:
        """Forget the graphs that another thread captured; the runtime would capture them again."""
        for bound in self._bindings.values():
            bound.options = self._options

    def capture(self, parts: Sequence[Tensors], rows: int | None) -> Tensors:
        """Let the runtime warm up, capture the run and launch the graph; raises what ONNX Runtime raises."""
        shapes = self._shapes(parts, rows)
        key = (rows, *shapes.items())
        bound = self._bindings.get(key) or self._bind(key, shapes, rows)
        unknown = [name for name in self._names if name not in bound.outputs]
        if unknown:
            raise ValueError(_unknown_shape(unknown[0]))
        bound.options = run_options(self._streamed, next(self._ids))
        with DEVICE_GATE.capture():
            outputs = self._run(parts, shapes, rows, None)
        self.graphs = REPLAYED
        return outputs

    def uncapture(self, reason: Reason) -> None:
        """Drop the graphs and the session. After a failed capture a session may not run again."""
        self.graphs = Verdict(False, reason)
        self._memory.end_capture()
        self._bindings.clear()
        if self._open_without_graphs is not None:
            self._session = None  # frees its memory before the next session needs memory
            self._session = self._open_without_graphs()

    def rejection(self, error: Exception) -> Rejection | None:
        """The operation that has refused its inputs, and the runtime's reason; None for another fault."""
        return find_rejection(error)

    def close(self) -> None:
        """Drop the session, which frees its own memory, and close `memory`."""
        self._memory.enter()
        self._bindings.clear()
        self._session = None
        if self._normaliser is not None:
            self._normaliser.close()
        self._memory.close()

    def _run(
        self,
        parts: Sequence[Tensors],
        shapes: Mapping[str, tuple[int, ...]],
        rows: int | None,
        outputs: Sequence[str] | None,
    ) -> Tensors:
        key = (rows, *shapes.items())
        self._memory.enter()
        bound = self._bindings.get(key) or self._bind(key, shapes, rows)
        try:
            used = self._fill(bound, parts)
            for name in bound.unknown:
                # A binding keeps the outputs of its last run, and the next run would be cut to their shapes.
                bound.binding.bind_output(name, *self._device)
            self._running = bound.options
            # Another run of the same shape may have been stopped.
            self._running.terminate = False
            with DEVICE_GATE.work() if bound.options is self._options else nullcontext():
                self._session.run_with_iobinding(bound.binding, bound.options)
        except Exception as error:
            with suppress(RuntimeError):
                # Copies that are still queued must not touch the rows of the next run.
                self._memory.wait()
            if is_out_of_memory(error):
                raise OutOfMemory(str(error)) from error
            raise
        return self._fetch(bound, None if rows is None else used, self._names if outputs is None else outputs)

    def lost(self) -> Reason | None:
        """The driver's error for every call, if this process cannot use the device any more."""
        return self._memory.lost()

    def _shapes(self, parts: Sequence[Tensors], rows: int | None) -> dict[str, tuple[int, ...]]:
        return run_shapes(parts, rows, None if self._normaliser is None else self._normaliser.normalisation)

    def _fill(self, bound: _Binding, parts: Sequence[Tensors]) -> int:
        """Queue the copies of all inputs to the device; returns the number of rows."""
        used, pixel_input = 0, ""
        if self._normaliser is not None and self._normaliser.normalisation.is_among(parts[0]):
            pixel_input = self._normaliser.normalisation.input
            staged, address = bound.inputs[pixel_input]
            used = self._normaliser.run([part[pixel_input] for part in parts], len(staged), address)
        for name, (staged, address) in bound.inputs.items():
            if name != pixel_input:
                used = stage(staged, [part[name] for part in parts])
                self._memory.upload(address, staged)
        if not self._streamed:
            self._memory.wait()
        return used

    def _fetch(self, bound: _Binding, rows: int | None, names: Sequence[str]) -> Tensors:
        """Copy the outputs `names` back; if `rows` is given, only their first `rows` rows."""
        values = dict(zip(bound.order, bound.binding.get_outputs(), strict=True))
        fetched: Tensors = {}
        for name in names:
            memory = bound.outputs.get(name)
            if memory is None:
                shape = tuple(values[name].shape())
                fetched[name] = array = np.empty(shape, self.signature.outputs_by_name[name].dtype)
                if array.size:
                    self._memory.download(array, values[name].data_ptr())
                if rows is not None:
                    fetched[name] = array[:rows]
            else:
                staged, address = memory
                fetched[name] = staged[:rows]
                self._memory.download(fetched[name], address)
        self._memory.wait()
        return {name: tensor.copy() if name in bound.outputs else tensor for name, tensor in fetched.items()}

    def _bind(
        self, key: tuple[object, ...], shapes: Mapping[str, tuple[int, ...]], rows: int | None
    ) -> _Binding:
        outputs = {spec.name: shape for spec in self.signature.outputs if (shape := _fixed(spec, rows))}
        specs = {**self.signature.inputs_by_name, **self.signature.outputs_by_name}
        for name, shape in (*shapes.items(), *outputs.items()):
            buffer = self._buffers.setdefault(name, Buffer())
            buffer.grow(self._memory, specs[name].dtype.itemsize * prod(shape))
        if len(self._bindings) >= _KEPT_BINDINGS:
            # Bindings with a graph stay: there are few, and a graph is not captured again.
            without_graph = (
                known for known, bound in self._bindings.items() if bound.options is self._options
            )
            del self._bindings[next(without_graph)]
        binding = self._session.io_binding()
        staged: dict[str, tuple[Array, int]] = {}
        for name, shape in (*shapes.items(), *outputs.items()):
            spec, buffer = specs[name], self._buffers[name]
            bind = binding.bind_input if name in shapes else binding.bind_output
            bind(name, *self._device, _element(spec), shape, buffer.address)
            staged[name] = buffer.view(spec.dtype, shape), buffer.address
        others = [name for name in self._names if name not in outputs]
        for name in others:
            binding.bind_output(name, *self._device)  # here, too, because this sets the order of the outputs
        self._bindings[key] = bound = _Binding(
            binding,
            (*outputs, *others),
            {name: staged[name] for name in shapes},
            {name: staged[name] for name in outputs},
            self._options,
            others,
        )
        return bound


def _fixed(spec: TensorSpec, rows: int | None) -> tuple[int, ...] | None:
    """The shape of an output, if the shape is known before the run and is not empty; else None."""
    if not spec.shape:
        return None
    shape = spec.shape if rows is None else (rows, *spec.shape[1:])
    return None if ANY in shape or 0 in shape else shape


def _capture_obstacle(signature: Signature, cpu_nodes: Mapping[str, int]) -> Reason | None:
    """Why no run can be captured, as far as the signature and the nodes tell; None if a capture may work."""
    if cpu_nodes:
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(cpu_nodes.items()))
        return f"{sum(cpu_nodes.values())} nodes run on the CPU: {listed}"
    for spec in signature.outputs:
        if not spec.shape or ANY in spec.shape[1:]:
            return _unknown_shape(spec.name)
    return None


def _unknown_shape(output: str) -> Reason:
    return f'the shape of output "{output}" is not known before the run'


def _element(spec: TensorSpec) -> Any:
    return BFLOAT16 if spec.datatype == "BF16" else spec.dtype.type
