"""ResNet-50 with random weights as an ONNX file: its cost is that of a trained one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
"""Width, blocks and stride of each stage; He et al., "Deep Residual Learning", table 1, 50 layers."""

EXPANSION = 4
CLASSES = 1000
SIDE = 224


class Graph:
    """A chain of nodes under construction; batch normalisation counts as folded into the convolutions."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append a node; returns the name of its output."""
        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def weight(self, shape: tuple[int, ...], inputs: int, gain: float) -> str:
        """A tensor of random numbers, scaled so that a sum over `inputs` keeps its variance times gain²."""
        name = f"w{len(self.weights)}"
        values = self._random.standard_normal(shape, np.float32) * np.float32(gain / np.sqrt(inputs))
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def convolve(self, x: str, channels: tuple[int, int], size: int, stride: int, gain: float) -> str:
        """A convolution with a bias, from channels[0] to channels[1]."""
        before, after = channels
        kernel = self.weight((after, before, size, size), before * size * size, gain)
        bias = self.weight((after,), 1, 0.01)
        pads, strides = [size // 2] * 4, [stride] * 2
        return self.add("Conv", x, kernel, bias, kernel_shape=[size, size], pads=pads, strides=strides)


def write_resnet50(file: Path, seed: int = 0) -> None:
    """Write the file; its input is [rows, 3, 224, 224], its output [rows, 1000], FP32."""
    graph = Graph(seed)
    relu_gain = 2**0.5
    x = graph.add("Relu", graph.convolve("x", (3, 64), 7, 2, relu_gain))
    x = graph.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for width, blocks, first_stride in STAGES:
        wide = width * EXPANSION
        for block in range(blocks):
            stride = 1 if block else first_stride
            y = graph.add("Relu", graph.convolve(x, (channels, width), 1, 1, relu_gain))
            y = graph.add("Relu", graph.convolve(y, (width, width), 3, stride, relu_gain))
            y = graph.convolve(y, (width, wide), 1, 1, 0.5)
            short = x if block else graph.convolve(x, (channels, wide), 1, stride, 1.0)
            x, channels = graph.add("Relu", graph.add("Add", y, short)), wide
    x = graph.add("Flatten", graph.add("GlobalAveragePool", x))
    dense, bias = graph.weight((channels, CLASSES), channels, 1.0), graph.weight((CLASSES,), 1, 0.01)
    graph.add("Gemm", x, dense, bias)
    graph.nodes[-1].output[0] = "logits"
    proto = helper.make_graph(
        graph.nodes,
        "resnet50",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", CLASSES])],
        graph.weights,
    )
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, file)
