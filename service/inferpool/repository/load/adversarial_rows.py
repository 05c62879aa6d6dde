"""Rows that try to break the claim that the rows of a batch are independent.

A model may share one number among all rows of a batch: a maximum, a mean, a length, a flag. Such sharing
shows only if rows differ in that number. So each row here lies in a range of its own: dark, bright, constant,
huge, tiny, zero, with a NaN or an infinity. Integers come from the whole vocabulary, with special values and
padding. Texts have other lengths.

All values derive from rows that the model runs, and a fixed seed. A model may refuse some of the rows, even
alone; the caller leaves those out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from inferpool.backends.base import DeviceModel, LoadedModel
from inferpool.backends.made_up_inputs import SEED
from inferpool.errors import OutOfMemory
from inferpool.repository.load.free_sizes import free_axes, resized
from inferpool.tensors import Array, Signature, Tensors, TensorSpec, bf16_to_fp32, fp32_to_bf16

if TYPE_CHECKING:
    from numpy.random import Generator  # numpy imports its random numbers late; few starts draw any

_HUGE: Final = {"FP16": 1e3}
"""By datatype, a factor so large that sums of its products stay finite; 1e6 for the others."""

_TOPS: Final = (99, 999, 9_999, 99_999, 262_143)
"""Integers that are tried in turn to find how many words a vocabulary has. The largest vocabularies of
published models end below the last."""

_CHANNELS: Final = 4
"""Dimensions up to this size often count channels, which a model fixes though its file does not say so."""

_SPECIAL: Final = (0, 1, 2, 3, 100, 101, 102, 103, 50_256)
"""Integers that mean padding, a start, an end or a mask in the vocabularies of published models."""

_TEXTS: Final = (
    "",
    "a",
    "a b c d",
    " ".join(f"word{number}" for number in range(40)),
    "x" * 300,
    "12",
    "-3.5e8",
    "Größe, 日本語 и ещё",
    "Hello, World! (1st line)\nand a second one",
    "  two  spaces  ",
    "THE THE THE THE",
    "row",
)


def make_adversarial_rows(model: LoadedModel, rows: Tensors) -> Tensors:
    """Rows of the same shapes as `rows`, which the model runs; it may refuse some of the result."""
    rng = np.random.default_rng(SEED)
    specs = {name: model.signature.inputs_by_name[name] for name in rows}
    tops = {
        name: _find_top(model, rows, name)
        for name, spec in specs.items()
        if spec.dtype.kind in "iu" and spec.datatype != "BF16"
    }
    makers: dict[str, Sequence[Callable[[Array], Array]]] = {
        name: _makers(specs[name], tensor, tops.get(name, 0), rng) for name, tensor in rows.items()
    }
    count = max(map(len, makers.values()))
    made: dict[str, list[Array]] = {name: [] for name in rows}
    varied = list(rows)
    for number in range(count):
        for position, (name, tensor) in enumerate(rows.items()):
            ordinary: Array = tensor[number % len(tensor)]
            # With several inputs, every second row varies one of them and keeps the others as they were.
            kept = len(varied) > 1 and number % 2 and varied[number // 2 % len(varied)] != name
            # Inputs of integers vary differently: an id and its mask are seldom both zero.
            kinds = makers[name]
            kind = number + (3 * position if name in tops else 0)
            made[name].append(ordinary if kept else kinds[kind % len(kinds)](ordinary))
    return {name: np.stack(each) for name, each in made.items()}


def resized_rows(signature: Signature, rows: Tensors) -> Iterator[Tensors]:
    """`rows` with other sizes in the dimensions of any size, by their own values: shorter and longer.

    Dimensions with one name, and those of one size, keep one size. Sizes that may count channels stay.
    """
    axes = free_axes(signature, rows, 1)
    for least in (_CHANNELS + 1, 2):
        for change in (_shorter, _longer):
            sizes = {
                (name, axis): change(rows[name].shape[axis])
                for alike in axes
                for name, axis in alike
                if rows[name].shape[axis] >= least
            }
            if sizes:
                yield resized(rows, sizes)


def _shorter(size: int) -> int:
    return max(1, size // 2 - 1)


def _longer(size: int) -> int:
    return size + size // 2 + 1


def _makers(spec: TensorSpec, tensor: Array, top: int, rng: Generator) -> Sequence[Callable[[Array], Array]]:
    """Functions that make a row of one input, each of another kind, from an ordinary row."""
    if spec.datatype == "BF16":

        def rounded(make: Callable[[Array], Array]) -> Callable[[Array], Array]:
            return lambda row: fp32_to_bf16(np.ascontiguousarray(make(bf16_to_fp32(row)), dtype=np.float32))

        return [rounded(make) for make in _float_makers("BF16", np.dtype(np.float32), rng)]
    if spec.dtype.kind == "f":
        return _float_makers(spec.datatype, spec.dtype, rng)
    if spec.dtype.kind == "b":
        return _flag_makers(rng)
    if spec.dtype.kind in "iu":
        return _integer_makers(spec.dtype, tensor, top, rng)
    return [_text_maker(number) for number in range(len(_TEXTS))]


def _float_makers(datatype: str, dtype: np.dtype[Any], rng: Generator) -> Sequence[Callable[[Array], Array]]:
    huge = _HUGE.get(datatype, 1e6)

    def uniform(low: float, high: float) -> Callable[[Array], Array]:
        return lambda row: rng.uniform(low, high, row.shape).astype(dtype)

    def normal(size: float) -> Callable[[Array], Array]:
        return lambda row: (rng.standard_normal(row.shape) * size).astype(dtype)

    def constant(value: float) -> Callable[[Array], Array]:
        return lambda row: np.full(row.shape, value, dtype)

    def with_one(value: float) -> Callable[[Array], Array]:
        def make(row: Array) -> Array:
            changed: Array = row.copy()
            changed.reshape(-1)[: 1 if row.size else 0] = value
            return changed

        return make

    return (
        uniform(0, 255),
        uniform(0, 0.02),
        normal(huge),
        normal(1e-3 if datatype == "FP16" else 1e-6),
        constant(0),
        with_one(np.nan),
        constant(0.5),
        uniform(128, 255),
        uniform(0, 0.02),
        lambda row: -np.abs(row) - 10,
        normal(huge),
        constant(200),
        with_one(np.inf),
        normal(1e-3 if datatype == "FP16" else 1e-6),
    )


def _flag_makers(rng: Generator) -> Sequence[Callable[[Array], Array]]:
    return (
        np.zeros_like,
        np.ones_like,
        lambda row: rng.random(row.shape) < 0.5,
        lambda row: rng.random(row.shape) < 0.1,
    )


def _integer_makers(
    dtype: np.dtype[Any], tensor: Array, top: int, rng: Generator
) -> Sequence[Callable[[Array], Array]]:
    # Never the lowest integer: divided by -1 it ends the process.
    low = max(np.iinfo(dtype).min + 1, -top) if tensor.size and tensor.min() < 0 else 0
    special = [value for value in (*_SPECIAL, top) if value <= top]

    def between(least: int, most: int) -> Callable[[Array], Array]:
        return lambda row: rng.integers(least, most, row.shape, dtype, endpoint=True)

    def constant(value: int) -> Callable[[Array], Array]:
        return lambda row: np.full(row.shape, value, dtype)

    def padded(share: float, *, left: bool = False) -> Callable[[Array], Array]:
        def make(row: Array) -> Array:
            changed: Array = row.copy()
            length = changed.shape[-1] if changed.ndim else 0
            count = int(length * share)
            changed[..., slice(count) if left else slice(length - count, None)] = 0
            return changed

        return make

    def with_special(row: Array) -> Array:
        chosen = rng.choice(np.array(special, dtype), row.shape)
        changed: Array = np.where(rng.random(row.shape) < 0.5, chosen, row)
        return changed

    return (
        between(low, top),
        padded(0.5),
        constant(0),
        with_special,
        constant(top),
        padded(0.8, left=True),
        between(low, top),
        constant(1),
        between(0, min(top, 2)),
        between(top - top // 4, top),
        padded(0.2),
        with_special,
    )


def _text_maker(number: int) -> Callable[[Array], Array]:
    """Makes a row whose texts begin at one of `_TEXTS`, so that each row has texts of its own."""

    def make(row: Array) -> Array:
        texts = [_TEXTS[(number + index) % len(_TEXTS)] for index in range(row.size)]
        return np.array(texts, object).reshape(row.shape)

    return make


def _find_top(model: LoadedModel, rows: Tensors, name: str) -> int:
    """The largest integer that input `name` takes: that of its datatype or of the model's vocabulary.

    An integer may also say how large an output is to be, or how often something is repeated. So integers
    grow step by step, and no longer than the outputs keep their sizes.
    """
    tensor = rows[name]
    known = int(tensor.max()) if tensor.size else 0
    most = int(np.iinfo(tensor.dtype).max)
    if not tensor.size or isinstance(model, DeviceModel):
        return known  # an index out of range would end a GPU's context
    row = {other: each[:1] for other, each in rows.items()}
    expected = _sizes(model.run(row))

    def takes(value: int) -> bool:
        changed = tensor[:1].copy()
        changed.reshape(-1)[-1] = value
        try:
            return _sizes(model.run(row | {name: changed})) == expected
        except OutOfMemory:
            raise
        except Exception:  # noqa: BLE001 - this is how a model says that a value is none of its own
            return False

    tops = [top for top in _TOPS if top < most]
    if tensor.dtype.itemsize == 1:
        tops = [most]
    elif tensor.dtype.itemsize == 2:
        tops.append(most)
    for value in tops:
        if value <= known:
            continue
        if not takes(value):
            refused = value
            while refused - known > 1:
                middle = (known + refused) // 2
                if takes(middle):
                    known = middle
                else:
                    refused = middle
            break
        known = value
    return known


def _sizes(outputs: Tensors) -> list[object]:
    return [getattr(output, "shape", None) for output in outputs.values()]
