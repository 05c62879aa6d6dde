"""Rules of operations that pick elements by their position."""

from __future__ import annotations

from typing import Final

from inferpool.backends.row_analysis.dims import A_ROW, ONE, Dim, product
from inferpool.backends.row_analysis.elementwise import combine
from inferpool.backends.row_analysis.step import Rule, Step, normal_axis
from inferpool.backends.row_analysis.values import (
    Kind,
    Value,
    integers,
    like,
    mixed,
    rowed,
    shared,
    unknown,
)

_BEYOND: Final = 2**31 - 1


def _rows_first(data: Value) -> bool:
    """Whether the first axis of a value has the rows, one by one."""
    return data.kind is Kind.ROWED and (data.axis, data.outer, data.inner) == (0, ONE, ONE)


def gather(step: Step) -> list[Value]:
    """Gather: from a table by the rows' indices, or from each row by shared indices."""
    data, indices = step.required(0), step.required(1)
    if data.elements is not None and indices.constant is not None and indices.constant.ndim <= 1:
        positions = [int(each) for each in indices.constant.reshape(-1)]
        if all(-len(data.elements) <= each < len(data.elements) for each in positions):
            picked = tuple(data.elements[each] for each in positions)
            return [integers(picked, (Dim(len(picked)),) if indices.constant.ndim else ())]
    if indices.numbering == ONE and _rows_first(data) and step.integer("axis", 0) == 0:
        assert data.shape is not None
        assert indices.shape is not None
        return [rowed((*indices.shape, *data.shape[1:]), indices.numbered_axis())]
    if indices.kind is Kind.COUNTED and indices.elements is None and data.kind is not Kind.COUNTED:
        return [unknown(f"{step.label} picks by numbers of rows")]
    if Kind.COUNTED in (data.kind, indices.kind):
        return [mixed(f"{step.label} computes with the number of rows")]
    if data.shape is None or indices.shape is None:
        if data.kind is Kind.SHARED and indices.kind is Kind.SHARED:
            return [shared(step.inferred())]
        return [unknown(f"{step.label}: the rank of an input is not known")]
    axis = normal_axis(step.integer("axis", 0), len(data.shape))
    shape = (*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])
    if data.kind is Kind.SHARED and indices.kind is Kind.SHARED:
        return [shared(step.settled(shape))]
    if indices.kind is Kind.ROWED:
        if data.kind is Kind.ROWED:
            return [mixed(f"{step.label} picks from all rows by the indices of each")]
        return [like(indices, shape, axis + indices.axis)]
    if data.axis == axis:
        return [mixed(f"{step.label} picks rows by their position")]
    return [like(data, shape, data.axis if data.axis < axis else data.axis + len(indices.shape) - 1)]


def gather_elements(step: Step) -> list[Value]:
    """GatherElements: along any axis but that of the rows."""
    data, indices = step.required(0), step.required(1)
    if data.kind is Kind.SHARED and indices.kind is Kind.SHARED:
        return [shared(step.settled(indices.shape))]
    if data.kind is not Kind.ROWED or indices.kind is not Kind.ROWED or data.shape is None:
        return [unknown(f"{step.label}: only one of its inputs has rows")]
    axis = normal_axis(step.integer("axis", 0), len(data.shape))
    if axis in (data.axis, indices.axis):
        return [mixed(f"{step.label} picks from all rows by the indices of each")]
    if data.axis != indices.axis or not data.lies_as(indices):
        return [mixed(f"{step.label} has rows on different axes")]
    return [like(indices)]


