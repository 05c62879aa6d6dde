"""TorchScript (`torch.jit.save`). PyTorch has deprecated it in favour of exported programs.

The file names the inputs, but has neither their datatypes nor their shapes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from inferpool.backends.base import LoadOptions, TensorHint
from inferpool.backends.torch.model import (
    Forward,
    InputTensors,
    OutputTree,
    Runnable,
    StartedModel,
    agree,
    check_datatypes,
    quiet,
    start,
)
from inferpool.backends.torch.signature import TreePath, complete_inputs, flatten
from inferpool.errors import LoadError
from inferpool.system.gpus import gpu_support
from inferpool.tensors import name_text

log = logging.getLogger(__name__)

FORM = "TorchScript (deprecated by PyTorch)"

_FILLS: Final = frozenset(f"aten::{name}" for name in ("append", "extend", "insert", "pop", "add_", "clear"))
"""The operations that change the length of a list."""


def load(file: Path, options: LoadOptions) -> StartedModel:
    """Load a TorchScript file in evaluation mode, frozen if that changes no output; raises LoadError."""
    with quiet(file):
        module = torch.jit.load(str(file), map_location=options.device).eval()
        plain = _runnable(module, options)
        with_casts: Callable[[Forward], Forward] = _unchanged
        if options.gpu.fp16:
            with gpu_support():
                from inferpool.backends.torch.gpu.fp16 import halve_script
            with_casts = halve_script(module, plain, options)
            plain = replace(plain, forward=with_casts(plain.forward))
        frozen = _frozen(module, plain, with_casts)
        if frozen is not None and agree(plain, frozen, options):
            return start(frozen, options)
        log.info("%s is not frozen: frozen, it does not give the same outputs", file)
        return start(plain, options)


def _runnable(module: Any, options: LoadOptions) -> Runnable:
    if not hasattr(module, "forward"):
        raise LoadError("the module has no method forward")
    arguments = module.forward.schema.arguments[1:]
    tensors, optional = [], set()
    for argument in arguments:
        kind = str(argument.type)
        if kind in ("Tensor", "Optional[Tensor]"):
            tensors.append(TensorHint(argument.name))
            if argument.has_default_value():
                optional.add(argument.name)
        elif not argument.has_default_value():
            raise LoadError(
                f"the argument {name_text(argument.name)} of forward is {kind}, but only tensors can be sent:"
                " give it a default, or wrap the module in one that takes tensors"
            )
    inputs = complete_inputs(tensors, optional, options.inputs, options.samples)
    check_datatypes(inputs)
    lists = _open_lists(module)
    return Runnable(
        _forward(module, lists),
        inputs,
        FORM,
        copies=_writes(module),
        device=options.device,
        operations=tuple(_operations(module.inlined_graph)),
        forward_whole=lambda whole: _forward(module, lists | set(whole)),
    )


def _forward(module: Any, whole: Collection[TreePath] = ()) -> Forward:
    """Runs `module`; the structures at the paths `whole` are returned as they are."""

    def forward(feeds: InputTensors) -> OutputTree:
        return dict(flatten(module(**feeds), whole=whole))

    return forward


def _unchanged(forward: Forward) -> Forward:
    return forward


def _frozen(module: Any, plain: Runnable, with_casts: Callable[[Forward], Forward]) -> Runnable | None:
    """The module with its weights as constants, or None if it cannot be frozen."""
    with suppress(RuntimeError):
        frozen = torch.jit.freeze(module)
        lists = _open_lists(module)
        return replace(
            plain,
            forward=with_casts(_forward(frozen, lists)),
            copies=_writes(frozen),
            forward_whole=lambda whole: _forward(frozen, lists | set(whole)),
        )
    return None


def _open_lists(module: Any) -> frozenset[TreePath]:
    """The paths of the returned lists whose length is not the same for every input, by the module's code.

    Only a list that is written out, or is filled outside of loops and branches, always has the same length.
    """
    graph = module.inlined_graph
    aliases = graph.alias_db()
    fills_in_blocks = any(kind in _FILLS for kind in _operations_in_blocks(graph))

    def find(value: Any, path: TreePath) -> Iterator[TreePath]:
        node = value.node()
        if value.type().kind() == "ListType":
            if node.kind() != "prim::ListConstruct" or (fills_in_blocks and aliases.has_writers(value)):
                yield path
                return
        elif node.kind() == "prim::DictConstruct":
            keys, values = list(node.inputs())[::2], list(node.inputs())[1::2]
            for key, child in zip(keys, values, strict=True):
                if key.node().kind() == "prim::Constant":
                    yield from find(child, (*path, key.toIValue()))
            return
        elif node.kind() != "prim::TupleConstruct":
            return
        for index, child in enumerate(node.inputs()):
            yield from find(child, (*path, index))

    returned = list(graph.outputs())
    return frozenset(path for value in returned for path in find(value, ()))


def _operations_in_blocks(graph: Any) -> Iterator[str]:
    """The operations in loops and branches."""
    for node in graph.nodes():
        for block in node.blocks():
            yield from _operations(block)


def _writes(module: Any) -> bool:
    """Whether the module may write to its inputs."""
    graph = module.inlined_graph
    aliases = graph.alias_db()
    return any(aliases.has_writers(value) for value in list(graph.inputs())[1:])


def _operations(graph: Any) -> Iterator[str]:
    """The operations of a graph of TorchScript's runtime, and of the blocks in it."""
    for node in graph.nodes():
        yield node.kind()
        for block in node.blocks():
            yield from _operations(block)
