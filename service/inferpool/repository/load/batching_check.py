"""Whether rows may share a run: the proof, made once at load (law 5).

Different rows are run one by one and in several groupings: eight rows, fewer where the model is slow.
If every output follows the input's rows and every row's answer is the same in company as alone, within
the datatype's rounding, then batching changes no answer. A model that mixes rows (normalises over the
batch, quantises it with one scale), has a fixed first dimension, or draws random numbers does not pass.

The rows come from the model's golden samples where it has some, else they are made up from the signature
with a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from inferpool.backends.base import LoadedModel
from inferpool.errors import OutOfMemory
from inferpool.tensors import ANY, JSON, Array, Signature, Tensors, TensorSpec, shape_text

_SEED: Final = 20_260_101
_GROUPINGS: Final = {
    8: ((0, 1, 2, 3, 4, 5, 6, 7), (2, 3, 4), (7, 6), (5, 0, 3, 1, 6)),
    3: ((0, 1, 2), (2, 0)),
    2: ((1, 0),),
}
"""Which rows run together, by how many rows there are: enough, in the order of what they cost."""
_MOST: Final = max(_GROUPINGS)

TOLERANCES: Final = {"FP64": 1e-8, "FP32": 1e-4, "FP16": 2e-2, "BF16": 1e-1}
"""Largest difference that counts as rounding, relative to the larger of the value and the output's scale."""

# Dimensions of any size other than the rows: tried in turn until the model runs.
_SIZES: Final = (16, 224, 64, 1, 3, 32, 128)
# Largest integers tried: token ids want variety, masks and flags want 0 and 1.
_INTEGERS: Final = (9, 2, 1)


@dataclass(slots=True)
class Proof:
    """The verdict, and the rows it was reached with.

    Attributes:
        batched: whether rows may share a run.
        reason: a sentence for `/models`, either way.
        rows: different rows that the model runs, along the first dimension; empty if none were found.
        alone: the outputs of each row alone, joined along the first dimension; empty unless `batched`.
    """

    batched: bool
    reason: str
    rows: Tensors = field(default_factory=dict)
    alone: Tensors = field(default_factory=dict)


def prove(
    model: LoadedModel, samples: Sequence[Tensors], budget_s: float, clock: Callable[[], float]
) -> Proof:
    """Find out whether rows of `model` may share a run; `samples` are inputs that it is known to take.

    Takes about `budget_s` at the most, or the time of six single-row runs where that is longer.
    """
    obstacle = _obstacle(model.signature)
    if obstacle:
        return Proof(False, obstacle)
    rows, seconds, fault = runnable(model, samples, clock)
    if not rows:
        return Proof(False, f"no made-up rows could be run ({fault}); add a golden sample to prove it with")
    count = next((size for size in _GROUPINGS if seconds * _runs(size) <= budget_s), min(_GROUPINGS))
    rows = {name: tensor[:count] for name, tensor in rows.items()}
    try:
        fault, worst, alone = _compare_all(model, rows, count)
    except Exception as error:  # noqa: BLE001 - whatever a model raises in company, it is served alone
        fault = f"the model raised {first_line(error)!r} when rows ran together"
    if fault:
        return Proof(False, fault, rows)
    sizes = ", ".join(map(str, sorted({len(grouping) for grouping in _GROUPINGS[count]})))
    return Proof(
        True,
        f"rows answer the same alone and together (tried {sizes}; largest relative difference {worst:.1g})",
        rows,
        alone,
    )


def _compare_all(model: LoadedModel, rows: Tensors, count: int) -> tuple[str, float, Tensors]:
    """What is wrong ("" if nothing is), the largest relative difference, and each row's outputs alone."""
    each = [model.run({name: tensor[row : row + 1] for name, tensor in rows.items()}) for row in range(count)]
    alone: Tensors = {}
    for name in each[0]:
        parts = [outputs[name] for outputs in each]
        fault = _unfollowed(parts)
        if fault:
            return f'output "{name}" {fault}', 0.0, {}
        alone[name] = np.concatenate(parts)
    worst = 0.0
    for grouping in _GROUPINGS[count]:
        outputs = model.run({name: tensor[list(grouping)] for name, tensor in rows.items()})
        fault, difference = compare(model.signature, outputs, alone, grouping, model.rounding)
        if fault:
            return f"{fault} when {len(grouping)} rows run together", worst, {}
        worst = max(worst, difference)
    if not any(_tells_apart(tensor) for tensor in alone.values()):
        return (
            "every row that was tried gets the same answer, which proves nothing; add a golden sample",
            0.0,
            {},
        )
    return "", worst, alone


