"""Layers: products of matrices, convolution, pooling, normalisation, attention, recurrent layers."""

from __future__ import annotations

from typing import Final

from inferpool.backends.row_analysis.dims import A_ROW, ONE
from inferpool.backends.row_analysis.elementwise import combine
from inferpool.backends.row_analysis.fixed_axes import Axes, by_axes
from inferpool.backends.row_analysis.matrix import product_of
from inferpool.backends.row_analysis.values import Kind, Shape, Value, like, mixed, rowed, shared, unknown
from inferpool.backends.torch.row_analysis.call import Call, CallRule


def _turned(value: Value) -> Value:
    """Return a value with its last two axes in the other order."""
    if value.shape is None or len(value.shape) < 2:
        return value
    rank = len(value.shape)
    order = [*range(rank - 2), rank - 1, rank - 2]
    shape = tuple(value.shape[axis] for axis in order)
    return like(value, shape, order.index(value.axis) if value.kind is Kind.ROWED else None)


def _plus(call: Call, value: Value, *added: Value | None) -> Value:
    terms = [each for each in added if each is not None]
    return combine(call.step("Add"), [value, *terms]) if terms and value.is_decided else value


def _operands(call: Call) -> list[Value]:
    """Return the two matrices of a product, whatever the operation calls them."""
    for names in (("batch1", "batch2"), ("mat1", "mat2"), ("mat", "vec"), ("self", "mat2"), ("self", "vec")):
        pair = [call.arguments.get(name) for name in names]
        if all(isinstance(each, Value) for each in pair):
            return [each for each in pair if each is not None]
    left, right = call.value("self"), call.value("other") or call.value("tensor") or call.value("vec2")
    if left is None or right is None:
        raise ValueError("an operand is left out")
    return [left, right]


def product(call: Call) -> list[Value]:
    """Matmul, mm, bmm, …, with or without a sum."""
    left, right = _operands(call)
    result = product_of(call.step("MatMul"), left, right)
    if call.operation.startswith("add") or call.operation == "baddbmm":
        return [_plus(call, result, call.value("self"))]
    return [result]


def linear(call: Call) -> list[Value]:
    """Linear: the weights lie with the outputs first."""
    value, weight = call.value("input"), call.value("weight")
    assert value is not None
    assert weight is not None
    result = product_of(call.step("MatMul"), value, _turned(weight))
    return [_plus(call, result, call.value("bias"))]


def distances(call: Call) -> list[Value]:
    """Cdist: between the rows of two matrices."""
    left, right = call.value("x1"), call.value("x2")
    assert left is not None
    assert right is not None
    return [product_of(call.step("MatMul"), left, _turned(right))]


def einsum(call: Call) -> list[Value]:
    """Einsum, with an output that may be left out."""
    equation = str(call.arguments["equation"]).replace(" ", "")
    if "->" not in equation:
        letters = sorted(letter for letter in set(equation) - {","} if equation.count(letter) == 1)
        equation = f"{equation}->{''.join(letters)}"
    return call.onnx("Einsum", *call.values("tensors"), equation=equation)


def attention(call: Call) -> list[Value]:
    """Scaled dot product attention."""
    query, key, value = (call.value(name) for name in ("query", "key", "value"))
    mask = call.value("attn_mask") or call.value("attn_bias")
    if call.arguments.get("dropout_p"):
        return call.every(unknown(f"{call.label} drops elements at random"))
    assert query is not None
    assert key is not None
    assert value is not None
    step = call.step("MatMul")
    scores = _plus(call, product_of(step, query, _turned(key)), mask)
    if not scores.is_decided:
        return call.every(scores)
    if scores.kind is Kind.ROWED and call.flag("is_causal") and scores.axis == (scores.rank or 0) - 2:
        return call.every(mixed(f"{call.label} lets each row attend to the rows before"))
    result = product_of(step, scores, value)
    if result.kind is not Kind.ROWED or scores.shape is None:
        return call.every(result)
    return [result, *[like(result, scores.shape[:-1])] * (len(call.outputs) - 1)]


def _batched(call: Call, rank: int, *names: str, shared_too: tuple[int, ...] = ()) -> list[Value]:
    """Return the outputs of an operation that has its batch on the first axis of the arguments `names`.

    All other tensors must be shared, and the first argument must have `rank` axes.
    """
    inputs = [call.value(name) for name in names]
    for name, argument in call.arguments.items():
        if name in names:
            continue
        others = argument if isinstance(argument, (list, tuple)) else [argument]
        if any(isinstance(each, Value) and each.kind is not Kind.SHARED for each in others):
            if name == "N":  # the number of rows itself
                continue
            return call.every(unknown(f"{call.label}: its argument {name} depends on the rows"))
    first = inputs[0]
    if first is not None and first.kind is Kind.ROWED and first.rank != rank:
        return call.every(unknown(f"{call.label}: an input of {first.rank} axes is taken for one picture"))
    axes = Axes(
        dict.fromkeys(range(len(names)), 0),
        dict.fromkeys(range(len(call.outputs)), 0),
        frozenset(shared_too),
        least_rank=rank,
    )
    return by_axes(call.step(call.operation, *inputs, rank=rank), axes)


