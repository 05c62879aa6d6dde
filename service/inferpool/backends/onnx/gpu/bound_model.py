"""A session of ONNX Runtime whose inputs and outputs lie in memory that is used again for every run.

Rows go from where the requests left them straight into page-locked memory, from there to the GPU in one copy
an input, and what comes out takes the same way back. Nothing is allocated for a shape that was run before.
Where the session runs in the stream of the copies, all of that is queued at once and waited for once.

A run of a certain shape can be captured as a CUDA graph, which ONNX Runtime launches as a whole when the run
comes again: no kernel is launched by itself. It keeps the graphs for the thread that captured them, and tells
them apart by a number that a run names (`gpu_graph_id`).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np

from inferpool.backends.base import DeviceModel
from inferpool.backends.cuda.memory import ALONE, Memory
from inferpool.backends.cuda.staging import Buffer, stage
from inferpool.backends.onnx.gpu.normaliser import Normaliser
from inferpool.backends.onnx.gpu.session import is_out_of_memory, run_options
from inferpool.errors import OutOfMemory
from inferpool.pixel_table import run_shapes
from inferpool.tensors import ANY, JSON, Array, Signature, Tensors, TensorSpec

_BFLOAT16: Final = 16
"""BFLOAT16 in onnx.proto (`TensorProto.DataType`)."""

_KEPT_BINDINGS: Final = 256
"""Shapes whose bindings are kept; texts of all lengths on all rungs may have more."""


def bindable(signature: Signature) -> bool:
    """Whether every input and output is a tensor of numbers, with a place of its own on a device."""
    specs = (*signature.inputs, *signature.outputs)
    return len({spec.name for spec in specs}) == len(specs) and all(
        spec.datatype not in ("BYTES", JSON) for spec in specs
    )


@dataclass(slots=True)
class _Bound:
    """A binding for inputs of certain shapes; `outputs` are those whose shapes are known beforehand.

    Each has its place on the host and its address on the device, which stay its own when larger shapes get
    other memory. `order` has the names of all outputs as the binding gives them; `options` are those of its
    runs.
    """

    binding: Any
    order: Sequence[str]
    inputs: Mapping[str, tuple[Array, int]]
    outputs: Mapping[str, tuple[Array, int]]
    options: Any


class BoundModel(DeviceModel):
    """A session that runs from and to `memory`.

    Attributes:
        plain: opens a session without graphs, of a model whose session can capture some; else None.
        normaliser: puts pixels into the input that they are for, where it may come as such; else None.
    """

    plain: Callable[[], Any] | None = None
    normaliser: Normaliser | None = None

    def __init__(
        self,
        session: Any,
        signature: Signature,
        device: str,
        memory: Memory,
        left: Mapping[str, int],
        *,
        streamed: bool = False,
    ) -> None:
        """`signature` is `bindable`; `left` are the nodes that the session runs on the CPU.

        `streamed` says that the session runs in the stream of `memory`.
        """
        self.signature = signature
        self.cpu_nodes = left
        lacks = _lacks_graphs(signature, left)
        self.graphs = lacks or "none were asked for"
        self.capturable = not lacks
        self._streamed = streamed
        self._options = run_options(streamed)
        self._ids = itertools.count(1)
        self._session = session
        kind, _, index = device.partition(":")
        self._device = (kind, int(index or 0))
        self._memory = memory
        self._rooms: dict[str, Buffer] = {}
        self._bindings: dict[tuple[object, ...], _Bound] = {}
        self._names = list(signature.outputs_by_name)

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        """Run as it is; raises what ONNX Runtime raises, and OutOfMemory."""
        if any(not tensor.size for tensor in inputs.values()):  # there is nothing to copy
            names = self._names if outputs is None else list(outputs)
            options = run_options(False)
            return dict(zip(names, self._session.run(names, inputs, options), strict=True))
        return self._run([inputs], self._shapes([inputs], None), None, outputs)

    def run_padded(
        self, parts: Sequence[Tensors], rows: int, outputs: Sequence[str] | None = None
    ) -> Tensors:
        """Run the rows of all parts among `rows`; raises what ONNX Runtime raises, and OutOfMemory."""
        shapes = self._shapes(parts, rows)
        if any(0 in shape for shape in shapes.values()):
            whole = {name: np.concatenate([part[name] for part in parts]) for name in shapes}
            return self.run(whole, outputs)
        return self._run(parts, shapes, rows, outputs)

    def begin(self) -> None:
        """Forget graphs that another thread has captured, for the runtime would capture them again."""
        for bound in self._bindings.values():
            bound.options = self._options
        super().begin()

    def capture(self, parts: Sequence[Tensors], rows: int | None) -> Tensors:
        """Let the runtime run it as often as it has to, capture it and launch it; raises what that raises."""
        shapes = self._shapes(parts, rows)
        key = (rows, *shapes.items())
        bound = self._bindings.get(key) or self._bind(key, shapes, rows)
        unknown = [name for name in self._names if name not in bound.outputs]
        if unknown:
            raise ValueError(_unknown(unknown[0]))
        bound.options = run_options(self._streamed, next(self._ids))
        with ALONE:
            outputs = self._run(parts, shapes, rows, None)
        self.graphs = True
        return outputs

    def uncapture(self, reason: str) -> None:
        """Drop the graphs, and the session with them: after a capture that failed it may not run again."""
        self.graphs = reason
        self._memory.end_capture()
        self._bindings.clear()
        if self.plain is not None:
            self._session = None
            self._session = self.plain()

    def close(self) -> None:
        """Drop the session and give back the memory."""
        # The session frees its memory itself.
        self._memory.enter()
        self._bindings.clear()
        self._session = None
        if self.normaliser is not None:
            self.normaliser.close()
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
            self._session.run_with_iobinding(bound.binding, bound.options)
        except Exception as error:
            with contextlib.suppress(RuntimeError):
                # What was queued before must not meet the rows of the next run.
                self._memory.wait()
            if is_out_of_memory(error):
                raise OutOfMemory(str(error)) from error
            raise
        return self._fetch(bound, None if rows is None else used, self._names if outputs is None else outputs)

    def _shapes(self, parts: Sequence[Tensors], rows: int | None) -> dict[str, tuple[int, ...]]:
        return run_shapes(parts, rows, None if self.normaliser is None else self.normaliser.normalisation)

    def _fill(self, bound: _Bound, parts: Sequence[Tensors]) -> int:
        """Queue what brings all inputs to the device; returns the number of rows."""
        used, pixels = 0, ""
        if self.normaliser is not None and self.normaliser.normalisation.is_among(parts[0]):
            pixels = self.normaliser.normalisation.input
            staged, address = bound.inputs[pixels]
            used = self.normaliser.run([part[pixels] for part in parts], len(staged), address)
        for name, (staged, address) in bound.inputs.items():
            if name != pixels:
                used = stage(staged, [part[name] for part in parts])
                self._memory.upload(address, staged)
        if not self._streamed:
            self._memory.wait()
        return used

    def _fetch(self, bound: _Bound, rows: int | None, names: Sequence[str]) -> Tensors:
        """Copy outputs back, of those with rows the first `rows`."""
        values = dict(zip(bound.order, bound.binding.get_outputs(), strict=True))
        fetched: Tensors = {}
        for name in names:
            place = bound.outputs.get(name)
            if place is None:
                shape = tuple(values[name].shape())
                fetched[name] = array = np.empty(shape, self.signature.outputs_by_name[name].dtype)
                if array.size:
                    self._memory.download(array, values[name].data_ptr())
                if rows is not None:
                    fetched[name] = array[:rows]
            else:
                staged, address = place
                fetched[name] = staged[:rows]
                self._memory.download(fetched[name], address)
        self._memory.wait()
        return {name: tensor.copy() if name in bound.outputs else tensor for name, tensor in fetched.items()}

    def _bind(
        self, key: tuple[object, ...], shapes: Mapping[str, tuple[int, ...]], rows: int | None
    ) -> _Bound:
        outputs = {spec.name: shape for spec in self.signature.outputs if (shape := _fixed(spec, rows))}
        specs = {**self.signature.inputs_by_name, **self.signature.outputs_by_name}
        for name, shape in (*shapes.items(), *outputs.items()):
            room = self._rooms.setdefault(name, Buffer())
            room.grow(self._memory, specs[name].dtype.itemsize * prod(shape))
        if len(self._bindings) >= _KEPT_BINDINGS:
            # Graphs are few, and cannot be had again.
            plain = (known for known, bound in self._bindings.items() if bound.options is self._options)
            del self._bindings[next(plain)]
        binding = self._session.io_binding()
        staged: dict[str, tuple[Array, int]] = {}
        for name, shape in (*shapes.items(), *outputs.items()):
            spec, room = specs[name], self._rooms[name]
            bind = binding.bind_input if name in shapes else binding.bind_output
            bind(name, *self._device, _element(spec), shape, room.address)
            staged[name] = room.view(spec.dtype, shape), room.address
        others = [name for name in self._names if name not in outputs]
        for name in others:
            binding.bind_output(name, *self._device)
        self._bindings[key] = bound = _Bound(
            binding,
            (*outputs, *others),
            {name: staged[name] for name in shapes},
            {name: staged[name] for name in outputs},
            self._options,
        )
        return bound


def _fixed(spec: TensorSpec, rows: int | None) -> tuple[int, ...] | None:
    """The shape of an output where it is known before a run, and is not empty."""
    if not spec.shape:
        return None
    shape = spec.shape if rows is None else (rows, *spec.shape[1:])
    return None if ANY in shape or 0 in shape else shape


def _lacks_graphs(signature: Signature, left: Mapping[str, int]) -> str:
    """Why no run can be captured, so far as that is known beforehand; "" if one may be."""
    if left:
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(left.items()))
        return f"{sum(left.values())} nodes run on the CPU: {listed}"
    for spec in signature.outputs:
        if not spec.shape or ANY in spec.shape[1:]:
            return _unknown(spec.name)
    return ""


def _unknown(output: str) -> str:
    return f'the shape of output "{output}" is not known before the run'


def _element(spec: TensorSpec) -> Any:
    return _BFLOAT16 if spec.datatype == "BF16" else spec.dtype.type
