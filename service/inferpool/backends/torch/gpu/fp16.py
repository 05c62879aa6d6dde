"""Models of PyTorch in FP16: their weights become FP16, and casts stand where tensors go in and come out.

Not `torch.autocast`: it keeps the casts of parameters that are trained, and casts the constants of a frozen
module anew in every run, which reads all of FP32's memory and writes half of it again. Converted, a model
takes half the memory. What it has in FP32 besides weights has to go along: a TorchScript file in which
something does not is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from torch.fx.node import map_aggregate

from inferpool.backends.base import LoadOptions
from inferpool.backends.torch.model import Forward, InputTensors, OutputTree, Runnable, run_once
from inferpool.backends.torch.signature import Place, pairs_to_try
from inferpool.errors import LoadError, short_reason
from inferpool.tensors import Tensors

_LARGEST: Final = torch.finfo(torch.float16).max


def bordered(forward: Forward, wide: frozenset[Place]) -> Forward:
    """`forward`, which runs in FP16, with inputs of FP32, and outputs of FP32 at the places in `wide`."""

    def run(feeds: InputTensors) -> OutputTree:
        leaves = forward({name: _to(feed, torch.float32, torch.float16) for name, feed in feeds.items()})
        return {
            place: _to(leaf, torch.float16, torch.float32) if place in wide else leaf
            for place, leaf in leaves.items()
        }

    return run


def halve_script(module: Any, exact: Runnable, options: LoadOptions) -> Callable[[Forward], Forward]:
    """Make the weights of a TorchScript `module` FP16, which `exact` runs; returns what its runs then need.

    Raises LoadError where it does not run so.
    """
    inputs, wide = _run_in_full(exact, options)
    module.half()
    border = partial(bordered, wide=wide)
    try:
        if inputs:
            run_once(replace(exact, forward=border(exact.forward)), inputs, options.threads)
    except Exception as error:
        raise LoadError(
            f"it does not run in FP16 ({short_reason(error)}): something in it is FP32 and no weight;"
            " convert it before it is exported, or leave gpu.fp16 out"
        ) from error
    return border


def _run_in_full(exact: Runnable, options: LoadOptions) -> tuple[Tensors, frozenset[Place]]:
    """Inputs that `exact` runs, none if there are no such, and where it gives tensors of FP32 for them."""
    for inputs, _ in pairs_to_try(exact.inputs, options.samples):
        try:
            leaves = run_once(exact, inputs, options.threads)
        except Exception:  # noqa: BLE001 - made-up rows may be nonsense to the model
            continue
        return inputs, frozenset(place for place, leaf in leaves.items() if _is(leaf, torch.float32))
    return {}, frozenset()


def halve(exported: Any) -> None:
    """Make the weights of an exported program FP16, and whatever its operations ask for in FP32.

    What it says of its inputs and outputs stays as it is.
    """
    for state in (exported.state_dict, exported.constants):
        for name, value in state.items():
            if _is(value, torch.float32):
                halved = value.detach().half()
                if isinstance(value, torch.nn.Parameter):
                    halved = torch.nn.Parameter(halved, requires_grad=False)
                state[name] = halved
    for node in exported.graph.nodes:
        if node.op != "call_function":
            continue
        of_floats = _is(node.meta.get("val"), torch.float32)

        def literal(value: Any, of_floats: bool = of_floats) -> Any:
            if value is torch.float32:
                return torch.float16
            # What masks by the smallest number of FP32 shall do so by that of FP16.
            if of_floats and isinstance(value, float) and math.isfinite(value):
                return max(-_LARGEST, min(value, _LARGEST))
            return value

        node.args = map_aggregate(node.args, literal)
        node.kwargs = map_aggregate(node.kwargs, literal)
    exported.graph_module.recompile()


def _to(value: Any, before: torch.dtype, after: torch.dtype) -> Any:
    return value.to(after) if _is(value, before) else value


def _is(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype is dtype
