"""TorchScript (`torch.jit.save`). PyTorch has deprecated it in favour of exported programs.

The file names the inputs; it says neither their datatypes nor their shapes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from inferpool.backends.base import LoadedModel, LoadOptions, TensorHint
from inferpool.backends.torch.gpu.cuda_graphs import operations, waits
from inferpool.backends.torch.gpu.fp16 import halve_script
from inferpool.backends.torch.model import (
    Forward,
    InputTensors,
    OutputTree,
    Runnable,
    agree,
    check_datatypes,
    quiet,
    start,
)
from inferpool.backends.torch.signature import complete_inputs, flatten
from inferpool.errors import LoadError
from inferpool.tensors import name_text

log = logging.getLogger(__name__)

FORM = "TorchScript (deprecated by PyTorch)"


def load(file: Path, options: LoadOptions) -> LoadedModel:
    """Load a TorchScript file, in evaluation mode, frozen where that changes no answer; raises LoadError."""
    with quiet(file):
        module = torch.jit.load(str(file), map_location=options.device).eval()
        plain = _runnable(module, options)
        border: Callable[[Forward], Forward] = _as_it_is
        if options.fp16:
            border = halve_script(module, plain, options)
            plain = replace(plain, forward=border(plain.forward))
        frozen = _frozen(module, plain, border)
        if frozen is not None and agree(plain, frozen, options):
            return start(frozen, options)
        log.info("%s is not frozen: it would not give the same answers", file)
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
                f"the argument {name_text(argument.name)} of forward is {kind}; only tensors can be sent:"
                " give it a default, or wrap the module in one that takes tensors"
            )
    inputs = complete_inputs(tensors, optional, options.inputs, options.samples)
    check_datatypes(inputs)
    return Runnable(
        _forward(module),
        inputs,
        FORM,
        copies=_writes(module),
        device=options.device,
        waits=waits(operations(module.inlined_graph)),
    )


def _forward(module: Any) -> Forward:
    def forward(feeds: InputTensors) -> OutputTree:
        return dict(flatten(module(**feeds)))

    return forward


def _as_it_is(forward: Forward) -> Forward:
    return forward


def _frozen(module: Any, plain: Runnable, border: Callable[[Forward], Forward]) -> Runnable | None:
    """The module with its weights as constants, or None where it cannot be frozen."""
    with suppress(RuntimeError):
        frozen = torch.jit.freeze(module)
        return replace(plain, forward=border(_forward(frozen)), copies=_writes(frozen))
    return None


def _writes(module: Any) -> bool:
    """Whether the module may write to its inputs."""
    graph = module.inlined_graph
    aliases = graph.alias_db()
    return any(aliases.has_writers(value) for value in list(graph.inputs())[1:])