def gather_nd(step: Step) -> list[Value]:
    """GatherND: from a table by the rows' indices, or with `batch_dims` from each row by its own."""
    data, indices = step.required(0), step.required(1)
    if data.kind is Kind.SHARED and indices.kind is Kind.SHARED:
        return [shared(step.inferred())]
    if Kind.COUNTED in (data.kind, indices.kind) and not (indices.picks_own and _rows_first(data)):
        return [unknown(f"{step.label} picks by numbers of rows")]
    if data.shape is None or indices.shape is None:
        return [unknown(f"{step.label}: its indices are not known to follow the rows")]
    batch, depth = step.integer("batch_dims", 0), indices.shape[-1]
    if not depth.is_known:
        return [unknown(f"{step.label}: the rank of its output is not known")]
    shape = (*indices.shape[:-1], *data.shape[batch + depth.coefficient :])
    if indices.picks_own:
        if batch:
            return [unknown(f"{step.label} picks by numbers of rows")]
        return [rowed(shape, indices.numbered_axis())]
    if data.kind is Kind.SHARED:
        if batch or indices.axis == len(indices.shape) - 1:
            return [unknown(f"{step.label}: its indices do not follow the rows")]
        return [like(indices, shape)]
    if indices.kind is not Kind.ROWED or data.axis >= batch or data.axis != indices.axis:
        return [mixed(f"{step.label} picks from all rows")]
    return (
        [like(indices, shape)] if data.lies_as(indices) else [unknown(f"{step.label}: arranged differently")]
    )


def scatter_elements(step: Step) -> list[Value]:
    """ScatterElements: along any axis but that of the rows, all inputs with rows."""
    values = step.given()
    if all(value.kind is Kind.SHARED for value in values):
        return [shared(step.inferred())]
    first = values[0]
    if any(value.kind is not Kind.ROWED or value.shape is None for value in values):
        return [unknown(f"{step.label}: only some of its inputs have rows")]
    assert first.shape is not None
    axis = normal_axis(step.integer("axis", 0), len(first.shape))
    if any(value.axis == axis for value in values):
        return [mixed(f"{step.label} writes to rows by their position")]
    if any(value.axis != first.axis or not value.lies_as(first) for value in values):
        return [mixed(f"{step.label} has rows on different axes")]
    return [first]


def scatter_nd(step: Step) -> list[Value]:
    """ScatterND: to shared positions on the axes before that of the rows."""
    data, indices, updates = step.required(0), step.required(1), step.required(2)
    if all(value.kind is Kind.SHARED for value in (data, indices, updates)):
        return [shared(step.settled(data.shape))]
    if indices.kind is not Kind.SHARED or indices.shape is None or not indices.shape[-1].is_known:
        return [unknown(f"{step.label}: its indices depend on the rows")]
    if data.kind is not Kind.ROWED or updates.kind is not Kind.ROWED or not data.lies_as(updates):
        return [unknown(f"{step.label}: only some of its inputs have rows")]
    depth = indices.shape[-1].coefficient
    if data.axis < depth:
        return [mixed(f"{step.label} writes to rows by their position")]
    if updates.axis != len(indices.shape) - 1 + data.axis - depth:
        return [unknown(f"{step.label}: rows are written to other places than theirs")]
    return [data]


def slices(step: Step) -> list[Value]:
    """Slice: of any axes but that of the rows."""
    value = step.required(0)
    starts, ends = step.numbers("starts", 1), step.numbers("ends", 2)
    axes, steps = step.numbers("axes", 3), step.numbers("steps", 4)
    if value.elements is not None and None not in (starts, ends, steps):
        assert starts is not None
        assert ends is not None
        picked = value.elements[starts[0] : ends[0] : steps[0] if steps else 1]
        return [integers(picked, (Dim(len(picked)),))]
    if value.kind is Kind.ROWED and value.outer != ONE:
        return [unknown(f"{step.label} cuts blocks of rows")]
    if any(other.kind is not Kind.SHARED for other in step.given()[1:]):
        return [mixed(f"{step.label} cuts at a place that depends on the rows")]
    if value.kind is Kind.COUNTED:
        return [unknown(f"{step.label} cuts sizes")]
    if value.shape is None or axes is None:
        if value.kind is Kind.SHARED:
            return [shared(step.inferred())]
        return [unknown(f"{step.label}: the axes are not known before the model runs")]
    if not axes:
        count = len(starts) if starts is not None else len(value.shape)
        axes = list(range(count))
    rank = len(value.shape)
    cut = [normal_axis(axis, rank) for axis in axes]
    shape = list(value.shape)
    for index, axis in enumerate(cut):
        if value.kind is Kind.ROWED and axis == value.axis:
            whole = (
                starts is not None
                and ends is not None
                and starts[index] == 0
                and ends[index] >= _BEYOND
                and (not steps or steps[index] == 1)
            )
            if not whole:
                return [mixed(f"{step.label} picks rows by their position")]
        else:
            shape[axis] = step.fresh(axis)
    if value.kind is Kind.SHARED:
        return [shared(step.settled(shape))]
    return [like(value, tuple(shape))]


