"""Rules of operations that arrange elements anew: transpose, reshape, join, split, expand."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from inferpool.backends.row_analysis.dims import (
    ONE,
    Dim,
    broadcast,
    opaque,
    plus,
    product,
)
from inferpool.backends.row_analysis.step import Rule, Step, normal_axis
from inferpool.backends.row_analysis.values import (
    Kind,
    Shape,
    Value,
    like,
    mixed,
    rowed,
    shared,
    unknown,
)


def transpose(step: Step) -> list[Value]:
    """Transpose: the row axis goes where `perm` puts it."""
    (value,) = step.given()
    if value.shape is None:
        return [unknown(f"{step.label}: the rank is not known")]
    rank = len(value.shape)
    order = [int(axis) for axis in step.attributes.get("perm", range(rank)[::-1])]
    if len(order) != rank:
        return [unknown(f"{step.label}: the rank is not as declared")]
    shape = tuple(value.shape[axis] for axis in order)
    return [like(value, shape, order.index(value.axis) if value.kind is Kind.ROWED else None)]


def reshape_to(step: Step, value: Value, target: Shape) -> Value:
    """Return `value` with its elements, in their order, in another shape.

    The elements lie as [before, rows, behind]: the rows stay rows if one new axis holds all of them, and the
    new axes before it hold just what was before.
    """
    assert value.shape is not None
    with_rows = [axis for axis, dim in enumerate(target) if dim.row_factors]
    if not with_rows:
        return mixed(f"{step.label} fixes the number of rows")
    if len(with_rows) > 1:
        return unknown(f"{step.label}: more than one new axis depends on the number of rows")
    (axis,) = with_rows
    before = product(value.shape[: value.axis]).times(value.outer)
    outer = before.over(product(target[:axis]))
    each = target[axis].over(Dim(1, ("$rows",)))
    inner = each.over(outer) if each is not None and outer is not None else None
    if outer is None or inner is None or inner.row_factors or outer.row_factors:
        return unknown(f"{step.label}: the new axes do not follow the rows")
    return rowed(target, axis, outer, inner)


def reshape(step: Step) -> list[Value]:
    """Reshape, with 0 (as it was) and -1 (what is left)."""
    value, wanted = step.required(0), step.input(1)
    if "shape" in step.attributes:
        elements: Shape | None = tuple(Dim(int(each)) for each in step.attributes["shape"])
    else:
        elements = wanted.elements if wanted is not None else None
    if value.kind is not Kind.ROWED:
        if wanted is not None and wanted.kind is Kind.COUNTED:
            return [unknown(f"{step.label}: values without rows are given a shape with rows")]
        if (
            value.kind is Kind.SHARED
            and elements is not None
            and value.elements is not None
            and len(elements) <= 1
        ):
            return [
                Value(Kind.SHARED, (Dim(len(value.elements)),) if elements else (), elements=value.elements)
            ]
        if value.kind is Kind.COUNTED:
            if elements is not None and len(elements) <= 1 and value.elements is not None:
                shape = (Dim(len(value.elements)),) if elements else ()
                return [Value(Kind.COUNTED, shape, elements=value.elements)]
            return [mixed(f"{step.label} makes data of the number of rows")]
        return [shared(step.inferred())]
    if elements is None or value.shape is None:
        return [unknown(f"{step.label}: the new shape is not known before the model runs")]
    keep_zero = step.integer("allowzero", 0)
    target: list[Dim | None] = []
    for axis, each in enumerate(elements):
        if each == Dim(0) and not keep_zero:
            if axis >= len(value.shape):
                return [unknown(f"{step.label}: the new shape has more axes")]
            target.append(value.shape[axis])
        else:
            target.append(None if each == Dim(-1) else each)
    if None in target:
        rest = [dim for dim in target if dim is not None]
        total, others = product(value.shape), product(rest)
        index = target.index(None)
        found = total.over(others)
        if found is None:
            # The rows are outermost: what is left of a row, cut into equal pieces, is not known but the same.
            lone = product(value.shape[: value.axis]).times(value.outer) == ONE
            if not lone or product(target[:index]) != ONE or others.row_factors:  # type: ignore[arg-type]
                if others.row_factors == 1:
                    row_size = total.over(Dim(1, ("$rows",)))
                    other_size = others.over(Dim(1, ("$rows",)))
                    if row_size is not None and other_size is not None:
                        found = opaque("quotient", row_size, other_size)
                if found is None:
                    return [unknown(f"{step.label}: what -1 stands for is not known")]
            else:
                return [unknown(f"{step.label}: rows may not be of whole pieces")]
        target[index] = found
    return [reshape_to(step, value, tuple(dim for dim in target if dim is not None))]


def flatten(step: Step) -> list[Value]:
    """Flatten into two axes."""
    (value,) = step.given()
    if value.filler is not None:
        return [value if step.integer("axis", 1) == 1 else mixed(value.reason)]
    if value.shape is None:
        return [unknown(f"{step.label}: the rank is not known")]
    if value.kind is not Kind.ROWED:
        return [shared(step.inferred())]
    axis = normal_axis(step.integer("axis", 1), len(value.shape))
    return [reshape_to(step, value, (product(value.shape[:axis]), product(value.shape[axis:])))]


def squeeze(step: Step) -> list[Value]:
    """Squeeze: axes of size 1 go."""
    value = step.required(0)
    axes = step.numbers("axes", 1)
    if value.elements is not None and len(value.elements) == 1:
        return [Value(value.kind, (), elements=value.elements)]
    if value.kind is Kind.COUNTED:
        return [unknown(f"{step.label}: more than one size is squeezed")]
    if value.kind is Kind.SHARED:
        return [shared(step.inferred())]
    if not axes or value.shape is None:
        return [mixed(f"{step.label}: without axes, a single row loses its row axis and several rows do not")]
    rank = len(value.shape)
    gone = {normal_axis(axis, rank) for axis in axes}
    if value.axis in gone:
        return [mixed(f"{step.label} fixes the number of rows")]
    shape = tuple(dim for axis, dim in enumerate(value.shape) if axis not in gone)
    return [like(value, shape, value.axis - sum(axis < value.axis for axis in gone))]


def unsqueeze(step: Step) -> list[Value]:
    """Unsqueeze: axes of size 1 come in."""
    value = step.required(0)
    axes = step.numbers("axes", 1)
    if value.elements is not None and value.rank == 0:
        return [Value(value.kind, (ONE,), elements=value.elements)]
    if value.kind is Kind.COUNTED and (value.elements is not None or not axes or value.shape is None):
        return [mixed(f"{step.label} makes data of the number of rows")]
    if axes is None or value.shape is None:
        if value.kind is Kind.SHARED:
            return [shared(step.inferred())]
        return [unknown(f"{step.label}: the axes are not known before the model runs")]
    rank = len(value.shape) + len(axes)
    new = {normal_axis(axis, rank) for axis in axes}
    old = [axis for axis in range(rank) if axis not in new]
    dims = iter(value.shape)
    shape = tuple(ONE if axis in new else next(dims) for axis in range(rank))
    if value.kind is Kind.COUNTED:
        return [replace(value, shape=shape)]
    if value.kind is Kind.SHARED:
        return [shared(step.settled(shape))]
    return [like(value, shape, old[value.axis])]


def _positions(step: Step, values: list[Value]) -> Value:
    """Return the numbers of rows joined with positions within each row, as GatherND takes them."""
    first, rest = values[0], values[1:]
    assert first.shape is not None
    rank, rows = len(first.shape), first.numbered_axis()
    last = normal_axis(step.integer("axis", 0), rank) == rank - 1 != rows and first.shape[-1] == ONE
    follow = all(
        value.kind is Kind.ROWED
        and (value.axis, value.outer, value.inner, value.rank) == (rows, ONE, ONE, rank)
        and value.shape is not None
        and value.shape[-1].is_known
        for value in rest
    )
    if not last or not follow:
        return unknown(f"{step.label} joins numbers of rows")
    depth = 1 + sum(value.shape[-1].coefficient for value in rest if value.shape is not None)
    return Value(Kind.COUNTED, (*first.shape[:-1], Dim(depth)), picks_own=True, reason=first.reason)


def concat(step: Step) -> list[Value]:
    """Concat: along any axis but that of the rows."""
    values = step.given()
    if values[0].numbering == ONE:
        return [_positions(step, values)]
    if all(value.kind is not Kind.ROWED for value in values):
        if all(value.elements is not None for value in values):
            elements = tuple(dim for value in values for dim in value.elements or ())
            kind = Kind.COUNTED if any(dim.row_factors for dim in elements) else Kind.SHARED
            return [Value(kind, (Dim(len(elements)),), elements=elements)]
        if any(value.kind is Kind.COUNTED and value.elements is None for value in values):
            return [unknown(f"{step.label} joins numbers of rows")]
        if any(value.kind is Kind.COUNTED for value in values):
            return [mixed(f"{step.label} makes data of the number of rows")]
        return [shared(step.inferred())]
    first = values[0]
    if any(value.kind is not Kind.ROWED or value.shape is None for value in values):
        return [unknown(f"{step.label}: values with rows are joined with values without")]
    assert first.shape is not None
    axis = normal_axis(step.integer("axis", 0), len(first.shape))
    if any(value.axis == axis for value in values):
        if any(value.axis != axis or value.inner != first.inner for value in values):
            return [mixed(f"{step.label} joins values along the rows")]
        # Blocks of rows behind one another.
        outer = Dim(0)
        for value in values:
            outer = plus(outer, value.outer)
        return [rowed(first.shape, axis, outer, first.inner)]
    if any(value.axis != first.axis or not value.lies_as(first) for value in values):
        return [mixed(f"{step.label} joins values whose rows lie on different axes")]
    length = Dim(0)
    for value in values:
        assert value.shape is not None
        length = plus(length, value.shape[axis])
    return [like(first, (*first.shape[:axis], length, *first.shape[axis + 1 :]))]


def split(step: Step) -> list[Value]:
    """Split: along any axis but that of the rows."""
    value = step.required(0)
    count = len(step.outputs)
    if value.kind is not Kind.ROWED:
        if value.kind is Kind.COUNTED:
            return [unknown(f"{step.label} splits sizes")] * count
        return [shared(step.inferred(index)) for index in range(count)]
    assert value.shape is not None
    axis = normal_axis(step.integer("axis", 0), len(value.shape))
    if axis == value.axis:
        return [mixed(f"{step.label} splits the rows by their position")] * count
    sizes = step.numbers("split", 1)
    lengths = [
        Dim(sizes[index]) if sizes and index < len(sizes) else step.fresh(axis, index)
        for index in range(count)
    ]
    return [like(value, (*value.shape[:axis], length, *value.shape[axis + 1 :])) for length in lengths]


def expand(step: Step) -> list[Value]:
    """Expand: values that all rows share may be given rows, each with the same content."""
    value, wanted = step.required(0), step.required(1)
    if value.kind is Kind.COUNTED and value.numbering is None:
        return [mixed(f"{step.label} makes data of the number of rows")]
    if value.kind is Kind.SHARED and wanted.kind is Kind.SHARED:
        return [shared(step.inferred())]
    if wanted.elements is None or value.shape is None:
        return [unknown(f"{step.label}: the new shape is not known before the model runs")]
    if value.kind is Kind.COUNTED:
        own = rowed(value.shape, value.numbered_axis())
        (wider,) = expand(replace(step, inputs=(own, wanted)))
        plain = wider.kind is Kind.ROWED and (wider.outer, wider.inner) == (ONE, ONE)
        return [replace(value, shape=wider.shape) if plain else mixed(wider.reason or value.reason)]
    rank = max(len(value.shape), len(wanted.elements))
    mine = (*[ONE] * (rank - len(value.shape)), *value.shape)
    theirs = (*[ONE] * (rank - len(wanted.elements)), *wanted.elements)
    if value.kind is Kind.ROWED:
        axis = value.axis + rank - len(value.shape)
        if theirs[axis] not in (ONE, mine[axis]):
            return [unknown(f"{step.label}: the new shape does not follow the rows")]
    else:
        with_rows = [index for index, dim in enumerate(theirs) if dim.row_factors]
        if len(with_rows) != 1 or mine[with_rows[0]] != ONE:
            return [unknown(f"{step.label}: the new shape does not follow the rows")]
        (axis,) = with_rows
    shape: list[Dim] = []
    for index, (left, right) in enumerate(zip(mine, theirs, strict=True)):
        if index == axis:
            shape.append(ONE)
            continue
        if right.row_factors:
            return [mixed(f"{step.label} repeats values as often as there are rows")]
        shape.append(broadcast(left, right) or step.fresh(index))
    if value.kind is Kind.ROWED:
        return [like(value, tuple(shape), axis)]
    inner = theirs[axis].over(Dim(1, ("$rows",)))
    if inner is None:
        return [unknown(f"{step.label}: the new shape does not follow the rows")]
    return [rowed(tuple(shape), axis, ONE, inner)]


def constant_of_shape(step: Step) -> list[Value]:
    """ConstantOfShape: each row gets the same."""
    wanted = step.required(0)
    if wanted.kind is Kind.SHARED:
        return [shared(step.inferred() or (wanted.elements or None))]
    if wanted.elements is None:
        return [mixed(f"{step.label} depends on the rows")]
    with_rows = [index for index, dim in enumerate(wanted.elements) if dim.row_factors]
    inner = wanted.elements[with_rows[0]].over(Dim(1, ("$rows",))) if len(with_rows) == 1 else None
    if inner is None:
        return [unknown(f"{step.label}: the shape does not follow the rows")]
    return [rowed(wanted.elements, with_rows[0], ONE, inner)]


def tile(step: Step) -> list[Value]:
    """Tile: the rows may be repeated, block by block."""
    value, repeats = step.required(0), step.required(1)
    if value.kind is Kind.SHARED and repeats.kind is Kind.SHARED:
        return [shared(step.inferred())]
    times = repeats.elements
    if times is None or value.shape is None or value.kind is Kind.COUNTED or len(times) != len(value.shape):
        return [unknown(f"{step.label}: how often is not known before the model runs")]
    shape = tuple(left.times(right) for left, right in zip(value.shape, times, strict=True))
    if value.kind is Kind.ROWED:
        return [rowed(shape, value.axis, times[value.axis].times(value.outer), value.inner)]
    with_rows = [index for index, dim in enumerate(times) if dim.row_factors]
    inner = value.shape[with_rows[0]] if len(with_rows) == 1 else None
    each = times[with_rows[0]].over(Dim(1, ("$rows",))) if with_rows else None
    if inner is None or each is None:
        return [unknown(f"{step.label}: the repetitions do not follow the rows")]
    return [rowed(shape, with_rows[0], ONE, each.times(inner))]


RULES: Final[dict[str, Rule]] = {
    "Transpose": transpose,
    "Reshape": reshape,
    "Flatten": flatten,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Concat": concat,
    "Split": split,
    "Expand": expand,
    "ConstantOfShape": constant_of_shape,
    "Tile": tile,
}
