"""Operations that pick elements by their position, and those whose definition mixes rows."""

from __future__ import annotations

from typing import Final

from inferpool.backends.row_analysis.dims import A_ROW, ONE
from inferpool.backends.row_analysis.elementwise import combine
from inferpool.backends.row_analysis.step import normal_axis
from inferpool.backends.row_analysis.values import Kind, Value, like, mixed, rowed, unknown
from inferpool.backends.torch.row_analysis.call import Call, CallRule


def embedding(call: Call) -> list[Value]:
    """Embedding: indices looked up in a table."""
    return call.onnx("Gather", call.value("weight"), call.value("indices"), axis=0)


def embedding_bag(call: Call) -> list[Value]:
    """Embedding bags: of lists of one length; bags that offsets mark lie in all rows' indices."""
    indices, offsets = call.value("indices"), call.value("offsets")
    weight = call.value("weight")
    assert indices is not None
    assert offsets is not None
    if weight is None or weight.kind is not Kind.SHARED:
        return call.every(unknown(f"{call.label}: its table depends on the rows"))
    if indices.kind is Kind.SHARED and offsets.kind is Kind.SHARED:
        return call.without_rows()
    alone = call.arguments.get("per_sample_weights") is None and not call.flag("include_last_offset")
    if (
        indices.kind is Kind.ROWED
        and offsets.numbering is not None
        and offsets.numbering == indices.inner
        and indices.outer == ONE
        and indices.rank == 1
        and alone
        and weight.shape is not None
    ):
        pooled = rowed((ONE, weight.shape[1]), 0)
        return [pooled, *[unknown(f"{call.label}: only its first output has rows")] * (len(call.outputs) - 1)]
    return call.every(mixed(f"{call.label} pools indices of all rows by their offsets"))


def gather(call: Call) -> list[Value]:
    """Gather: along any axis but that of the rows."""
    return call.onnx("GatherElements", call.value("self"), call.value("index"), axis=call.number("dim"))


def scatter(call: Call) -> list[Value]:
    """Scatter and its kin: along any axis but that of the rows."""
    values = [
        each
        for each in (call.arguments.get(name) for name in ("self", "index", "src", "value"))
        if isinstance(each, Value)
    ]
    if any(value.kind is Kind.COUNTED for value in values):
        return [mixed(f"{call.label} makes data of the number of rows")]
    return call.onnx("ScatterElements", *values, axis=call.number("dim"))


def index_select(call: Call) -> list[Value]:
    """index_select: along one axis, by shared indices."""
    return call.onnx("Gather", call.value("self"), call.value("index"), axis=call.number("dim"))


def index_write(call: Call) -> list[Value]:
    """index_add, index_copy, index_fill: at shared indices of any axis but that of the rows."""
    value, index = call.value("self"), call.value("index")
    source = call.value("source") or call.value("value")
    assert value is not None
    if any(each is not None and each.kind is Kind.COUNTED for each in (value, index, source)):
        return [mixed(f"{call.label} makes data of the number of rows")]
    if index is None or index.kind is not Kind.SHARED or source is None:
        return [unknown(f"{call.label}: its indices depend on the rows")]
    if value.kind is Kind.SHARED and source.kind is Kind.SHARED:
        return call.without_rows()
    if value.kind is not Kind.ROWED or value.shape is None:
        return [unknown(f"{call.label}: only some of its inputs have rows")]
    if normal_axis(call.number("dim"), len(value.shape)) == value.axis:
        return [mixed(f"{call.label} writes to rows by their position")]
    if source.kind is Kind.ROWED and (source.axis != value.axis or not source.lies_as(value)):
        return [unknown(f"{call.label} combines rows that are arranged differently")]
    if source.kind is Kind.SHARED and source.rank != 0:
        return [unknown(f"{call.label}: a value of a fixed size meets the rows")]
    return [value]


def scatter_slice(call: Call) -> list[Value]:
    """slice_scatter and select_scatter: to any axis but that of the rows."""
    value, source = call.value("self"), call.value("src")
    assert value is not None
    assert source is not None
    if any(each.kind is Kind.COUNTED for each in call.tensors()):
        return [mixed(f"{call.label} writes at a place that depends on the rows")]
    if value.kind is Kind.SHARED and source.kind is Kind.SHARED:
        return call.without_rows()
    if value.kind is not Kind.ROWED or value.shape is None:
        return [unknown(f"{call.label}: only some of its inputs have rows")]
    axis = normal_axis(call.number("dim", 0), len(value.shape))
    if axis == value.axis:
        return [mixed(f"{call.label} writes to rows by their position")]
    at = value.axis - (axis < value.axis) if call.operation.startswith("select") else value.axis
    if source.kind is not Kind.ROWED or source.axis != at or not source.lies_as(value):
        return [unknown(f"{call.label} combines rows that are arranged differently")]
    return [value]


