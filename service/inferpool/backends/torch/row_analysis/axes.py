"""Operations along axes: reductions, sorting, normalisation, cutting."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from inferpool.backends.row_analysis.elementwise import combine
from inferpool.backends.row_analysis.step import normal_axis
from inferpool.backends.row_analysis.values import Kind, Shape, Value, like, mixed, unknown
from inferpool.backends.torch.row_analysis.call import Call, CallRule, axes_of

_BEYOND: Final = 2**31 - 1


def along(call: Call, value: Value, axes: Iterable[int], says: str, keeps: bool = True) -> list[Value]:
    """Return the outputs of an operation along some axes; `says` is what it does if rows lie on one of them.

    Unless it `keeps` the axes, they are not in the outputs.
    """
    if value.kind is Kind.SHARED:
        return call.without_rows()
    if value.shape is None:
        return call.every(unknown(f"{call.label}: the rank is not known"))
    touched = axes_of(value, list(axes))
    if value.axis in touched:
        return call.every(mixed(f"{call.label} {says}"))
    results: list[Value] = []
    for output in range(len(call.outputs)):
        known = call.shape(output)
        if keeps:
            shape: Shape = known or tuple(
                call.fresh(axis, output) if axis in touched else dim for axis, dim in enumerate(value.shape)
            )
            results.append(like(value, shape))
        else:
            shape = known or tuple(dim for axis, dim in enumerate(value.shape) if axis not in touched)
            results.append(like(value, shape, value.axis - sum(axis < value.axis for axis in touched)))
    return results


def reduction(call: Call) -> list[Value]:
    """Sum, mean, max, …: over any axes but that of the rows; without axes over all that there is."""
    value = call.first()
    other = call.arguments.get("other")
    if call.operation in ("max", "min") and isinstance(other, Value):
        return [combine(call.step(call.operation), [value, other])]
    axes = call.numbers("dim")
    if not axes:
        if value.kind is Kind.SHARED:
            return call.without_rows()
        return call.every(mixed(f"{call.label} takes one value over the whole batch"))
    keep = call.flag("keepdim")
    return call.every(call.onnx("ReduceSum", value, axes=axes, keepdims=int(keep))[0])


def last_by_default(call: Call) -> list[Value]:
    """Mode, kthvalue, …: along one axis, the last by default."""
    keep = call.flag("keepdim")
    axes = [call.number("dim", -1)]
    return call.every(call.onnx("ReduceSum", call.first(), axes=axes, keepdims=int(keep))[0])


def softmax(call: Call) -> list[Value]:
    """Softmax and its kin: along one axis."""
    return along(call, call.first(), [call.number("dim")], "normalises over the rows")


def running(call: Call) -> list[Value]:
    """Cumsum and its kin: along one axis."""
    return along(call, call.first(), [call.number("dim")], "runs along the rows")


def sorting(call: Call) -> list[Value]:
    """Sort, argsort, topk: along one axis, the last by default."""
    axis = 0 if call.operation == "msort" else call.number("dim", -1)
    return along(call, call.first(), [axis], "sorts the rows")


def flip(call: Call) -> list[Value]:
    """Flip and roll: along some axes."""
    value = call.first()
    axes = call.numbers("dims")
    if not axes:
        if value.kind is Kind.SHARED:
            return call.without_rows()
        return [mixed(f"{call.label} moves elements from row to row")]
    return along(call, value, axes, "moves the rows")


def diff(call: Call) -> list[Value]:
    """Differences of neighbours along an axis."""
    if len(call.tensors()) > 1:
        return [unknown(f"{call.label}: values are put before or behind")]
    return along(call, call.first(), [call.number("dim", -1)], "takes differences between rows")


def halves(call: Call) -> list[Value]:
    """Glu: one half of an axis times the other."""
    return along(call, call.first(), [call.number("dim", -1)], "combines the first rows with the last")


def cut(call: Call) -> list[Value]:
    """Slice and narrow: of any axis but that of the rows."""
    value = call.first()
    if value.numbering is not None and call.number("dim", 0) == 0 and _is_whole(call, value):
        return [value]
    if value.kind is Kind.ROWED and value.shape is not None:
        axis = normal_axis(call.number("dim", 0), len(value.shape))
        if axis == value.axis and call.operation != "narrow" and _is_whole(call, value):
            return [value]
        if axis != value.axis and any(other.kind is not Kind.SHARED for other in call.tensors()[1:]):
            return [mixed(f"{call.label} cuts at a place that depends on the rows")]
    return along(call, value, [call.number("dim", 0)], "picks rows by their position")


def _is_whole(call: Call, value: Value) -> bool:
    assert value.shape is not None
    end = call.arguments.get("end")
    if call.arguments.get("start") not in (None, 0) or call.arguments.get("step", 1) != 1:
        return False
    if isinstance(end, Value):
        return end.elements == (value.shape[value.axis],)
    return end is None or int(end) >= _BEYOND


def select(call: Call) -> list[Value]:
    """Select: one index of any axis but that of the rows."""
    if any(other.kind is not Kind.SHARED for other in call.tensors()[1:]):
        return [mixed(f"{call.label} picks a place that depends on the rows")]
    return along(call, call.first(), [call.number("dim")], "picks rows by their position", keeps=False)


def split(call: Call) -> list[Value]:
    """Split, chunk and their kin: of any axis but that of the rows."""
    return along(call, call.first(), [call.number("dim", 0)], "splits the rows by their position")


def unbind(call: Call) -> list[Value]:
    """Unbind: a tensor for each index of an axis."""
    axis = call.number("dim", 0)
    return along(call, call.first(), [axis], "splits the rows by their position", keeps=False)


def windows(call: Call) -> list[Value]:
    """Unfold: windows of an axis, along a new last axis."""
    value = call.first()
    if value.kind is not Kind.ROWED or value.shape is None:
        return call.without_rows() if value.kind is Kind.SHARED else [unknown(f"{call.label}: no rank")]
    axis = normal_axis(call.number("dimension"), len(value.shape))
    if axis == value.axis:
        return [mixed(f"{call.label} puts neighbouring rows together")]
    shape = tuple(call.fresh(at) for at in range(len(value.shape) + 1))
    return [like(value, shape)]


def diagonal(call: Call) -> list[Value]:
    """Diagonal: of two axes, along a new last axis."""
    value = call.first()
    if value.kind is not Kind.ROWED or value.shape is None:
        return call.without_rows() if value.kind is Kind.SHARED else [unknown(f"{call.label}: no rank")]
    gone = axes_of(value, [call.number("dim1", 0), call.number("dim2", 1)])
    if value.axis in gone:
        return [mixed(f"{call.label} picks one element of each row by the position of the row")]
    rank = len(value.shape) - 1
    return [
        like(
            value,
            tuple(call.fresh(at) for at in range(rank)),
            value.axis - sum(axis < value.axis for axis in gone),
        )
    ]


def pad(call: Call) -> list[Value]:
    """Pad: of any axes but that of the rows; widths are given from the last axis on."""
    value = call.first()
    widths = call.arguments.get("pad", call.arguments.get("padding")) or []
    if value.kind is Kind.SHARED:
        return call.without_rows()
    if value.shape is None:
        return [unknown(f"{call.label}: the rank is not known")]
    touched = {
        len(value.shape) - 1 - index // 2
        for index, width in enumerate(widths)
        if isinstance(width, Value) or width
    }
    if any(isinstance(width, Value) and width.kind is not Kind.SHARED for width in widths):
        return [mixed(f"{call.label} pads by what depends on the rows")]
    return along(call, value, touched, "adds rows")


def similarity(call: Call) -> list[Value]:
    """Cosine similarity and distances of pairs: over one axis of two tensors."""
    both = combine(call.step(call.operation), call.tensors())
    if both.kind is not Kind.ROWED:
        return [both]
    axis = -1 if call.operation == "pairwise_distance" else call.number("dim", 1)
    return call.onnx("ReduceSum", both, axes=[axis], keepdims=int(call.flag("keepdim")))


def cross(call: Call) -> list[Value]:
    """Cross product: over one axis of two tensors."""
    both = combine(call.step(call.operation), call.tensors())
    if both.kind is not Kind.ROWED:
        return [both]
    return along(call, both, [call.number("dim", -1)], "takes the rows for coordinates")


def fourier(call: Call) -> list[Value]:
    """Fourier transforms: along some axes."""
    value = call.first()
    axes = call.numbers("dim")
    if axes is None:
        if call.operation.endswith("n"):
            return call.every(mixed(f"{call.label} transforms along the rows"))
        axes = [-2, -1] if call.operation.endswith("2") else [-1]
    return along(call, value, axes, "transforms along the rows")


def last_axis(call: Call) -> list[Value]:
    """view_as_real and view_as_complex: a last axis of two comes or goes."""
    value = call.first()
    if value.kind is not Kind.ROWED or value.shape is None:
        return call.without_rows() if value.kind is Kind.SHARED else [unknown(f"{call.label}: no rank")]
    if call.operation == "view_as_real":
        return [like(value, (*value.shape, call.fresh(len(value.shape))))]
    if value.axis == len(value.shape) - 1:
        return [mixed(f"{call.label} takes rows for parts of a number")]
    return [like(value, value.shape[:-1])]


def matrices(call: Call) -> list[Value]:
    """Tril, inverse, det, …: of the matrices on the last two axes."""
    value, *others = call.tensors()
    if all(each.kind is Kind.SHARED for each in (value, *others)):
        return call.without_rows()
    if any(each.kind is Kind.COUNTED for each in others):
        return call.every(mixed(f"{call.label}: a parameter depends on the rows"))
    if value.shape is None:
        return call.every(unknown(f"{call.label}: the rank is not known"))
    for each in (value, *others):
        if each.kind is not Kind.ROWED or each.shape is None:
            return call.every(unknown(f"{call.label}: only some of its inputs have rows"))
        if each.axis >= len(each.shape) - 2:
            return call.every(mixed(f"{call.label} treats the rows as rows of one matrix"))
        if each.axis != value.axis or not each.lies_as(value) or len(each.shape) != len(value.shape):
            return call.every(unknown(f"{call.label} combines rows that are arranged differently"))
    results = []
    for output in range(len(call.outputs)):
        shape = call.shape(output)
        if shape is None and call.operation in ("tril", "triu"):
            shape = value.shape
        results.append(like(value, shape) if shape else unknown(f"{call.label}: the rank is not known"))
    return results


RULES: Final[dict[str, CallRule]] = {
    **dict.fromkeys(
        ("all", "amax", "amin", "aminmax", "any", "argmax", "argmin", "count_nonzero", "linalg_vector_norm",
         "linalg_norm", "logsumexp", "max", "mean", "median", "min", "nanmean", "nanmedian", "nansum", "norm",
         "prod", "std", "std_mean", "sum", "var", "var_mean", "frobenius_norm",
         "special_logsumexp"),
        reduction,
    ),
    **dict.fromkeys(("mode", "kthvalue"), last_by_default),
    **dict.fromkeys(
        ("softmax", "_softmax", "log_softmax", "_log_softmax", "special_softmax", "special_log_softmax",
         "_safe_softmax"),
        softmax,
    ),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"), running),
    **dict.fromkeys(("sort", "argsort", "topk", "msort"), sorting),
    **dict.fromkeys(("flip", "roll"), flip),
    "diff": diff,
    "glu": halves,
    **dict.fromkeys(("slice", "slice_copy", "narrow", "narrow_copy"), cut),
    **dict.fromkeys(("select", "select_copy"), select),
    **dict.fromkeys(
        ("split", "split_with_sizes", "split_with_sizes_copy", "split_copy", "chunk", "tensor_split",
         "unsafe_split", "unsafe_chunk"),
        split,
    ),
    **dict.fromkeys(("unbind", "unbind_copy"), unbind),
    "unfold": windows,
    "unfold_copy": windows,
    **dict.fromkeys(("diagonal", "diagonal_copy"), diagonal),
    **dict.fromkeys(
        ("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
         "replication_pad1d", "replication_pad2d", "replication_pad3d", "_pad_circular", "_pad_enum"),
        pad,
    ),
    **dict.fromkeys(("cosine_similarity", "pairwise_distance"), similarity),
    **dict.fromkeys(("cross", "linalg_cross"), cross),
    **dict.fromkeys(
        ("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft", "fft_fft2", "fft_ifft2",
         "fft_rfft2", "fft_irfft2", "fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn", "_fft_r2c",
         "_fft_c2r", "_fft_c2c", "fft_fftshift", "fft_ifftshift"),
        fourier,
    ),
    **dict.fromkeys(("view_as_real", "view_as_complex"), last_axis),
    **dict.fromkeys(
        ("tril", "triu", "inverse", "linalg_inv", "linalg_inv_ex", "det", "linalg_det", "linalg_cholesky",
         "linalg_cholesky_ex", "cholesky", "linalg_solve", "_linalg_solve_ex", "linalg_qr", "linalg_svd",
         "_linalg_svd", "linalg_eigh", "_linalg_eigh", "linalg_matrix_exp", "matrix_exp", "linalg_pinv",
         "_linalg_det", "linalg_slogdet", "_linalg_slogdet", "linalg_solve_triangular"),
        matrices,
    ),
}  # fmt: skip
