"""Computes gradients of a model's outputs by its inputs, with PyTorch's autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from inferpool.backends.base import ran_out_of_memory
from inferpool.backends.torch.run_errors import NotDifferentiable
from inferpool.backends.torch.signature import TreePath
from inferpool.errors import short_reason
from inferpool.gradient_names import read_gradient
from inferpool.tensors import name_text


def differentiate(
    forward: Callable[[dict[str, torch.Tensor]], Mapping[TreePath, Any]],
    feeds: Mapping[str, torch.Tensor],
    names: Sequence[str],
    paths: Mapping[str, TreePath],
) -> dict[str, torch.Tensor]:
    """Return the gradients of these `names`, which are all of one output, as FP32 or FP64.

    `paths` has the path of each output. An input that the output does not depend on has zeros. Raises
    NotDifferentiable, and what PyTorch raises.
    """
    gradients = [read_gradient(name) for name in names]
    wanted = gradients[0]
    # Inference tensors take no part in autograd, but copies of them do.
    with torch.inference_mode(False), torch.enable_grad(), torch.jit.optimized_execution(False):
        copies = {name: tensor.clone() for name, tensor in feeds.items()}
        leaves = [copies[gradient.input].requires_grad_() for gradient in gradients]
        for gradient, leaf in zip(gradients, leaves, strict=True):
            copies[gradient.input] = leaf.clone()  # autograd lets no model write to a leaf
        output = forward(copies).get(paths[wanted.output])
        if not isinstance(output, torch.Tensor) or not output.requires_grad:
            raise NotDifferentiable(
                f"output {name_text(wanted.output)} has no gradients: it is compiled, computed without"
                " gradients (no_grad), or not continuous"
            )
        numbers = output.reshape(len(output) if wanted.by_rows else 1, -1)[:, wanted.element]
        try:
            found = torch.autograd.grad(numbers.sum(), leaves, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if ran_out_of_memory(error):
                raise
            raise NotDifferentiable(
                f"output {name_text(wanted.output)} has no gradients: {short_reason(error)}"
            ) from error
    given: dict[str, torch.Tensor] = {}
    for name, leaf, gradient_tensor in zip(names, leaves, found, strict=True):
        tensor = torch.zeros_like(leaf) if gradient_tensor is None else gradient_tensor
        given[name] = tensor.detach() if tensor.dtype is torch.float64 else tensor.detach().float()
    return given