def index(call: Call) -> list[Value]:
    """Indexing by tensors, as NumPy has it."""
    value = call.value("self")
    assert value is not None
    given = call.arguments["indices"]
    used = [(axis, each) for axis, each in enumerate(given) if isinstance(each, Value)]
    indices = [each for _, each in used]
    if all(each.kind is Kind.SHARED for each in (value, *indices)):
        return call.without_rows()
    if call.masks is None or "indices" in call.masks:
        if value.kind is Kind.ROWED and all(each.kind is Kind.SHARED for each in indices):
            return _by_shared_mask(call, value, used)
        return [mixed(f"{call.label} keeps as many elements as the rows together have")]
    if value.shape is None or any(each.shape is None for each in indices):
        return [unknown(f"{call.label}: the rank of an input is not known")]
    axes = [axis for axis, _ in used]
    if value.kind is Kind.ROWED and value.axis in axes:
        number = given[value.axis]
        if number.numbering != ONE or value.outer != ONE or value.inner != ONE:
            return [mixed(f"{call.label} picks rows by their position")]
        # The number of each row picks that row: each row is indexed on its own.
        indices = [_own(each) if each is number else each for each in indices]
        if any(each.kind is Kind.COUNTED for each in indices):
            return [mixed(f"{call.label} computes with the number of rows")]
    elif any(each.kind is Kind.COUNTED for each in indices):
        return [mixed(f"{call.label} computes with the number of rows")]
    elif value.kind is Kind.ROWED and any(each.kind is Kind.ROWED for each in indices):
        return [mixed(f"{call.label} picks from all rows by the indices of each")]
    together = combine(call.step(call.operation), indices)
    if not together.is_decided:
        return [together]
    return [_placed(call, value, together, indices, axes)]


def _own(number: Value) -> Value:
    """Return the numbers of the rows as a value in which each row has its own."""
    assert number.shape is not None
    (axis,) = (axis for axis, dim in enumerate(number.shape) if dim == A_ROW)
    return rowed(number.shape, axis)


def _placed(call: Call, value: Value, together: Value, indices: list[Value], axes: list[int]) -> Value:
    """Return what is picked: the axes of the indices replace those that they index, or come first."""
    assert value.shape is not None
    rank = max(each.rank or 0 for each in indices)
    lone = axes == list(range(axes[0], axes[0] + len(axes)))
    at = axes[0] if lone else 0
    rest = [axis for axis in range(len(value.shape)) if axis not in axes]
    shape = call.shape()
    if shape is None:
        if together.shape is None:
            return unknown(f"{call.label}: the rank is not known")
        shape = (
            *(value.shape[axis] for axis in rest[:at]),
            *together.shape,
            *(value.shape[axis] for axis in rest[at:]),
        )
    if together.kind is Kind.ROWED:
        return rowed(shape, at + together.axis, together.outer, together.inner)
    position = rest.index(value.axis)
    return like(value, shape, position if position < at else position + rank)


def _by_shared_mask(call: Call, value: Value, used: list[tuple[int, Value]]) -> list[Value]:
    """Return what masks and indices that all rows share pick from each row."""
    (axis, first), *others = used
    shape = call.shape()
    if others or shape is None or first.rank is None or value.kind is not Kind.ROWED:
        return [unknown(f"{call.label}: which elements it keeps is not known before the model runs")]
    covered = range(axis, axis + first.rank)
    if value.axis in covered:
        return [mixed(f"{call.label} picks rows by their position")]
    return [like(value, shape, value.axis if value.axis < axis else value.axis - first.rank + 1)]


def index_put(call: Call) -> list[Value]:
    """Writing by indices: a number where a mask of each row says, or to places that all rows share."""
    value, written = call.value("self"), call.value("values")
    given = [each for each in call.arguments["indices"] if isinstance(each, Value)]
    assert value is not None
    assert written is not None
    if all(each.kind is Kind.SHARED for each in (value, written, *given)):
        return call.without_rows()
    masked = call.masks is not None and "indices" in call.masks
    single = len(given) == 1 and len(call.arguments["indices"]) == 1 and written.rank == 0
    if masked and single and given[0].rank == value.rank and written.kind is Kind.SHARED:
        return [combine(call.step(call.operation), [value, given[0]])]
    return [unknown(f"{call.label}: where it writes is not known to follow the rows")]