def one_hot(step: Step) -> list[Value]:
    """OneHot: a new axis."""
    indices, depth = step.required(0), step.required(1)
    if any(other.kind is not Kind.SHARED for other in step.given()[1:]):
        return [mixed(f"{step.label}: its depth depends on the rows")]
    if indices.kind is Kind.SHARED:
        return [shared(step.inferred())]
    if indices.shape is None or indices.kind is Kind.COUNTED:
        return [unknown(f"{step.label}: the rank is not known")]
    axis = normal_axis(step.integer("axis", -1), len(indices.shape) + 1)
    size = depth.elements[0] if depth.elements else step.fresh(axis)
    shape = (*indices.shape[:axis], size, *indices.shape[axis:])
    return [like(indices, shape, indices.axis + (axis <= indices.axis))]


def pad(step: Step) -> list[Value]:
    """Pad: of any axes but that of the rows."""
    value = step.required(0)
    if any(other.kind is not Kind.SHARED for other in step.given()[1:]):
        return [mixed(f"{step.label} pads by what depends on the rows")]
    if value.kind is Kind.SHARED:
        return [shared(step.inferred())]
    pads, axes = step.numbers("pads", 1), step.numbers("axes", 3)
    if value.shape is None or not pads or axes is None or value.kind is Kind.COUNTED:
        return [unknown(f"{step.label}: the widths are not known before the model runs")]
    rank = len(value.shape)
    at = [normal_axis(axis, rank) for axis in axes] if axes else list(range(rank))
    shape = list(value.shape)
    for index, axis in enumerate(at):
        width = (pads[index], pads[index + len(at)])
        if axis == value.axis and width != (0, 0):
            return [mixed(f"{step.label} adds rows")]
        if width != (0, 0):
            shape[axis] = step.fresh(axis)
    return [like(value, tuple(shape))]


def resize(step: Step) -> list[Value]:
    """Resize and Upsample: by factors or to sizes that leave the row axis as it is."""
    value = step.required(0)
    if value.kind is Kind.SHARED and all(other.kind is Kind.SHARED for other in step.given()):
        return [shared(step.inferred())]
    if value.kind is not Kind.ROWED or value.shape is None:
        return [mixed(f"{step.label} computes with the number of rows")]
    rank = len(value.shape)
    axes = [normal_axis(int(axis), rank) for axis in step.attributes.get("axes", range(rank))]
    scales_at = 1 if step.operation == "Upsample" or step.opset == 10 else 2
    scales, sizes = step.input(scales_at), step.input(3) if scales_at == 2 else None
    if "scales" in step.attributes:
        fits = value.axis not in axes or step.attributes["scales"][axes.index(value.axis)] == 1
    elif value.axis not in axes:
        fits = all(other.kind is Kind.SHARED for other in step.given()[1:])
    elif sizes is not None and sizes.elements is not None:
        fits = sizes.elements[axes.index(value.axis)] == value.shape[value.axis]
        fits = fits and sum(size.row_factors for size in sizes.elements) == 1
    elif scales is not None and scales.constant is not None and scales.constant.size == len(axes):
        fits = float(scales.constant.reshape(-1)[axes.index(value.axis)]) == 1.0
    else:
        return [unknown(f"{step.label}: the factors are not known before the model runs")]
    if not fits:
        return [mixed(f"{step.label} resizes along the rows")]
    shape = tuple(dim if axis == value.axis else step.fresh(axis) for axis, dim in enumerate(value.shape))
    return [like(value, shape)]


def shape_of(step: Step) -> list[Value]:
    """Shape: the sizes, of which that of the row axis depends on the number of rows."""
    value = step.required(0)
    if value.kind is Kind.SHARED and value.shape is None:
        return [shared(step.inferred())]
    if value.shape is None:
        return [unknown(f"{step.label}: the rank is not known")]
    rank = len(value.shape)
    start, end = step.integer("start", 0), step.integer("end", rank)
    sizes = value.shape[start:end]
    return [integers(sizes, (Dim(len(sizes)),))]


