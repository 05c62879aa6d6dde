"""PyTorch models in FP16: the weights become FP16, and casts are put around inputs and outputs.

`torch.autocast` is not used. It caches the casts of trained parameters only, and casts the constants of a
frozen module anew in every run, which reads all of the FP32 memory and writes half of it again. A converted
model takes half the memory. Everything else in FP32 has to be converted too: a TorchScript file in which
something cannot be converted is refused.
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
from inferpool.backends.torch.signature import TreePath, pairs_to_try
from inferpool.errors import LoadError, short_reason
from inferpool.tensors import Tensors

_LARGEST: Final = torch.finfo(torch.float16).max


def cast_borders(forward: Forward, fp32_outputs: frozenset[TreePath]) -> Forward:
    """Wrap `forward`, which runs in FP16: inputs are cast from FP32, and `fp32_outputs` back to FP32."""

    def run(feeds: InputTensors) -> OutputTree:
        leaves = forward({name: _cast(feed, torch.float32, torch.float16) for name, feed in feeds.items()})
        return {
            path: _cast(leaf, torch.float16, torch.float32) if path in fp32_outputs else leaf
            for path, leaf in leaves.items()
        }

    return run


def halve_script(module: Any, exact: Runnable, options: LoadOptions) -> Callable[[Forward], Forward]:
    """Make the weights of a TorchScript `module` FP16; returns the wrapper that its runs need afterwards.

    `exact` runs the same module in FP32. Raises LoadError if the module does not run in FP16.
    """
    inputs, fp32_outputs = _run_in_fp32(exact, options)
    module.half()
    with_casts = partial(cast_borders, fp32_outputs=fp32_outputs)
    try:
        if inputs:
            run_once(replace(exact, forward=with_casts(exact.forward)), inputs, options.threads)
    except Exception as error:
        raise LoadError(
            f"the model does not run in FP16 ({short_reason(error)}): an FP32 tensor in it is no weight;"
            " convert the model before its export, or set gpu.fp16 = false"
        ) from error
    return with_casts


def _run_in_fp32(exact: Runnable, options: LoadOptions) -> tuple[Tensors, frozenset[TreePath]]:
    """Inputs that `exact` runs (empty if there are none), and the paths of its FP32 outputs."""
    for inputs, _ in pairs_to_try(exact.inputs, options.samples):
        try:
            leaves = run_once(exact, inputs, options.threads)
        except Exception:  # noqa: BLE001 - made-up rows may be nonsense to the model
            continue
        return inputs, frozenset(path for path, leaf in leaves.items() if _is(leaf, torch.float32))
    return {}, frozenset()


def halve(exported: Any) -> None:
    """Make the weights of an exported program FP16, and the FP32 literals of its operations.

    The declared inputs and outputs keep their datatypes.
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
            # A mask that uses FP32's lowest number has to use FP16's lowest number.
            if of_floats and isinstance(value, float) and math.isfinite(value):
                return max(-_LARGEST, min(value, _LARGEST))
            return value

        node.args = map_aggregate(node.args, literal)
        node.kwargs = map_aggregate(node.kwargs, literal)
    exported.graph_module.recompile()


def _cast(value: Any, before: torch.dtype, after: torch.dtype) -> Any:
    return value.to(after) if _is(value, before) else value


def _is(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype is dtype
