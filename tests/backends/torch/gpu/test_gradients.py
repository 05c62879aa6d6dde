"""Gradients of a model with memory of its own, as on a GPU: padded rows, and runs beside recordings."""

from __future__ import annotations

import numpy as np
import torch
from inferpool.backends.torch.gpu.device_model import TorchDeviceModel
from inferpool.backends.torch.model import InputTensors, OutputTree, Runnable, StartedModel
from inferpool.gradient_names import Gradient
from inferpool.tensors import TensorSpec

X = TensorSpec("x", "FP32", (-1, 2))
Y = TensorSpec("y", "FP32", (-1, 2))


def test_gradients_are_those_of_the_rows_without_the_padding() -> None:
    def forward(feeds: InputTensors) -> OutputTree:
        return {(): feeds["x"] ** 2 + feeds["x"].flip(1)}

    runnable = Runnable(forward, (X,), "network", copies=False)
    model = TorchDeviceModel(StartedModel(runnable, {(): Y}), "cpu")
    rows = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    name = Gradient("y", 1, "x", by_rows=True).name
    expected = np.stack([np.ones(3), 2 * rows[:, 1]], axis=1)
    for _ in range(2):
        found = model.run_padded([{"x": rows[:1]}, {"x": rows[1:]}], 8, (name,))
        np.testing.assert_array_equal(found[name], expected)
        # Between them the model runs as usual, in the same memory.
        outputs = model.run({"x": rows})
        np.testing.assert_array_equal(outputs["y"], rows**2 + rows[:, ::-1])
    whole = Gradient("y", 5, "x", by_rows=False).name
    np.testing.assert_array_equal(model.run({"x": rows}, (whole,))[whole], [[0, 0], [0, 0], [1, 12]])
    assert torch.is_inference_mode_enabled() is False
