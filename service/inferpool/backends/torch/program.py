"""Exported programs (`torch.export.save`). The file says what the model takes and gives.

Run as PyTorch loads it, a program is Python code that calls one operation after the other: it gives up
the interpreter lock in each and has to win it back after each, for which it waits milliseconds wherever
the web side is busy. So a program is translated to a graph that PyTorch runs without Python; it runs as
Python only where that cannot be done, or does not give the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from inferpool.backends.base import LoadedModel, LoadOptions
from inferpool.backends.torch.gpu.cuda_graphs import waits
from inferpool.backends.torch.gpu.fp16 import bordered, halve
from inferpool.backends.torch.model import (
    Forward,
    InputTensors,
    OutputTree,
    Runnable,
    agree,
    datatype_of,
    quiet,
    start,
    to_array,
)
from inferpool.backends.torch.program_to_graph import Untranslatable, function, optimize, translate, writes
from inferpool.backends.torch.signature import Place, TensorMeta, flatten, place_text
from inferpool.errors import LoadError
from inferpool.tensors import ANY, Tensors, TensorSpec, name_text

log = logging.getLogger(__name__)

FORM: Final = "exported program"
MOST_ROWS: Final = 1_000_000
"""A limit from here on is none: exporters write a very large number for "any"."""


class _Program:
    """An exported program and how it is called.

    Attributes:
        inputs: the tensors that it takes, in the flat order of its arguments.
        outputs: where each tensor stands in what it returns, and what it looks like, in the flat order.
    """

    def __init__(self, exported: Any) -> None:
        """Read the calling convention; raises LoadError where something else than tensors is in it."""
        self.exported = exported
        self.module = exported.module()
        values = {node.name: node.meta.get("val") for node in exported.graph.nodes}
        arguments = [
            spec.arg for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT
        ]
        self._flat = partial(_flat, arguments)
        self.inputs = tuple(
            TensorSpec(argument.name, *_facts(values[argument.name], f"input {name_text(argument.name)}"))
            for argument in arguments
            if not isinstance(argument, ConstantArgument)
        )
        returned = exported.graph_signature.user_outputs
        structure = pytree.tree_unflatten(range(len(returned)), exported.call_spec.out_spec)
        self.outputs: dict[Place, TensorMeta] = {
            place: _facts(values.get(returned[index], returned[index]), f"output {place_text(place)}")
            for place, index in flatten(structure)
            if returned[index] is not None
        }
        limits = [
            _upper_limit(values[spec.name].shape[0], exported.range_constraints)
            for spec in self.inputs
            if spec.shape
        ]
        self.max_rows = min((limit for limit in limits if limit is not None), default=None)

    def example(self) -> list[Tensors]:
        """The inputs that it was exported with, if they are in the file."""
        if not self.exported.example_inputs:
            return []
        flat = pytree.tree_leaves(self.exported.example_inputs)
        tensors = [tensor for tensor in flat if isinstance(tensor, torch.Tensor)]
        if len(tensors) != len(self.inputs):
            return []
        return [{spec.name: to_array(tensor) for spec, tensor in zip(self.inputs, tensors, strict=True)}]

    def operations(self) -> Iterator[str]:
        """The operations that it is made of, as PyTorch's schemas name them."""
        for node in self.exported.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload):
                yield node.target._schema.name

    def as_python(self, feeds: InputTensors) -> OutputTree:
        """Run it as PyTorch loads it."""
        args, kwargs = pytree.tree_unflatten(self._flat(feeds), self.exported.call_spec.in_spec)
        return dict(flatten(self.module(*args, **kwargs)))

    def as_graph(self, graph: Any) -> Forward:
        """What runs it as `graph` after the same checks of sizes; raises Untranslatable without those."""
        guards = getattr(self.module, "_guards_fn", None)
        if guards is None:
            raise Untranslatable("its checks of the sizes are not to be had on their own")
        run, flat = function(graph), self._flat
        names, places = [spec.name for spec in self.inputs], list(self.outputs)

        # It holds nothing of the program: the graph's own weights would be there beside the program's.
        def forward(feeds: InputTensors) -> OutputTree:
            guards(*flat(feeds))
            return dict(zip(places, run(*[feeds[name] for name in names]), strict=True))

        return forward


def load(file: Path, options: LoadOptions) -> LoadedModel:
    """Load an exported program; raises LoadError."""
    with quiet(file):
        exported = torch.export.load(file)
        if options.device != "cpu":
            exported = move_to_device_pass(exported, options.device)
        if options.fp16:
            halve(exported)
        program = _Program(exported)
        options = replace(options, samples=(*program.example(), *options.samples))
        return start(_runnable(file, program, options), options, program.outputs)


def _runnable(file: Path, program: _Program, options: LoadOptions) -> Runnable:
    """The quickest way to run it that gives the same as the others."""
    wide = frozenset(place for place, (datatype, _) in program.outputs.items() if datatype == "FP32")

    def border(forward: Forward) -> Forward:
        return bordered(forward, wide) if options.fp16 else forward

    python = Runnable(
        border(program.as_python),
        program.inputs,
        f"{FORM}, run as Python",
        copies=True,
        max_rows=program.max_rows,
        device=options.device,
        waits=waits(program.operations()),
    )
    try:
        graph = translate(program.exported)
        for candidate in (optimize(graph), graph):
            runnable = replace(
                python, forward=border(program.as_graph(candidate)), form=FORM, copies=writes(candidate)
            )
            if agree(python, runnable, options):
                return runnable
        reason = "it does not give the same otherwise"
    except (Untranslatable, AttributeError) as error:  # a PyTorch without TorchScript's runtime lacks names
        reason = str(error)
    log.warning("%s runs as Python, which slows it down wherever the server is busy: %s", file, reason)
    return python


def _flat(arguments: Sequence[Any], feeds: InputTensors) -> list[object]:
    """The arguments of a program in their flat order."""
    return [
        argument.value if isinstance(argument, ConstantArgument) else feeds[argument.name]
        for argument in arguments
    ]


def _facts(value: Any, what: str) -> TensorMeta:
    """Datatype and shape of a tensor as the exporter saw it; raises LoadError for anything else."""
    if not isinstance(value, torch.Tensor):
        raise LoadError(f"{what} is {type(value).__name__}, and only tensors can be sent and answered")
    shape = tuple(size if isinstance(size, int) else ANY for size in value.shape)
    return datatype_of(value.dtype, what), shape


def _upper_limit(size: Any, ranges: Any) -> int | None:
    """The largest value that a dimension may have, where that is known and finite."""
    if isinstance(size, int):
        return None
    limits = ranges.get(size.node.expr)
    return int(limits.upper) if limits is not None and limits.upper < MOST_ROWS else None