def size_of(step: Step) -> list[Value]:
    """Size: the product of all sizes."""
    value = step.required(0)
    if value.shape is None:
        return [unknown(f"{step.label}: the rank is not known")]
    total = ONE
    for dim in value.shape:
        total = total.times(dim)
    return [integers((total,), ())]


def numbering(step: Step) -> list[Value]:
    """Range: shared, unless it numbers the rows; then only indexing can go on with it."""
    if all(value.kind is Kind.SHARED for value in step.given()):
        return [shared(step.inferred())]
    if [value.elements for value in step.given()] == [(Dim(0),), (A_ROW,), (ONE,)]:
        says = f"{step.label} numbers the rows"
        return [Value(Kind.COUNTED, (A_ROW,), numbering=ONE, reason=says)]
    return [mixed(f"{step.label} numbers the rows, or as many as a row says")]


def compress(step: Step) -> list[Value]:
    """Compress: along any axis but that of the rows, by a shared condition."""
    value, condition = step.required(0), step.required(1)
    if value.kind is Kind.SHARED and condition.kind is Kind.SHARED:
        return [shared(step.inferred())]
    if "axis" not in step.attributes or condition.kind is not Kind.SHARED or value.shape is None:
        return [mixed(f"{step.label} keeps as many elements as the rows together have")]
    axis = normal_axis(step.integer("axis", 0), len(value.shape))
    if axis == value.axis:
        return [mixed(f"{step.label} picks rows by their position")]
    return [like(value, (*value.shape[:axis], step.fresh(axis), *value.shape[axis + 1 :]))]


def over_matrices(step: Step) -> list[Value]:
    """Trilu, Det and Inverse: of the matrices on the last two axes."""
    value = step.required(0)
    if any(other.kind is not Kind.SHARED for other in step.given()[1:]):
        return [mixed(f"{step.label}: a parameter depends on the rows")]
    if value.kind is Kind.SHARED:
        return [shared(step.inferred())]
    if value.shape is None or value.kind is Kind.COUNTED or value.axis >= len(value.shape) - 2:
        return [mixed(f"{step.label} treats the rows as rows of one matrix")]
    return [like(value, value.shape[:-2]) if step.operation == "Det" else like(value)]


def reverse_sequence(step: Step) -> list[Value]:
    """ReverseSequence: each row by a length of its own."""
    value, lengths = step.required(0), step.required(1)
    if value.kind is Kind.SHARED and lengths.kind is Kind.SHARED:
        return [shared(step.inferred())]
    if value.kind is not Kind.ROWED or lengths.kind is not Kind.ROWED or not value.lies_as(lengths):
        return [unknown(f"{step.label}: only one of its inputs has rows")]
    if value.axis != step.integer("batch_axis", 1):
        return [mixed(f"{step.label} reverses the rows")]
    return [value]


def quantise(step: Step) -> list[Value]:
    """QuantizeLinear and DequantizeLinear: one scale for all, or one for each index of another axis."""
    value, scale = step.required(0), step.required(1)
    if any(other.kind is not Kind.SHARED for other in step.given()[1:]):
        return [unknown(f"{step.label}: its scale depends on the rows")]
    if value.kind is Kind.SHARED:
        return [shared(step.inferred() or value.shape)]
    if value.shape is None or scale.shape is None or value.kind is Kind.COUNTED:
        return [unknown(f"{step.label}: the rank is not known")]
    if len(scale.shape) > 1:
        return [unknown(f"{step.label}: its scales lie in blocks")]
    single = not scale.shape or scale.shape == (ONE,)
    if not single and normal_axis(step.integer("axis", 1), len(value.shape)) == value.axis:
        return [unknown(f"{step.label}: its scales lie along the rows")]
    return [combine(step, [value])]


