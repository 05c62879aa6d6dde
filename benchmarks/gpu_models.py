"""The models of the GPU benchmarks: networks of known sizes with random weights, as ONNX in FP16 or FP32.

The weights do not change the time that a network takes, so nothing has to be downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET: Final = 17
TOKENS: Final = 128
VOCABULARY: Final = 30_522
WIDTH: Final = 768


class Graph:
    """Collects the nodes and weights of a network. Values are referred to by their names.

    Weights and outputs are FP16, or FP32 with `single`.
    """

    def __init__(self, single: bool = False) -> None:
        self.element = TensorProto.FLOAT if single else TensorProto.FLOAT16
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(0)
        self._count = 0

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output; returns the output's name."""
        self._count += 1
        name = f"v{self._count}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def constant(self, values: Any, dtype: Any = None) -> str:
        """Add a weight with these values; returns its name."""
        self._count += 1
        dtype = dtype or helper.tensor_dtype_to_np_dtype(self.element)
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype), f"w{self._count}"))
        return f"w{self._count}"

    def random(self, *shape: int, inputs: int) -> str:
        """Add a random weight of He's scale (1502.01852), which keeps the scale of rows; returns its name."""
        values = self._rng.standard_normal(shape, np.float32) * np.sqrt(2 / inputs)
        return self.constant(values)

    def save(self, file: Path, given: onnx.ValueInfoProto, last: str, outputs: int) -> None:
        """Write the model. Its output is the value `last`, with `outputs` numbers a row."""
        self.nodes.append(helper.make_node("Identity", [last], ["y"]))
        result = helper.make_tensor_value_info("y", self.element, ["n", outputs])
        graph = helper.make_graph(self.nodes, file.stem, [given], [result], self.weights)
        model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", OPSET)])
        file.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, file)


def resnet50(file: Path, single: bool = False) -> None:
    """ResNet-50 (1512.03385), with folded normalisations, on pictures of 224 × 224 pixels in UINT8."""
    graph = Graph(single)

    def conv(x: str, channels: tuple[int, int], kernel: int, stride: int = 1, relu: bool = True) -> str:
        taken, given = channels
        weight = graph.random(given, taken, kernel, kernel, inputs=taken * kernel**2)
        bias = graph.constant(np.zeros(given))
        x = graph.add("Conv", x, weight, bias, strides=[stride] * 2, pads=[kernel // 2] * 4)
        return graph.add("Relu", x) if relu else x

    x = graph.add("Cast", "x", to=graph.element)
    x = graph.add("Mul", x, graph.constant(1 / 255))
    x = conv(x, (3, 64), 7, 2)
    x = graph.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    taken = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            y = conv(x, (taken, width), 1)
            y = conv(y, (width, width), 3, stride)
            y = conv(y, (width, 4 * width), 1, relu=False)
            short = x if block else conv(x, (taken, 4 * width), 1, stride, relu=False)
            # The sum of two branches would double with every block.
            y = graph.add("Mul", graph.add("Add", y, short), graph.constant(0.5))
            x, taken = graph.add("Relu", y), 4 * width
    x = graph.add("Flatten", graph.add("GlobalAveragePool", x))
    x = graph.add("Gemm", x, graph.random(2048, 1000, inputs=2048), graph.constant(np.zeros(1000)))
    graph.save(file, helper.make_tensor_value_info("x", TensorProto.UINT8, ["n", 3, 224, 224]), x, 1000)


def encoder(file: Path, single: bool = False) -> None:
    """An encoder of the size of BERT-base (1810.04805): 12 layers of 768, on 128 tokens, their mean."""
    graph = Graph(single)
    scale, zeros = graph.constant(np.ones(WIDTH)), graph.constant(np.zeros(WIDTH))
    heads = graph.constant([0, TOKENS, 12, 64], np.int64)
    flat = graph.constant([0, TOKENS, WIDTH], np.int64)
    half, one, root = (graph.constant(number) for number in (0.5, 1.0, np.sqrt(2)))

    def dense(x: str, taken: int, given: int) -> str:
        product = graph.add("MatMul", x, graph.random(taken, given, inputs=taken))
        return graph.add("Add", product, graph.constant(np.zeros(given)))

    def normal(x: str) -> str:
        return graph.add("LayerNormalization", x, scale, zeros, axis=-1)

    def split(x: str, order: list[int]) -> str:
        return graph.add("Transpose", graph.add("Reshape", dense(x, WIDTH, WIDTH), heads), perm=order)

    x = graph.add("Gather", graph.random(VOCABULARY, WIDTH, inputs=2), "x")
    x = normal(graph.add("Add", x, graph.random(1, TOKENS, WIDTH, inputs=2)))
    for _ in range(12):
        scores = graph.add("MatMul", split(x, [0, 2, 1, 3]), split(x, [0, 2, 3, 1]))
        scores = graph.add("Softmax", graph.add("Mul", scores, graph.constant(1 / 8)), axis=-1)
        mixed = graph.add("MatMul", scores, split(x, [0, 2, 1, 3]))
        mixed = graph.add("Reshape", graph.add("Transpose", mixed, perm=[0, 2, 1, 3]), flat)
        x = normal(graph.add("Add", x, dense(mixed, WIDTH, WIDTH)))
        inner = dense(x, WIDTH, 4 * WIDTH)
        # GELU in the form that exporters write and the runtime recognises.
        gate = graph.add("Add", graph.add("Erf", graph.add("Div", inner, root)), one)
        inner = graph.add("Mul", graph.add("Mul", inner, gate), half)
        x = normal(graph.add("Add", x, dense(inner, 4 * WIDTH, WIDTH)))
    x = graph.add("ReduceMean", x, axes=[1], keepdims=0)
    graph.save(file, helper.make_tensor_value_info("x", TensorProto.INT64, ["n", TOKENS]), x, WIDTH)


def small(file: Path, single: bool = False) -> None:
    """Three products on 64 numbers: almost all time of a request is spent in the server."""
    graph = Graph(single)
    x, taken = "x", 64
    for given in (128, 128, 10):
        x = graph.add("Gemm", x, graph.random(taken, given, inputs=taken), graph.constant(np.zeros(given)))
        x, taken = (graph.add("Relu", x) if given != 10 else x), given
    graph.save(file, helper.make_tensor_value_info("x", graph.element, ["n", 64]), x, 10)


def rows(name: str, count: int, single: bool = False) -> np.ndarray[Any, Any]:
    """Inputs for a model of this file."""
    rng = np.random.default_rng(1)
    if name == "resnet50":
        return rng.integers(0, 256, (count, 3, 224, 224)).astype(np.uint8)
    if name == "encoder":
        return rng.integers(0, VOCABULARY, (count, TOKENS))
    return rng.standard_normal((count, 64)).astype(np.float32 if single else np.float16)


MODELS: Final = {"resnet50": resnet50, "encoder": encoder, "small": small}
