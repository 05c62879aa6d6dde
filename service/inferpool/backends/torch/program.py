"""Exported programs (`torch.export.save`). The file has the whole signature.

A program as PyTorch loads it is Python code that calls one operation after the other. Each call releases the
interpreter lock and has to win it back, which takes milliseconds while the web side is busy. So a program is
translated to a graph that PyTorch runs without Python. It runs as Python only if the translation fails or
gives other outputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from inferpool.backends.base import LoadOptions
from inferpool.backends.torch.model import (
    Forward,
    InputTensors,
    OutputTree,
    Runnable,
    StartedModel,
    agree,
    datatype_of,
    quiet,
    start,
    to_array,
)
from inferpool.backends.torch.program_to_graph import Untranslatable, function, optimize, translate, writes
from inferpool.backends.torch.signature import TensorMeta, TreePath, flatten, path_text
from inferpool.errors import LoadError
from inferpool.system.gpus import CPU, gpu_support
from inferpool.tensors import ANY, Tensors, TensorSpec, name_text

log = logging.getLogger(__name__)

FORM: Final = "exported program"
NO_LIMIT_ROWS: Final = 1_000_000
"""A limit of at least this many rows means no limit: exporters write a very large number for "any"."""


class _Program:
    """An exported program and its calling convention.

    Attributes:
        inputs: the specs of the input tensors, in the flat order of the arguments.
        outputs: the path of each output tensor and its datatype and shape, in the flat order.
        max_rows: the largest batch that the program was exported for; None without a limit.
    """

    def __init__(self, exported: Any) -> None:
        """Read the calling convention; raises LoadError if an input or output is no tensor."""
        self.exported = exported
        self.module = exported.module()
        values = {node.name: node.meta.get("val") for node in exported.graph.nodes}
        arguments = [
            spec.arg for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT
        ]
        self._flat = partial(_flat, arguments)
        self.inputs = tuple(
            TensorSpec(argument.name, *_meta(values[argument.name], f"input {name_text(argument.name)}"))
            for argument in arguments
            if not isinstance(argument, ConstantArgument)
        )
        returned = exported.graph_signature.user_outputs
        structure = pytree.tree_unflatten(range(len(returned)), exported.call_spec.out_spec)
        self.outputs: dict[TreePath, TensorMeta] = {
            path: _meta(values.get(returned[index], returned[index]), f"output {path_text(path)}")
            for path, index in flatten(structure)
            if returned[index] is not None
        }
        limits = [
            _upper_limit(values[spec.name].shape[0], exported.range_constraints)
            for spec in self.inputs
            if spec.shape
        ]
        self.max_rows = min((limit for limit in limits if limit is not None), default=None)

    def example(self) -> list[Tensors]:
        """The inputs that the program was exported with, if the file has them."""
        if not self.exported.example_inputs:
            return []
        flat = pytree.tree_leaves(self.exported.example_inputs)
        tensors = [tensor for tensor in flat if isinstance(tensor, torch.Tensor)]
        if len(tensors) != len(self.inputs):
            return []
        return [{spec.name: to_array(tensor) for spec, tensor in zip(self.inputs, tensors, strict=True)}]

    def operations(self) -> Iterator[str]:
        """The operations of the program, by their names in PyTorch's schemas."""
        for node in self.exported.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload):
                yield node.target._schema.name

    def as_python(self, feeds: InputTensors) -> OutputTree:
        """Run the program as PyTorch loads it."""
        args, kwargs = pytree.tree_unflatten(self._flat(feeds), self.exported.call_spec.in_spec)
        return dict(flatten(self.module(*args, **kwargs)))

    def as_graph(self, graph: Any) -> Forward:
        """A function that checks the sizes as the program does, then runs `graph`.

        Raises Untranslatable if the checks of sizes are not available.
        """
        guards = getattr(self.module, "_guards_fn", None)
        if guards is None:
            raise Untranslatable("its checks of sizes are not available on their own")
        run, flat = function(graph), self._flat
        names, paths = [spec.name for spec in self.inputs], list(self.outputs)

        # This closure must not refer to the program, whose weights would stay in memory beside the graph's.
        def forward(feeds: InputTensors) -> OutputTree:
            guards(*flat(feeds))
            return dict(zip(paths, run(*[feeds[name] for name in names]), strict=True))

        return forward