def _tells_apart(alone: Array) -> bool:
    """Whether an output differs between rows, in something that is a number or a text."""
    first = alone[:1]
    if alone.dtype.kind == "f":
        same = (alone == first) | ~np.isfinite(alone)
        return not bool(same.all())
    return not bool((alone == first).all())


def _runs(count: int) -> int:
    """Rows that a proof with so many rows runs in all."""
    return count + sum(map(len, _GROUPINGS[count]))


def compare(
    signature: Signature, outputs: Tensors, alone: Tensors, chosen: Sequence[int], rounding: str = ""
) -> tuple[str, float]:
    """Hold `outputs` of the rows `chosen` against theirs `alone`.

    `rounding` is the datatype that sums are rounded to, where that is coarser than the outputs' own.
    Returns what is wrong, "" if nothing is, and the largest relative difference among the numbers.
    """
    worst = 0.0
    for name, got in outputs.items():
        reference = alone[name]
        want = reference[list(chosen)]
        if not isinstance(got, np.ndarray) or got.shape != want.shape:
            shape = shape_text(got.shape) if isinstance(got, np.ndarray) else "no tensor"
            return f'output "{name}" is {shape}, not {shape_text(want.shape)},', worst
        tolerance = TOLERANCES.get(signature.outputs_by_name[name].datatype)
        if tolerance is None:
            if not np.array_equal(got, want):
                return f'output "{name}" differs', worst
            continue
        tolerance = max(tolerance, TOLERANCES.get(rounding, 0.0))
        difference = relative_difference(got, want, reference)
        if not difference <= tolerance:
            return f'output "{name}" differs by {difference:.1g} (rounding explains {tolerance:.0e})', worst
        worst = max(worst, difference)
    return "", worst


def relative_difference(got: Array, want: Array, reference: Array) -> float:
    """The largest difference of `got` from `want`, relative to the scale of `reference`, which has `want`."""
    if not want.size:
        return 0.0
    wide, expected = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(expected)
    if (
        not np.array_equal(wide[~finite], expected[~finite], equal_nan=True)
        or not np.isfinite(wide[finite]).all()
    ):
        return float("inf")
    # Each column by its own scale, for a score may stand beside a coordinate of thousands; but no finer
    # than a hundredth of the whole output's, for small sums of large terms are as uncertain as the terms.
    sizes = np.where(np.isfinite(reference), np.abs(reference.astype(np.float64)), 0.0)
    columns = sizes.max(axis=tuple(range(sizes.ndim - 1))) if sizes.ndim > 1 else sizes.max()
    scale = np.maximum(columns, sizes.max() / 100)
    gap = np.where(finite, np.abs(np.where(finite, wide, 0.0) - np.where(finite, expected, 0.0)), 0.0)
    return float(np.max(gap / np.where(scale > 0, scale, 1.0)))


def _obstacle(signature: Signature) -> str:
    if all(spec.optional for spec in signature.inputs):
        return "the model has no input that every request must have"
    for kind, specs in (("input", signature.inputs), ("output", signature.outputs)):
        for spec in specs:
            if spec.datatype == JSON:
                return f'{kind} "{spec.name}" is no tensor: it has no rows'
            if spec.optional or (spec.shape is None and kind == "output"):
                continue
            if spec.shape is None:
                return f'the rank of {kind} "{spec.name}" is not known'
            if not spec.shape:
                return f'{kind} "{spec.name}" is a scalar: it has no rows'
            if spec.shape[0] != ANY:
                return f'the first dimension of {kind} "{spec.name}" is fixed at {spec.shape[0]}'
    return ""