def one_hot(call: Call) -> list[Value]:
    """one_hot: a new axis; without a number of classes it is as wide as the largest of all rows needs."""
    value = call.first()
    if call.number("num_classes", -1) < 0 and value.kind is not Kind.SHARED:
        return [mixed(f"{call.label} is as wide as the largest of all rows")]
    return call.onnx("OneHot", value, call.value("num_classes"), axis=-1)


def nothing(call: Call) -> list[Value]:
    """Checks: they have no result."""
    return call.without_rows()


def to_number(call: Call) -> list[Value]:
    """Item: one number, which is no row's own."""
    value = call.first()
    if value.kind is Kind.ROWED:
        return [mixed(f"{call.label} takes one number from all rows")]
    return [Value(value.kind, (), elements=value.elements, reason=value.reason)]


def packed_sizes(call: Call) -> list[Value]:
    """The size of an axis."""
    value = call.first()
    if value.shape is None:
        return [unknown(f"{call.label}: the rank is not known")]
    size = value.shape[normal_axis(call.number("dim"), len(value.shape))]
    return [Value(Kind.COUNTED if size.row_factors else Kind.SHARED, (), elements=(size,))]


MIXING: Final = {
    "nonzero": "lists the elements of all rows one after another",
    "nonzero_numpy": "lists the elements of all rows one after another",
    "nonzero_static": "lists the elements of all rows one after another",
    "argwhere": "lists the elements of all rows one after another",
    "masked_select": "lists the elements of all rows one after another",
    "masked_scatter": "takes elements one after another, whatever row they are for",
    "take": "picks from the elements of all rows",
    "put": "writes to the elements of all rows",
    "_unique": "compares the elements of all rows",
    "_unique2": "compares the elements of all rows",
    "unique_dim": "compares the elements of all rows",
    "unique_consecutive": "compares the elements of all rows",
    "bincount": "counts the elements of all rows",
    "histc": "counts the elements of all rows",
    "equal": "compares all rows at once",
    "allclose": "compares all rows at once",
    "is_nonzero": "takes one number from all rows",
    "dist": "takes one value over the whole batch",
    "cov": "compares the rows with each other",
    "corrcoef": "compares the rows with each other",
    "cartesian_prod": "combines each row with each",
    "combinations": "combines each row with each",
    "pdist": "compares the rows with each other",
    "_pdist_forward": "compares the rows with each other",
    "addbmm": "sums over the rows",
    "addr": "multiplies each row with each",
    "quantized_decomposed.choose_qparams": "takes one scale for all rows",
    "quantized_decomposed.choose_qparams_symmetric": "takes one scale for all rows",
    "_choose_qparams_per_tensor": "takes one scale for all rows",
    "choose_qparams_optimized": "takes one scale for all rows",
    "quantize_per_tensor_dynamic": "takes one scale for all rows",
    "quantized.linear_dynamic": "takes one scale for all rows",
    "quantized.linear_relu_dynamic": "takes one scale for all rows",
    "torchvision.nms": "lists the boxes of all rows one after another",
    "torchvision.roi_align": "takes the boxes of all rows in one list",
    "torchvision.roi_pool": "takes the boxes of all rows in one list",
    "_pack_padded_sequence": "sorts the rows by their lengths",
    "_pad_packed_sequence": "makes every row as long as the longest",
    "pad_sequence": "makes every row as long as the longest",
}
"""The effect of each operation on rows. The name of the operation and this text make a sentence."""


def mixing(call: Call) -> list[Value]:
    """The operation mixes rows if its inputs have any."""
    if all(value.kind is Kind.SHARED for value in call.tensors()):
        return call.without_rows()
    name = call.operation
    return call.every(mixed(f"{call.label} {MIXING[name]}"))


RULES: Final[dict[str, CallRule]] = {
    "embedding": embedding,
    **dict.fromkeys(("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only"), embedding_bag),
    "gather": gather,
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), scatter),
    "index_select": index_select,
    **dict.fromkeys(("index_add", "index_copy", "index_fill"), index_write),
    **dict.fromkeys(("slice_scatter", "select_scatter"), scatter_slice),
    **dict.fromkeys(("index", "_unsafe_index"), index),
    **dict.fromkeys(("index_put", "_unsafe_index_put", "_index_put_impl"), index_put),
    "one_hot": one_hot,
    **dict.fromkeys(("item", "_local_scalar_dense"), to_number),
    **dict.fromkeys(MIXING, mixing),
}