def feature_extractor(step: Step) -> list[Value]:
    """ArrayFeatureExtractor: from the last axis by shared indices, or from a shared list by the rows' own."""
    value, indices = step.required(0), step.required(1)
    if value.kind is Kind.SHARED and indices.kind is Kind.SHARED:
        return [shared(step.inferred())]
    if value.shape is None or indices.shape is None or Kind.COUNTED in (value.kind, indices.kind):
        return [unknown(f"{step.label}: the rank of an input is not known")]
    if indices.kind is Kind.SHARED:
        if len(value.shape) < 2 or value.axis == len(value.shape) - 1:
            return [mixed(f"{step.label} picks rows by their position")]
        return [like(value, (*value.shape[:-1], product(indices.shape)))]
    if value.kind is Kind.ROWED:
        return [mixed(f"{step.label} picks from all rows by the indices of each")]
    # The indices are taken one after the other, whatever their shape is.
    before = (ONE,) if len(value.shape) == 1 else value.shape[:-1]
    outer = product(indices.shape[: indices.axis]).times(indices.outer)
    inner = product(indices.shape[indices.axis + 1 :]).times(indices.inner)
    return [rowed((*before, ONE), len(before), outer, inner)]


def feature_vectorizer(step: Step) -> list[Value]:
    """FeatureVectorizer: columns beside each other."""
    values = step.given()
    if any(value.kind is not Kind.ROWED or value.axis or (value.rank or 0) != 2 for value in values):
        return [unknown(f"{step.label}: an input is no table with rows")]
    if any(not value.lies_as(values[0]) for value in values):
        return [unknown(f"{step.label} combines rows that are arranged differently")]
    return [rowed((ONE, step.fresh(1)), 0, values[0].outer, values[0].inner)]


def encode_categories(step: Step) -> list[Value]:
    """OneHotEncoder: a new last axis."""
    value = step.required(0)
    if value.kind is not Kind.ROWED or value.shape is None:
        return [shared(step.inferred()) if value.kind is Kind.SHARED else mixed(f"{step.label}: sizes")]
    return [like(value, (*value.shape, step.fresh(len(value.shape))))]


def word_counts(step: Step) -> list[Value]:
    """TfIdfVectorizer: of a table, each row by itself.

    Strings that fill up a row stand behind its words, so they are in no n-gram of words alone.
    """
    value = step.required(0)
    if value.filler is not None:
        words = step.attributes.get("pool_strings")
        return [value if not words or value.filler in words else rowed((ONE, step.fresh(1)), 0)]
    if value.kind is Kind.SHARED:
        return [shared(step.inferred())]
    if value.kind is not Kind.ROWED or value.shape is None or len(value.shape) != 2 or value.axis:
        return [mixed(f"{step.label} takes all rows for one text")]
    return [like(value, (ONE, step.fresh(1)))]


def normalise_strings(step: Step) -> list[Value]:
    """StringNormalizer: without stop words each string becomes one."""
    value = step.required(0)
    if value.kind is Kind.ROWED and step.attributes.get("stopwords"):
        return [mixed(f"{step.label} leaves strings out")]
    return [combine(step, [value])]


def maps(step: Step) -> list[Value]:
    """ZipMap: a list with a mapping for each row."""
    value = step.required(0)
    if value.kind is not Kind.ROWED or value.axis or value.shape is None:
        return [unknown(f"{step.label}: its input has no rows")]
    return [rowed((ONE,), 0, value.outer, value.inner)]


RULES: Final[dict[str, Rule]] = {
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "ScatterElements": scatter_elements,
    "Scatter": scatter_elements,
    "ScatterND": scatter_nd,
    "Slice": slices,
    "OneHot": one_hot,
    "Pad": pad,
    "Resize": resize,
    "Upsample": resize,
    "Shape": shape_of,
    "Size": size_of,
    "Range": numbering,
    "Compress": compress,
    "Trilu": over_matrices,
    "Det": over_matrices,
    "com.microsoft.Inverse": over_matrices,
    "ReverseSequence": reverse_sequence,
    "QuantizeLinear": quantise,
    "DequantizeLinear": quantise,
    "ai.onnx.ml.ArrayFeatureExtractor": feature_extractor,
    "ai.onnx.ml.FeatureVectorizer": feature_vectorizer,
    "ai.onnx.ml.OneHotEncoder": encode_categories,
    "TfIdfVectorizer": word_counts,
    "StringNormalizer": normalise_strings,
    "ai.onnx.ml.ZipMap": maps,
}