def runnable(
    model: LoadedModel, samples: Sequence[Tensors], clock: Callable[[], float]
) -> tuple[Tensors, float, str]:
    """Rows that the model runs, and the seconds of one of them; or no rows, and the last fault.

    They are some of `samples`, inputs that it is known to take, or else made up from the signature. Raises
    OutOfMemory where a GPU has no memory for one row.
    """
    fault = ""
    for rows in _candidates(model.signature, samples):
        one = {name: tensor[:1] for name, tensor in rows.items()}
        try:
            model.run(one)  # the first run may be slower than any other
            began = clock()
            for row in range(1, 3):
                model.run({name: tensor[row : row + 1] for name, tensor in rows.items()})
            return rows, (clock() - began) / 2, ""
        except OutOfMemory:
            raise  # other rows would find no more
        except Exception as error:  # noqa: BLE001 - made-up rows may be nonsense to the model
            fault = first_line(error)
    return {}, 0.0, fault


def first_line(error: Exception) -> str:
    """What an error says first, or else what it is."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _unfollowed(parts: list[Any]) -> str:
    """How an output of single rows fails to follow them; "" if it does."""
    for part in parts:
        if not isinstance(part, np.ndarray):
            return "is no tensor"
        if not part.ndim or part.shape[0] != 1:
            return f"is {shape_text(part.shape)} for one row: it does not follow the rows of the input"
    return "has another shape for each row" if any(part.shape != parts[0].shape for part in parts) else ""


def _candidates(signature: Signature, samples: Sequence[Tensors]) -> Iterator[Tensors]:
    rng = np.random.default_rng(_SEED)
    usable = [sample for sample in samples if all(tensor.ndim and len(tensor) for tensor in sample.values())]
    if usable:
        shapes = {name: tensor.shape[1:] for name, tensor in usable[0].items()}
        alike = [sample for sample in usable if {n: t.shape[1:] for n, t in sample.items()} == shapes]
        yield {name: _varied(np.concatenate([sample[name] for sample in alike]), rng) for name in shapes}
    specs = [spec for spec in signature.inputs if not spec.optional]
    free = any(size == ANY for spec in specs for size in (spec.shape or ())[1:])
    whole = any(spec.datatype.lstrip("U").startswith("INT") for spec in specs)
    for size in _SIZES if free else _SIZES[:1]:
        for largest in _INTEGERS if whole else _INTEGERS[:1]:
            yield {spec.name: _made_up(spec, size, largest, rng) for spec in specs}


def _made_up(spec: TensorSpec, size: int, largest: int, rng: np.random.Generator) -> Array:
    shape = (_MOST, *(size if length == ANY else length for length in (spec.shape or (ANY,))[1:]))
    if spec.datatype == "BYTES":
        words = np.array(["a", "b", "c", "row", "text", "x1", "0", "model"], dtype=object)
        return words[rng.integers(0, len(words), shape)]
    if spec.datatype == "BOOL":
        return rng.integers(0, 2, shape).astype(np.bool_)
    if spec.datatype == "BF16":
        return (rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if spec.dtype.kind == "f":
        return rng.standard_normal(shape).astype(spec.dtype)
    return rng.integers(0, largest + 1, shape).astype(spec.dtype)


def _varied(tensor: Array, rng: np.random.Generator) -> Array:
    """`_MOST` rows made from a sample's, none the same as another where that can be helped."""
    rows: Array = tensor[np.arange(_MOST) % len(tensor)].copy()
    for row in range(len(tensor), _MOST):
        if rows.dtype.kind == "f":
            rows[row] = rows[row] * rng.uniform(0.5, 1.5, rows[row].shape).astype(rows.dtype)
        elif rows.dtype.kind == "O":
            rows[row] = np.array([f"{text} {row}" for text in tensor[0].ravel()], object).reshape(
                rows[row].shape
            )
        else:
            # Only values that the sample has: an id outside the vocabulary would make the model raise.
            rows[row] = rng.choice(np.unique(tensor), rows[row].shape)
    return rows
