"""Operations that arrange elements anew, and those that make tensors of a given shape."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from inferpool.backends.row_analysis.arrange import reshape_to
from inferpool.backends.row_analysis.dims import ONE, Dim, product
from inferpool.backends.row_analysis.step import normal_axis
from inferpool.backends.row_analysis.values import Kind, Value, integers, like, mixed, rowed, unknown
from inferpool.backends.torch.row_analysis.call import Call, CallRule


def reshape(call: Call) -> list[Value]:
    """View, reshape and their kin: to the shape that is known, or that the arguments say."""
    value = call.first()
    shape = call.shape()
    if value.kind is Kind.COUNTED:
        return [mixed(f"{call.label} makes data of the number of rows")]
    if value.kind is Kind.SHARED:
        return call.without_rows()
    if shape is None:
        name = "size" if "size" in call.arguments else "shape"
        return call.onnx("Reshape", value, call.target(name), allowzero=1)
    return [reshape_to(call.step(call.operation), value, shape)]


def flatten(call: Call) -> list[Value]:
    """Flatten: several axes become one."""
    value = call.first()
    if call.shape() is not None or value.kind is Kind.SHARED or value.shape is None:
        return reshape(call)
    rank = len(value.shape)
    first = normal_axis(call.number("start_dim", 0), rank)
    last = normal_axis(call.number("end_dim", -1), rank) + 1
    shape = (*value.shape[:first], product(value.shape[first:last]), *value.shape[last:])
    return [reshape_to(call.step(call.operation), value, shape)]


def unflatten(call: Call) -> list[Value]:
    """Unflatten: one axis becomes several."""
    value = call.first()
    if call.shape() is not None or value.kind is Kind.SHARED or value.shape is None:
        return reshape(call)
    axis = normal_axis(call.number("dim"), len(value.shape))
    sizes = [*value.shape[:axis], *call.size_list("sizes"), *value.shape[axis + 1 :]]
    target = integers(tuple(sizes), (Dim(len(sizes)),))
    return call.onnx("Reshape", value, target, allowzero=1)


def squeeze(call: Call) -> list[Value]:
    """Squeeze: axes go if their size is 1."""
    value = call.first()
    axes = call.numbers("dim")
    if value.kind is Kind.SHARED:
        return call.without_rows()
    if axes is None or value.shape is None:
        return call.onnx("Squeeze", value)
    rank = len(value.shape)
    gone = {normal_axis(axis, rank) for axis in axes}
    if value.axis in gone:
        return [mixed(f"{call.label}: a single row loses its row axis and several rows do not")]
    if any(not value.shape[axis].is_known for axis in gone):
        return [unknown(f"{call.label}: whether a size is 1 is not known before the model runs")]
    gone = {axis for axis in gone if value.shape[axis] == ONE}
    shape = tuple(dim for axis, dim in enumerate(value.shape) if axis not in gone)
    return [like(value, shape, value.axis - sum(axis < value.axis for axis in gone))]


def unsqueeze(call: Call) -> list[Value]:
    """Unsqueeze: a new axis of size 1."""
    value = call.first()
    if value.numbering is not None and value.shape is not None:
        axis = normal_axis(call.number("dim"), len(value.shape) + 1)
        return [replace(value, shape=(*value.shape[:axis], ONE, *value.shape[axis:]))]
    return call.onnx("Unsqueeze", call.first(), axes=[call.number("dim")])


def permute(call: Call) -> list[Value]:
    """Permute: the axes in another order."""
    value = call.first()
    order = call.numbers("dims")
    assert order is not None
    rank = len(order)
    return call.onnx("Transpose", value, perm=[normal_axis(axis, rank) for axis in order])


def transpose(call: Call) -> list[Value]:
    """Transpose: two axes change places."""
    value = call.first()
    if value.shape is None:
        return call.without_rows() if value.kind is Kind.SHARED else [unknown(f"{call.label}: no rank")]
    rank = len(value.shape)
    order = list(range(rank))
    names = ("axis0", "axis1") if "axis0" in call.arguments else ("dim0", "dim1")
    if call.operation in ("t", "numpy_T"):
        order.reverse()
    else:
        mutual = call.operation in ("mT", "mH", "adjoint")
        left, right = (-2, -1) if mutual else (call.number(names[0]), call.number(names[1]))
        left, right = normal_axis(left, rank), normal_axis(right, rank)
        order[left], order[right] = right, left
    return call.onnx("Transpose", value, perm=order)


def move(call: Call) -> list[Value]:
    """Movedim: axes go to other places, the others keep their order."""
    value = call.first()
    sources, targets = call.numbers("source"), call.numbers("destination")
    if value.shape is None or sources is None or targets is None:
        return [unknown(f"{call.label}: the rank is not known")]
    rank = len(value.shape)
    moved = {
        normal_axis(target, rank): normal_axis(source, rank)
        for source, target in zip(sources, targets, strict=True)
    }
    rest = iter(axis for axis in range(rank) if axis not in moved.values())
    return call.onnx(
        "Transpose", value, perm=[moved[at] if at in moved else next(rest) for at in range(rank)]
    )


def expand(call: Call) -> list[Value]:
    """Expand: values that all rows share may be given rows, each with the same content."""
    value = call.first()
    if call.operation.endswith("_as") and call.shape() is None:
        other = call.value("other")
        if other is None or other.shape is None:
            return [unknown(f"{call.label}: the new shape is not known before the model runs")]
        return call.onnx("Expand", value, integers(other.shape, (Dim(len(other.shape)),)))
    wanted = call.target("size")
    if call.shape() is None and wanted.elements is not None:  # -1 keeps a size, and so does 1
        kept = tuple(ONE if each == Dim(-1) else each for each in wanted.elements)
        wanted = integers(kept, (Dim(len(kept)),))
    return call.onnx("Expand", value, wanted)


def repeat(call: Call) -> list[Value]:
    """Repeat and tile: new axes come in front, then each axis is repeated."""
    value = call.first()
    times = call.size_list("repeats" if "repeats" in call.arguments else "dims")
    if value.shape is None:
        return call.without_rows() if value.kind is Kind.SHARED else [unknown(f"{call.label}: no rank")]
    new = len(times) - len(value.shape)
    if new < 0:
        times = (*[ONE] * -new, *times)
    elif new:
        shape = (*[ONE] * new, *value.shape)
        value = like(value, shape, value.axis + new if value.kind is Kind.ROWED else None)
    return call.onnx("Tile", value, integers(times, (Dim(len(times)),)))


def repeat_interleave(call: Call) -> list[Value]:
    """Repeat_interleave by one number: each element of an axis several times in a row."""
    value = call.first()
    if value.kind is Kind.SHARED:
        return call.without_rows()
    if call.value("repeats") is None or call.arguments.get("dim") is None or value.shape is None:
        return [unknown(f"{call.label}: how often each element is repeated is not known")]
    times = call.number("repeats")
    axis = normal_axis(call.number("dim"), len(value.shape))
    if axis == value.axis:
        return [rowed(value.shape, axis, value.outer, value.inner.times(Dim(times)))]
    size = value.shape[axis].times(Dim(times))
    return [like(value, (*value.shape[:axis], size, *value.shape[axis + 1 :]))]


def join(call: Call) -> list[Value]:
    """Cat: along any axis but that of the rows."""
    return call.onnx("Concat", *call.values("tensors"), axis=call.number("dim", 0))


def stack(call: Call) -> list[Value]:
    """Stack: along a new axis."""
    values = call.values("tensors")
    if all(value.kind is Kind.SHARED for value in values):
        return call.without_rows()
    if values[0].shape is None:
        return [unknown(f"{call.label}: the rank is not known")]
    axis = normal_axis(call.number("dim", 0), len(values[0].shape) + 1)
    wider = []
    for value in values:
        if value.shape is None:
            return [unknown(f"{call.label}: the rank is not known")]
        shape = (*value.shape[:axis], ONE, *value.shape[axis:])
        wider.append(like(value, shape, value.axis + (axis <= value.axis)))
    return call.onnx("Concat", *wider, axis=axis)


def filled(call: Call) -> list[Value]:
    """Zeros, ones, full: each row gets the same."""
    if any(value.kind is Kind.COUNTED for name, value in _values(call) if name in ("fill_value", "value")):
        return call.every(mixed(f"{call.label} makes data of the number of rows"))
    return call.onnx("ConstantOfShape", call.target("size"))


def _values(call: Call) -> list[tuple[str, Value]]:
    return [(name, each) for name, each in call.arguments.items() if isinstance(each, Value)]


def left_empty(call: Call) -> list[Value]:
    """Empty: the content is whatever the memory had."""
    return call.every(unknown(f"{call.label} leaves its memory as it was"))


def numbering(call: Call) -> list[Value]:
    """Arange: shared, unless it numbers the rows; then only indexing can go on with it."""
    bounds = call.tensors()
    if all(value.kind is Kind.SHARED for value in bounds):
        return call.without_rows()
    start, step = call.arguments.get("start", 0), call.arguments.get("step", 1)
    end = call.size_list("end")[0]
    if start == 0 and isinstance(step, (int, Value)):
        (stride,) = call.size_list("step") if "step" in call.arguments else (ONE,)
        rows = end.over(stride)
        if rows == Dim(1, ("$rows",)):
            return [Value(Kind.COUNTED, (rows,), numbering=stride, reason=f"{call.label} numbers the rows")]
    return [mixed(f"{call.label} numbers the rows, or as many as a row says")]


def scalar(call: Call) -> list[Value]:
    """A tensor of one number; a size stays a size."""
    value = call.value("s")
    assert value is not None
    return [Value(value.kind, (), elements=value.elements, reason=value.reason)]


def without_content(call: Call) -> list[Value]:
    """A constant of its own: eye, linspace, …: shared unless its shape depends on the rows."""
    if all(value.kind is Kind.SHARED for value in call.tensors()):
        return call.without_rows()
    return call.every(mixed(f"{call.label} numbers the rows"))


def meshgrid(call: Call) -> list[Value]:
    """Meshgrid: of values that all rows share."""
    if all(value.kind is Kind.SHARED for value in call.tensors()):
        return call.without_rows()
    return call.every(mixed(f"{call.label} combines each row with each"))


RULES: Final[dict[str, CallRule]] = {
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "_reshape_alias", "view_copy"), reshape
    ),
    "flatten": flatten,
    "unflatten": unflatten,
    **dict.fromkeys(("squeeze", "squeeze_copy"), squeeze),
    **dict.fromkeys(("unsqueeze", "unsqueeze_copy"), unsqueeze),
    **dict.fromkeys(("permute", "permute_copy"), permute),
    **dict.fromkeys(
        ("transpose", "transpose_copy", "t", "t_copy", "numpy_T", "mT", "swapaxes", "swapdims"),
        transpose,
    ),
    "movedim": move,
    "moveaxis": move,
    **dict.fromkeys(("expand", "expand_as", "expand_copy", "broadcast_to"), expand),
    **dict.fromkeys(("repeat", "tile"), repeat),
    "repeat_interleave": repeat_interleave,
    **dict.fromkeys(("cat", "concat", "concatenate"), join),
    "stack": stack,
    "meshgrid": meshgrid,
    **dict.fromkeys(("full", "zeros", "ones", "new_zeros", "new_ones", "new_full"), filled),
    **dict.fromkeys(("empty", "new_empty", "empty_like", "empty_strided", "empty_permuted"), left_empty),
    "arange": numbering,
    "scalar_tensor": scalar,
    **dict.fromkeys(
        ("eye", "linspace", "logspace", "tril_indices", "triu_indices", "hann_window", "hamming_window"),
        without_content,
    ),
}