def convolution(call: Call) -> list[Value]:
    """Convolutions: the weights have as many axes as the input with its batch."""
    weight = call.value("weight")
    name = "input" if "input" in call.arguments else "self"
    if weight is None or weight.rank is None:
        return call.every(unknown(f"{call.label}: the rank of its weights is not known"))
    return _batched(call, weight.rank, name)


def spatial(rank: int) -> CallRule:
    """Return the rule of pooling and resizing with inputs of `rank` axes, batch and channels included."""

    def rule(call: Call) -> list[Value]:
        return _batched(call, rank, "input" if "input" in call.arguments else "self")

    return rule


def shuffle(call: Call) -> list[Value]:
    """Pixel shuffle: of the last three axes."""
    value = call.first()
    if value.kind is Kind.ROWED and (value.shape is None or value.axis >= len(value.shape) - 3):
        return [unknown(f"{call.label}: the rows lie on an axis of the picture")]
    shape = call.shape()
    if value.kind is Kind.SHARED:
        return call.without_rows()
    return [like(value, shape if shape is not None else _fresh(call, value))]


def _fresh(call: Call, value: Value) -> Shape:
    assert value.shape is not None
    last = len(value.shape) - 3
    return tuple(call.fresh(axis) if axis >= last else dim for axis, dim in enumerate(value.shape))


def sampling(call: Call) -> list[Value]:
    """Grid sampling: a grid for each picture."""
    value = call.value("input")
    return _batched(call, (value.rank or 4) if value is not None else 4, "input", "grid")


def grids(call: Call) -> list[Value]:
    """affine_grid_generator: a grid for each matrix."""
    value = call.value("theta")
    assert value is not None
    if value.kind is not Kind.ROWED or value.axis:
        return [shared(call.shape()) if value.kind is Kind.SHARED else unknown(f"{call.label}: no batch")]
    shape = call.shape()
    return [like(value, shape) if shape is not None else unknown(f"{call.label}: the rank is not known")]


def layer_norm(call: Call) -> list[Value]:
    """Layer and RMS normalisation: over the last axes."""
    value = call.first()
    axes = call.arguments.get("normalized_shape")
    if axes is None:
        return call.every(unknown(f"{call.label}: over which axes is not known"))
    weights = [call.value("weight"), call.value("bias")]
    return call.onnx("LayerNormalization", value, *weights, axis=-len(axes))


def group_norm(call: Call) -> list[Value]:
    """Group normalisation: over groups of channels of each row."""
    value = call.first()
    name = "input" if "input" in call.arguments else "self"
    if "N" in call.arguments and call.size_list("N") != (A_ROW,) and value.kind is Kind.ROWED:
        return call.every(unknown(f"{call.label} takes another number for the number of rows"))
    results = _batched(call, value.rank or 2, name)
    if value.kind is Kind.ROWED and (value.rank or 0) < 2:
        return call.every(unknown(f"{call.label}: its input has no channels"))
    return results


def instance_norm(call: Call) -> list[Value]:
    """Instance normalisation: over each channel of each row."""
    if call.arguments.get("running_mean") is not None and call.flag("use_input_stats", default=True):
        return call.every(mixed(f"{call.label} changes the state of the model with each batch"))
    return group_norm(call)


def batch_norm(call: Call) -> list[Value]:
    """Batch normalisation: by learned statistics, or by those of the batch, which mixes its rows."""
    value = call.first()
    training = call.flag("training", default="no_training" not in call.operation)
    if "running_mean" not in call.arguments or call.arguments["running_mean"] is None:
        training = True
    if value.kind is Kind.SHARED:
        return call.without_rows()
    scales = [call.value(name) for name in ("weight", "bias", "running_mean", "running_var")]
    if training and value.kind is Kind.ROWED and value.axis == 1:
        return _each_channel(call, value, scales)
    weights = [each or shared() for each in scales]
    return call.onnx("BatchNormalization", value, *weights, training_mode=int(training))


