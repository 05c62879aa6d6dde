"""Random ONNX graphs of row-wise and mixing operations, and what running them shows of their rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
ROWS = 3
"""Rows that run together."""


@dataclass
class Draft:
    """A graph as it grows.

    Attributes:
        draw: Hypothesis' draw.
        values: each value for `ROWS` rows, as running the graph so far has shown.
        alone: each value for the first row alone, if the graph so far can run it.
    """

    draw: Callable[[Any], Any]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    values: dict[str, Array] = field(default_factory=dict)
    alone: dict[str, Array] = field(default_factory=dict)

    def constant(self, array: Array) -> str:
        """Add a constant and return its name."""
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def integers(self, *numbers: int) -> str:
        """Add a constant list of INT64."""
        return self.constant(np.array(numbers, np.int64))

    def weights(self, *shape: int) -> str:
        """Add constant numbers."""
        seed = self.draw(st.integers(0, 99))
        return self.constant(np.random.default_rng(seed).normal(size=shape).astype(np.float32))

    def node(self, operation: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        """Add a node and return the names of its outputs."""
        names = [f"v{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(operation, inputs, names, **attributes))
        return names

    def axis(self, name: str) -> int:
        """Choose an axis of a value."""
        return int(self.draw(st.integers(0, self.values[name].ndim - 1)))

    def pick(self, least: int = 1, most: int = 5) -> str | None:
        """Choose a value of a rank between two; None if there is none."""
        names = [name for name, value in self.values.items() if least <= value.ndim <= most and value.size]
        return self.draw(st.sampled_from(names)) if names else None


Grow = Callable[[Draft, str], list[str]]


def _unary(draft: Draft, x: str) -> list[str]:
    return draft.node(
        draft.draw(st.sampled_from(("Relu", "Tanh", "Neg", "Sigmoid", "Abs", "Erf", "Identity"))), x
    )


def _binary(draft: Draft, x: str) -> list[str]:
    operation = draft.draw(st.sampled_from(("Add", "Mul", "Sub", "Max")))
    kind = draft.draw(st.integers(0, 3))
    if kind == 0:
        other = draft.weights(*draft.values[x].shape[draft.axis(x) + 1 :])
    elif kind == 1:
        shape = [1] * draft.values[x].ndim
        axis = draft.axis(x)
        shape[axis] = draft.values[x].shape[axis]
        other = draft.weights(*shape)
    else:
        found = draft.pick()
        other = found or x
    return draft.node(operation, *draft.draw(st.permutations((x, other))))


def _reduce(draft: Draft, x: str) -> list[str]:
    operation = draft.draw(st.sampled_from(("ReduceMax", "ReduceMean", "ReduceSum", "ReduceMin", "ReduceL2")))
    keep = draft.draw(st.integers(0, 1))
    if draft.draw(st.integers(0, 7)) == 0:
        return draft.node(operation, x, keepdims=keep)
    axes = draft.draw(st.sets(st.integers(0, draft.values[x].ndim - 1), min_size=1, max_size=2))
    return draft.node(operation, x, draft.integers(*sorted(axes)), keepdims=keep)


def _softmax(draft: Draft, x: str) -> list[str]:
    return draft.node(draft.draw(st.sampled_from(("Softmax", "LogSoftmax"))), x, axis=draft.axis(x))


def _cumulate(draft: Draft, x: str) -> list[str]:
    return draft.node("CumSum", x, draft.constant(np.array(draft.axis(x), np.int64)))


def _transpose(draft: Draft, x: str) -> list[str]:
    return draft.node("Transpose", x, perm=draft.draw(st.permutations(range(draft.values[x].ndim))))


def _flatten(draft: Draft, x: str) -> list[str]:
    return draft.node("Flatten", x, axis=draft.axis(x))


def _reshape(draft: Draft, x: str) -> list[str]:
    """To a shape made of the sizes of the value, merged and cut."""
    sizes = list(draft.values[x].shape)
    kind = draft.draw(st.integers(0, 4))
    if kind == 0:
        return draft.node("Reshape", x, draft.integers(0, -1))
    if kind == 1:
        return draft.node("Reshape", x, draft.integers(-1, sizes[-1]))
    if kind == 2:
        (shape,) = draft.node("Shape", x)
        (first,) = draft.node("Slice", shape, draft.integers(0), draft.integers(draft.axis(x) + 1))
        (target,) = draft.node("Concat", first, draft.integers(-1), axis=0)
        return draft.node("Reshape", x, target)
    if kind == 3 and len(sizes) > 1:
        axis = draft.draw(st.integers(0, len(sizes) - 2))
        (shape,) = draft.node("Shape", x)
        parts = []
        for index in range(len(sizes)):
            (size,) = draft.node("Gather", shape, draft.integers(index))
            parts.append(size)
        (merged,) = draft.node("Mul", parts[axis], parts[axis + 1])
        (target,) = draft.node("Concat", *parts[:axis], merged, *parts[axis + 2 :], axis=0)
        return draft.node("Reshape", x, target)
    factor = draft.draw(st.sampled_from((1, 2, 3)))
    return draft.node("Reshape", x, draft.integers(-1, factor))


def _split_axis(draft: Draft, x: str) -> list[str]:
    axis = draft.axis(x)
    size = draft.values[x].shape[axis]
    if size < 2:
        return _unary(draft, x)
    return draft.node("Split", x, draft.integers(1, size - 1), outputs=2, axis=axis)


def _squeeze(draft: Draft, x: str) -> list[str]:
    ones = [axis for axis, size in enumerate(draft.values[x].shape) if size == 1]
    if not ones:
        return draft.node("Unsqueeze", x, draft.integers(draft.axis(x)))
    if draft.draw(st.integers(0, 5)) == 0:
        return draft.node("Squeeze", x)
    return draft.node("Squeeze", x, draft.integers(draft.draw(st.sampled_from(ones))))


def _slice(draft: Draft, x: str) -> list[str]:
    axis = draft.axis(x)
    end = draft.draw(st.sampled_from((1, 2, -1, 2**40)))
    start = draft.draw(st.sampled_from((0, 0, 1)))
    return draft.node("Slice", x, draft.integers(start), draft.integers(end), draft.integers(axis))


def _gather(draft: Draft, x: str) -> list[str]:
    axis = draft.axis(x)
    size = draft.values[x].shape[axis]
    count = draft.draw(st.integers(1, 3))
    indices = [draft.draw(st.integers(0, size - 1)) for _ in range(count)]
    return draft.node("Gather", x, draft.integers(*indices), axis=axis)


def _embed(draft: Draft, x: str) -> list[str]:
    """Indices out of the value, looked up in a table."""
    (positive,) = draft.node("Abs", x)
    (bounded,) = draft.node("Min", positive, draft.constant(np.array(3, np.float32)))
    (indices,) = draft.node("Cast", bounded, to=TensorProto.INT64)
    return draft.node("Gather", draft.weights(4, 2), indices)


def _concat(draft: Draft, x: str) -> list[str]:
    other = draft.pick(draft.values[x].ndim, draft.values[x].ndim) or x
    return draft.node("Concat", x, other, axis=draft.axis(x))


def _matmul(draft: Draft, x: str) -> list[str]:
    kind = draft.draw(st.integers(0, 3))
    size = draft.values[x].shape[-1]
    if kind == 0:
        return draft.node("MatMul", x, draft.weights(size, 2))
    if kind == 1:
        rank = draft.values[x].ndim
        order = list(range(rank))
        order[-2:] = order[-2:][::-1]
        (turned,) = draft.node("Transpose", x, perm=order)
        return draft.node("MatMul", x, turned)
    if kind == 2:
        left = draft.values[x].shape[-2] if draft.values[x].ndim > 1 else size
        return draft.node("MatMul", draft.weights(2, left), x)
    return draft.node("MatMul", x, draft.pick() or x)


def _norm(draft: Draft, x: str) -> list[str]:
    value = draft.values[x]
    axis = draft.axis(x)
    if draft.draw(st.booleans()):
        shape = value.shape[axis:]
        return draft.node("LayerNormalization", x, draft.weights(*shape), axis=axis)
    if value.ndim >= 3:
        return draft.node(
            "InstanceNormalization", x, draft.weights(value.shape[1]), draft.weights(value.shape[1])
        )
    return _unary(draft, x)


def _convolve(draft: Draft, x: str) -> list[str]:
    value = draft.values[x]
    if value.ndim != 3:
        return _unary(draft, x)
    return draft.node("Conv", x, draft.weights(2, value.shape[1], 1))


def _sort(draft: Draft, x: str) -> list[str]:
    outputs = draft.node("TopK", x, draft.integers(1), outputs=2, axis=draft.axis(x))
    return outputs[:1]


def _argmax(draft: Draft, x: str) -> list[str]:
    (indices,) = draft.node("ArgMax", x, axis=draft.axis(x), keepdims=draft.draw(st.integers(0, 1)))
    return draft.node("Cast", indices, to=TensorProto.FLOAT)


def _where(draft: Draft, x: str) -> list[str]:
    (condition,) = draft.node("Greater", x, draft.constant(np.array(0.1, np.float32)))
    return draft.node("Where", condition, x, draft.pick() or x)


def _expand(draft: Draft, x: str) -> list[str]:
    """A constant given as many rows as there are, by the shape of the value."""
    (shape,) = draft.node("Shape", x)
    kind = draft.draw(st.integers(0, 2))
    if kind == 0:
        return draft.node("Expand", draft.weights(*[1] * draft.values[x].ndim), shape)
    if kind == 1:
        return draft.node(
            "ConstantOfShape", shape, value=numpy_helper.from_array(np.array([0.5], np.float32))
        )
    (size,) = draft.node("Gather", shape, draft.constant(np.array(draft.axis(x), np.int64)))
    (number,) = draft.node("Cast", size, to=TensorProto.FLOAT)
    return draft.node("Div", x, number)


def _tile(draft: Draft, x: str) -> list[str]:
    repeats = [1] * draft.values[x].ndim
    repeats[draft.axis(x)] = 2
    return draft.node("Tile", x, draft.integers(*repeats))


def _pad(draft: Draft, x: str) -> list[str]:
    widths = [0] * (2 * draft.values[x].ndim)
    widths[draft.draw(st.integers(0, len(widths) - 1))] = 1
    return draft.node("Pad", x, draft.integers(*widths))


def _quantise(draft: Draft, x: str) -> list[str]:
    values, scale, zero = draft.node("DynamicQuantizeLinear", x, outputs=3)
    return draft.node("DequantizeLinear", values, scale, zero)


def _einsum(draft: Draft, x: str) -> list[str]:
    rank = draft.values[x].ndim
    letters = "abcde"[:rank]
    result = draft.draw(st.permutations(letters))[: draft.draw(st.integers(1, rank))]
    return draft.node("Einsum", x, equation=f"{letters}->{''.join(result)}")


def _gather_own(draft: Draft, x: str) -> list[str]:
    axis = draft.axis(x)
    (indices,) = draft.node("ArgMax", x, axis=axis, keepdims=1)
    return draft.node("GatherElements", x, indices, axis=draft.axis(x))


def _condition(draft: Draft, x: str) -> list[str]:
    """If: by a constant, or by the sum of all that the value holds."""
    if draft.draw(st.booleans()):
        condition = draft.constant(np.array(True))
    else:
        (total,) = draft.node("ReduceSum", x, keepdims=0)
        (condition,) = draft.node("Greater", total, draft.constant(np.array(0, np.float32)))
    info = helper.make_tensor_value_info
    name = f"b{len(draft.nodes)}"
    branches = {
        branch: helper.make_graph(
            [helper.make_node(operation, [x], [f"{name}{branch}"])],
            branch,
            [],
            [info(f"{name}{branch}", TensorProto.FLOAT, None)],
        )
        for branch, operation in (("then_branch", "Relu"), ("else_branch", "Neg"))
    }
    return draft.node("If", condition, **branches)


def _loop(draft: Draft, x: str) -> list[str]:
    """Loop: twice, over a value that is carried."""
    info = helper.make_tensor_value_info
    name = f"l{len(draft.nodes)}"
    inner = draft.draw(st.sampled_from(("Tanh", "Neg", "CumSum")))
    more = [draft.constant(np.array(draft.axis(x), np.int64))] if inner == "CumSum" else []
    body = helper.make_graph(
        [
            helper.make_node("Identity", [f"{name}go"], [f"{name}on"]),
            helper.make_node(inner, [f"{name}in", *more], [f"{name}out"]),
        ],
        "body",
        [
            info(f"{name}i", TensorProto.INT64, []),
            info(f"{name}go", TensorProto.BOOL, []),
            info(f"{name}in", TensorProto.FLOAT, None),
        ],
        [info(f"{name}on", TensorProto.BOOL, []), info(f"{name}out", TensorProto.FLOAT, None)],
    )
    return draft.node(
        "Loop", draft.constant(np.array(2, np.int64)), draft.constant(np.array(True)), x, body=body
    )


def _recurrent(draft: Draft, x: str) -> list[str]:
    value = draft.values[x]
    alone = draft.alone.get(x)
    if value.ndim != 3 or alone is None or not alone.size:  # ONNX Runtime aborts without a step
        return _unary(draft, x)
    outputs = draft.node(
        "GRU", x, draft.weights(1, 6, value.shape[2]), draft.weights(1, 6, 2), outputs=2, hidden_size=2
    )
    return outputs[draft.draw(st.integers(0, 1)) :][:1]


def _numbered(draft: Draft, x: str) -> list[str]:
    """The numbers of the rows, or of another axis, used to pick."""
    axis = draft.axis(x)
    (shape,) = draft.node("Shape", x)
    (size,) = draft.node("Gather", shape, draft.constant(np.array(axis, np.int64)))
    zero, one = draft.constant(np.array(0, np.int64)), draft.constant(np.array(1, np.int64))
    (numbers,) = draft.node("Range", zero, size, one)
    kind = draft.draw(st.integers(0, 4))
    if kind == 0:
        return draft.node("Gather", x, numbers, axis=draft.axis(x))
    if kind == 1:
        (halved,) = draft.node("Div", numbers, draft.constant(np.array(2, np.int64)))
        return draft.node("Gather", x, halved, axis=draft.axis(x))
    if kind == 2:
        (floats,) = draft.node("Cast", numbers, to=TensorProto.FLOAT)
        return draft.node("Unsqueeze", floats, draft.integers(1))
    (flat,) = draft.node("Flatten", x, axis=1)
    (best,) = draft.node("ArgMax", flat, axis=1, keepdims=1)
    (column,) = draft.node("Unsqueeze", numbers, draft.integers(1))
    if kind == 3:
        (sizes,) = draft.node("Shape", best)
        (column,) = draft.node("Expand", column, sizes)
    positions = [column, best] if draft.draw(st.integers(0, 3)) else [best, column]
    (where,) = draft.node("Concat", *positions, axis=1)
    return draft.node("GatherND", flat, where)


def _blocks(draft: Draft, x: str) -> list[str]:
    """Rows joined with rows, and the blocks taken apart again."""
    (joined,) = draft.node("Concat", x, draft.pick(draft.values[x].ndim, draft.values[x].ndim) or x, axis=0)
    kind = draft.draw(st.integers(0, 2))
    if kind == 0:
        return draft.node("Reshape", joined, draft.integers(2, -1))
    if kind == 1:
        (apart,) = draft.node("Reshape", joined, draft.integers(2, -1, *draft.values[x].shape[1:]))
        return draft.node("ReduceSum", apart, draft.integers(0), keepdims=0)
    return draft.node("Reshape", joined, draft.integers(-1, 2 * draft.values[x].shape[-1]))


def _features(draft: Draft, x: str) -> list[str]:
    """Features picked by indices of each row, or by shared ones."""
    if draft.draw(st.booleans()):
        size = draft.values[x].shape[-1]
        indices = [draft.draw(st.integers(0, size - 1)) for _ in range(2)]
        return draft.node("ArrayFeatureExtractor", x, draft.integers(*indices), domain="ai.onnx.ml")
    (best,) = draft.node("ArgMax", x, axis=draft.axis(x), keepdims=draft.draw(st.integers(0, 1)))
    table = draft.weights(4) if draft.draw(st.booleans()) else draft.weights(1, 4)
    return draft.node("ArrayFeatureExtractor", table, best, domain="ai.onnx.ml")


def _write(draft: Draft, x: str) -> list[str]:
    """The first of one axis written over by something that is computed of it."""
    axis = draft.axis(x)
    rank = draft.values[x].ndim
    order = [axis, *(at for at in range(rank) if at != axis)]
    (turned,) = draft.node("Transpose", x, perm=order)
    (first,) = draft.node("Gather", turned, draft.integers(0), axis=0)
    (changed,) = draft.node("Tanh", first)
    (written,) = draft.node("ScatterND", turned, draft.constant(np.array([[0]], np.int64)), changed)
    return draft.node("Transpose", written, perm=[order.index(at) for at in range(rank)])


def _transform(draft: Draft, x: str) -> list[str]:
    """The Fourier transform along an axis."""
    (wide,) = draft.node("Unsqueeze", x, draft.integers(-1))
    axis = draft.constant(np.array(draft.axis(x), np.int64))
    (result,) = draft.node("DFT", wide, "", axis)
    return draft.node("ReduceSum", result, draft.integers(-1), keepdims=0)


GROWING: tuple[Grow, ...] = (
    _unary,
    _binary,
    _binary,
    _reduce,
    _softmax,
    _cumulate,
    _transpose,
    _flatten,
    _reshape,
    _reshape,
    _split_axis,
    _squeeze,
    _slice,
    _gather,
    _embed,
    _concat,
    _matmul,
    _norm,
    _convolve,
    _sort,
    _argmax,
    _where,
    _expand,
    _tile,
    _pad,
    _quantise,
    _einsum,
    _gather_own,
    _condition,
    _loop,
    _recurrent,
    _numbered,
    _blocks,
    _features,
    _write,
    _transform,
)
SHAPES = ((3, 4), (2, 3), (4,), (3, 2, 2), (1, 3), (3, 3))
"""The shapes of a row: some have as many elements on an axis as there are rows."""


def needed_nodes(draft: Draft, outputs: list[str]) -> list[onnx.NodeProto]:
    """Return the nodes that outputs depend on: a runtime may fail in others, or leave them out."""
    wanted, kept = set(outputs), []
    for node in reversed(draft.nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
            wanted |= {name for each in node.attribute for inner in each.g.node for name in inner.input}
    return kept[::-1]


def session_of(draft: Draft, outputs: list[str]) -> tuple[onnx.ModelProto, ort.InferenceSession]:
    """Return the model with these outputs, and a session of it."""
    row = draft.values["x"].shape[1:]
    graph = helper.make_graph(
        needed_nodes(draft, outputs),
        "random",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", *row])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        draft.constants,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return model, ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@st.composite
def random_models(draw: Callable[[Any], Any]) -> tuple[onnx.ModelProto, ort.InferenceSession, Array]:
    """A model of a few operations, a session of it, and rows that it runs together."""
    seed, row = draw(st.integers(0, 999)), draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(seed)
    # Each row in a range of its own, so that whatever rows share shows.
    ranges = np.array([1.0, 40.0, 0.02]).reshape(ROWS, *[1] * len(row))
    x = (rng.normal(size=(ROWS, *row)) * ranges).astype(np.float32)
    draft = Draft(draw, values={"x": x}, alone={"x": x[:1]})
    last = "x"
    for _ in range(draw(st.integers(1, 6))):
        source = draft.pick() if draw(st.integers(0, 2)) == 0 else last
        if source is None or source not in draft.values or not draft.values[source].ndim:
            continue
        before = len(draft.nodes), len(draft.constants)
        try:
            made = draw(st.sampled_from(GROWING))(draft, source)
            _, session = session_of(draft, made)
            results = session.run(None, {"x": x})
        except Exception:  # noqa: BLE001 - an operation that cannot run on this value is left out
            del draft.nodes[before[0] :], draft.constants[before[1] :]
            continue
        if sum(result.size for result in results) > 2000:
            del draft.nodes[before[0] :], draft.constants[before[1] :]
            continue
        draft.values.update(zip(made, results, strict=True))
        with contextlib.suppress(Exception):
            draft.alone.update(zip(made, session.run(None, {"x": x[:1]}), strict=True))
        last = made[0]
    if last == "x":
        (last,) = draft.node("Identity", "x")
    return (*session_of(draft, [last]), x)


def rows_are_independent(session: ort.InferenceSession, x: Array) -> bool:
    """Whether each row is answered alone as it is in company, whatever the company."""
    try:
        alone = [session.run(None, {"x": x[row : row + 1]})[0] for row in range(len(x))]
    except Exception:  # noqa: BLE001 - a model that cannot run a single row has no answer to compare with
        return False
    orders = ([0, 1, 2], [2, 1], [1, 0, 0], [0, 2])
    for order in orders:
        try:
            together = session.run(None, {"x": x[order]})[0]
        except Exception:  # noqa: BLE001 - a row that fails in company is answered otherwise than alone
            return False
        for index, row in enumerate(order):
            mine = alone[row]
            if mine.ndim < 1 or len(mine) != 1 or together.shape != (len(order), *mine.shape[1:]):
                return False
            if not np.allclose(together[index], mine[0], rtol=1e-3, atol=1e-5, equal_nan=True):
                return False
    return True