def load(file: Path, options: LoadOptions) -> StartedModel:
    """Load an exported program; raises LoadError."""
    with quiet(file):
        exported = torch.export.load(file)
        if options.device != CPU:
            exported = move_to_device_pass(exported, options.device)
            views_to_reshapes(exported)
        if options.gpu.fp16:
            with gpu_support():
                from inferpool.backends.torch.gpu.fp16 import halve
            halve(exported)
        program = _Program(exported)
        options = replace(options, samples=(*program.example(), *options.samples))
        return start(_runnable(file, program, options), options, program.outputs)


def views_to_reshapes(exported: Any) -> None:
    """Replace the views of a program by reshapes, which give the same numbers whatever the strides are.

    An exporter writes `view` where the strides on its own device allow it. Kernels of another device may lay
    their outputs out differently: attention on CUDA does, and a view of its outputs then raises.
    """
    for node in exported.graph.nodes:
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default
    exported.graph_module.recompile()


def _runnable(file: Path, program: _Program, options: LoadOptions) -> Runnable:
    """The quickest way to run the program that gives the same outputs as Python does."""
    with_casts = _casts(program) if options.gpu.fp16 else _unchanged
    python = Runnable(
        with_casts(program.as_python),
        program.inputs,
        f"{FORM}, run as Python",
        copies=True,
        max_rows=program.max_rows,
        device=options.device,
        operations=tuple(program.operations()),
    )
    try:
        graph = translate(program.exported)
        for candidate in (optimize(graph), graph):
            runnable = replace(
                python, forward=with_casts(program.as_graph(candidate)), form=FORM, copies=writes(candidate)
            )
            if agree(python, runnable, options):
                return runnable
        reason = "its graph does not give the same outputs"
    except (Untranslatable, AttributeError) as error:  # a PyTorch without TorchScript's runtime lacks names
        reason = str(error)
    log.warning("%s runs as Python, which is slow while the server is busy: %s", file, reason)
    return python


def _casts(program: _Program) -> Callable[[Forward], Forward]:
    """Wraps a run in FP16 so that inputs and outputs keep the program's datatypes."""
    with gpu_support():
        from inferpool.backends.torch.gpu.fp16 import cast_borders
    fp32_outputs = frozenset(path for path, (datatype, _) in program.outputs.items() if datatype == "FP32")
    return partial(cast_borders, fp32_outputs=fp32_outputs)


def _unchanged(forward: Forward) -> Forward:
    return forward


def _flat(arguments: Sequence[Any], feeds: InputTensors) -> list[object]:
    """The arguments of a program in their flat order."""
    return [
        argument.value if isinstance(argument, ConstantArgument) else feeds[argument.name]
        for argument in arguments
    ]


def _meta(value: Any, tensor: str) -> TensorMeta:
    """The datatype and shape that the exporter recorded; raises LoadError if `value` is no tensor."""
    if not isinstance(value, torch.Tensor):
        raise LoadError(f"{tensor} is {type(value).__name__}; only tensors can be sent and answered")
    shape = tuple(size if isinstance(size, int) else ANY for size in value.shape)
    return datatype_of(value.dtype, tensor), shape


def _upper_limit(size: Any, ranges: Any) -> int | None:
    """The largest value that a dimension may have; None if it is unknown or unlimited."""
    if isinstance(size, int):
        return None
    limits = ranges.get(size.node.expr)
    return int(limits.upper) if limits is not None and limits.upper < NO_LIMIT_ROWS else None