def _each_channel(call: Call, value: Value, scales: list[Value | None]) -> list[Value]:
    """Normalise each channel by itself: rows that were made channels stay apart."""
    given = [each for each in scales[:2] if each is not None]
    if any(each is not None for each in scales[2:]):
        return call.every(mixed(f"{call.label} changes the state of the model with each batch"))
    if any(each.kind is not Kind.ROWED or each.rank != 1 or not each.lies_as(value) for each in given):
        return call.every(unknown(f"{call.label}: its weights do not follow the rows"))
    statistics = rowed((ONE,), 0, value.outer, value.inner)
    return [value, *[statistics] * (len(call.outputs) - 1)]


def recurrent(call: Call) -> list[Value]:
    """LSTM, GRU, RNN: the batch is the second axis, or the first with `batch_first`; of states the second."""
    value = call.value("input")
    if "batch_sizes" in call.arguments or value is None:
        return call.every(unknown(f"{call.label}: its rows are packed by their lengths"))
    if call.flag("train") and call.arguments.get("dropout"):
        return call.every(unknown(f"{call.label} drops elements at random"))
    if any(each.kind is not Kind.SHARED for each in call.values("params")):
        return call.every(unknown(f"{call.label}: its weights depend on the rows"))
    hidden = call.arguments["hx"]
    states = list(hidden) if isinstance(hidden, (list, tuple)) else [hidden]
    batch = 0 if call.flag("batch_first") else 1
    axes = Axes(
        {0: batch, **{1 + index: 1 for index in range(len(states))}},
        {0: batch, **dict.fromkeys(range(1, len(call.outputs)), 1)},
        least_rank=3,
    )
    return by_axes(call.step(call.operation, value, *states, rank=3), axes)


def cell(call: Call) -> list[Value]:
    """One step of a recurrent layer: the batch is the first axis of the input and of the states."""
    hidden = call.arguments["hx"]
    states = list(hidden) if isinstance(hidden, (list, tuple)) else [hidden]
    weights = [call.value(name) for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    if any(each is not None and each.kind is not Kind.SHARED for each in weights):
        return call.every(unknown(f"{call.label}: its weights depend on the rows"))
    axes = Axes(
        dict.fromkeys(range(1 + len(states)), 0), dict.fromkeys(range(len(call.outputs)), 0), least_rank=2
    )
    return by_axes(call.step(call.operation, call.value("input"), *states, rank=2), axes)


def _matrix_of_vectors(call: Call) -> list[Value]:
    """Outer product of two vectors."""
    left, right = call.value("self"), call.value("vec2") or call.value("other")
    assert left is not None
    assert right is not None
    if left.shape is None or right.shape is None:
        return [unknown(f"{call.label}: the rank is not known")]
    column, row = like(left, (*left.shape, ONE)), like(right, (ONE, *right.shape), right.axis + 1)
    return [product_of(call.step("MatMul"), column, row)]


_SPATIAL: Final = {
    3: ("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d", "max_pool1d_with_indices",
        "upsample_nearest1d", "upsample_linear1d", "_upsample_nearest_exact1d"),
    4: ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d",
        "max_pool2d_with_indices", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
        "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "im2col",
        "fractional_max_pool2d"),
    5: ("max_pool3d", "avg_pool3d", "adaptive_avg_pool3d", "_adaptive_avg_pool3d", "adaptive_max_pool3d",
        "max_pool3d_with_indices", "upsample_nearest3d", "upsample_trilinear3d", "_upsample_nearest_exact3d"),
}  # fmt: skip

RULES: Final[dict[str, CallRule]] = {
    **dict.fromkeys(
        ("matmul", "mm", "bmm", "mv", "dot", "vdot", "addmm", "addmv", "baddbmm"), product
    ),
    **dict.fromkeys(("outer", "ger"), _matrix_of_vectors),
    "linear": linear,
    "cdist": distances,
    "_cdist_forward": distances,
    "einsum": einsum,
    **dict.fromkeys(
        ("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu",
         "_scaled_dot_product_attention_math", "_scaled_dot_product_attention_math_for_mps"),
        attention,
    ),
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
         "convolution", "_convolution", "mkldnn_convolution", "convolution_overrideable",
         "_convolution_mode"),
        convolution,
    ),
    **{name: spatial(rank) for rank, names in _SPATIAL.items() for name in names},
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), shuffle),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), group_norm),
    **dict.fromkeys(("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), sampling),
    "affine_grid_generator": grids,
    **dict.fromkeys(("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"), layer_norm),
    **dict.fromkeys(("group_norm", "native_group_norm"), group_norm),
    "instance_norm": instance_norm,
    **dict.fromkeys(
        ("batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training",
         "_native_batch_norm_legit", "_native_batch_norm_legit_functional", "cudnn_batch_norm",
         "_batch_norm_no_update",
         "_batch_norm_with_update"),
        batch_norm,
    ),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), cell),
}  # fmt: skip
