"""Shared by the scripts of the text models: Transformer encoders as ONNX graphs, and how to run them.

The layers are the post-norm ones of Vaswani et al., "Attention Is All You Need" (2017), with the exact
GELU. Weights go by the names and shapes of PyTorch's `nn.TransformerEncoderLayer`. Attention is ONNX's own
operator, of opset 23: with MiniLM's sizes ONNX Runtime 1.31 ran it as fast as its own fused operators, or
faster, at every length that was tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from tqdm import tqdm

Array: TypeAlias = npt.NDArray[Any]
Weights: TypeAlias = Mapping[str, Array]

IDS: Final = "input_ids"
MASK: Final = "attention_mask"
PAD: Final = 0
"""The id of padding in every vocabulary here."""
BATCH_ROWS: Final = 16
FAR: Final = -1e4
"""Added to the score of padding: far enough that its weight, e to this power, is exactly nought in FP32."""


class Graph:
    """An ONNX graph that grows node by node; tensors go by their names."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, values: Any) -> str:
        """Keep an array, or a number as one of no dimensions; floating-point ones become FP32."""
        array = np.asarray(values)
        if array.dtype.kind == "f":
            array = array.astype(np.float32)
        self._constants[name] = numpy_helper.from_array(
            np.ascontiguousarray(array).reshape(array.shape), name
        )
        return name

    def integers(self, *values: int) -> str:
        """Keep a list of INT64, as shapes and axes are given."""
        return self.constant("integers_" + "_".join(map(str, values)), np.array(values, np.int64))

    def op(self, kind: str, *inputs: str, named: str = "", **attributes: Any) -> str:
        """Add a node of one output, called `named` if that is given; returns the output's name."""
        output = named or f"{kind.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def linear(self, rows: str, weights: Weights, name: str) -> str:
        """`nn.Linear`: `NAME.weight` is [out, in]; `NAME.bias` is [out]."""
        weight = self.constant(f"{name}.weight", weights[f"{name}.weight"].T)
        return self.op(
            "Add", self.op("MatMul", rows, weight), self.constant(f"{name}.bias", weights[f"{name}.bias"])
        )

    def layer_norm(self, rows: str, weights: Weights, name: str, epsilon: float = 1e-5) -> str:
        """`nn.LayerNorm` over the last dimension."""
        scale, shift = (
            self.constant(f"{name}.{part}", weights[f"{name}.{part}"]) for part in ("weight", "bias")
        )
        return self.op("LayerNormalization", rows, scale, shift, axis=-1, epsilon=epsilon)

    def model(self, outputs: Mapping[str, int], inputs: Sequence[str] = (IDS, MASK)) -> onnx.ModelProto:
        """Return the checked model: INT64 [rows, tokens] in, FP32 [rows, size] out for each of `outputs`."""
        graph = helper.make_graph(
            self._nodes,
            self._name,
            [helper.make_tensor_value_info(name, TensorProto.INT64, ["rows", "tokens"]) for name in inputs],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])
                for name, size in outputs.items()
            ],
            list(self._constants.values()),
        )
        model = helper.make_model(
            graph, ir_version=11, opset_imports=[helper.make_opsetid("", 23)], producer_name="inferpool"
        )
        onnx.checker.check_model(model, full_check=True)
        return model


def embedded(graph: Graph, words: Array, positions: Array) -> str:
    """Return each token's vector plus that of its position: [rows, tokens, size].

    The tables are [vocabulary, size] and [most tokens, size].
    """
    tokens = graph.op("Shape", IDS, start=1, end=2)
    used_positions = graph.op(
        "Slice", graph.constant("positions", positions), graph.integers(0), tokens, graph.integers(0)
    )
    return graph.op("Add", graph.op("Gather", graph.constant("words", words), IDS), used_positions)


def padding_bias(graph: Graph) -> str:
    """Return what keeps attention from padding: [rows, 1, tokens, tokens], `FAR` where the mask is 0."""
    padding = graph.op("Sub", graph.constant("one", 1.0), graph.op("Cast", MASK, to=TensorProto.FLOAT))
    far = graph.op("Mul", padding, graph.constant("far", FAR))
    rows, tokens = graph.op("Shape", MASK, start=0, end=1), graph.op("Shape", MASK, start=1, end=2)
    # ONNX Runtime wants the dimension of the asking tokens in full, though the standard lets it be 1.
    shape = graph.op("Concat", rows, graph.integers(1), tokens, tokens, axis=0)
    return graph.op("Expand", graph.op("Unsqueeze", far, graph.integers(1, 2)), shape)


def encoder_layer(
    graph: Graph,
    rows: str,
    weights: Weights,
    name: str,
    *,
    heads: int,
    bias: str = "",
    causal: bool = False,
    epsilon: float = 1e-5,
) -> str:
    """Add the `nn.TransformerEncoderLayer` called NAME: [rows, tokens, size] in and out.

    `bias` is added to the scores of attention; a `causal` layer looks at no later token.
    """
    attention = f"{name}.self_attn"
    parts = {}
    for kind in ("weight", "bias"):
        for part, array in zip("qkv", np.split(weights[f"{attention}.in_proj_{kind}"], 3), strict=True):
            parts[f"{attention}.{part}.{kind}"] = array
    queries, keys, values = (graph.linear(rows, parts, f"{attention}.{part}") for part in "qkv")
    attended = graph.op(
        "Attention", queries, keys, values, bias, q_num_heads=heads, kv_num_heads=heads, is_causal=int(causal)
    )
    rows = graph.op("Add", rows, graph.linear(attended, weights, f"{attention}.out_proj"))
    rows = graph.layer_norm(rows, weights, f"{name}.norm1", epsilon)
    wide = graph.op("Gelu", graph.linear(rows, weights, f"{name}.linear1"))
    rows = graph.op("Add", rows, graph.linear(wide, weights, f"{name}.linear2"))
    return graph.layer_norm(rows, weights, f"{name}.norm2", epsilon)


def mean_of_tokens(graph: Graph, rows: str) -> str:
    """Return the mean of each row's tokens, padding left out: [rows, tokens, size] to [rows, size]."""
    mask = graph.op("Unsqueeze", graph.op("Cast", MASK, to=TensorProto.FLOAT), graph.integers(-1))
    total = graph.op("ReduceSum", graph.op("Mul", rows, mask), graph.integers(1), keepdims=0)
    # A row of padding alone has a mean of nought, and not of nought by nought.
    count = graph.op(
        "Max", graph.op("ReduceSum", mask, graph.integers(1), keepdims=0), graph.constant("one", 1.0)
    )
    return graph.op("Div", total, count)


def padded(rows: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """Pad rows of token ids on the right to the longest; returns ids and mask, INT64 [rows, tokens]."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, np.newaxis]
    ids = np.full(mask.shape, PAD, np.int64)
    ids[mask] = np.concatenate(rows)
    return ids, mask.astype(np.int64)


def run(model: onnx.ModelProto, rows: Sequence[Sequence[int]]) -> Array:
    """Compute the model's only output for rows of token ids with ONNX Runtime, as the server will."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    answers = []
    for first in tqdm(range(0, len(rows), BATCH_ROWS), desc="onnxruntime", unit="batch"):
        ids, mask = padded(rows[first : first + BATCH_ROWS])
        answers.append(session.run(None, {IDS: ids, MASK: mask})[0])
    return np.concatenate(answers)
