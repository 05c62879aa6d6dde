"""Padding as pure maths: what shares a batch, what it costs, and that nothing of a row is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inferpool.backends.base import DeviceModel, LoadedModel
from inferpool.pool.admission import Limits
from inferpool.pool.buckets import BatchBuckets, BucketedModel
from inferpool.pool.device_accounts import DeviceAccount
from inferpool.pool.entry_queue import Queue
from inferpool.pool.padding import STEP, Padding, span
from inferpool.pool.ports import Entry, VersionKey
from inferpool.repository.load.padding_check import check_padding
from inferpool.tensors import Array, Signature, Tensors, TensorSpec

FILLS = {"ids": 7, "mask": 0}
KEY = VersionKey("m", 1)


def rows_of(length: int, rows: int = 1, seed: int = 0) -> Tensors:
    ids = np.random.default_rng(seed).integers(8, 100, (rows, length))
    return {"ids": ids, "mask": np.ones_like(ids)}


@given(st.integers(1, 100_000))
def test_a_span_bounds_the_padding(length: int) -> None:
    assert length <= span(length) <= span(length + 1)
    assert span(length) - length < max(STEP, length / 8 + 1)
    assert span(span(length)) == span(length)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3)), min_size=1, max_size=8))
def test_gathered_rows_are_the_parts_and_fills(shapes: list[tuple[int, int]]) -> None:
    padding = Padding(FILLS, "ids", 32, 512, axes={"y": (1,)})
    parts = [rows_of(length, rows, seed) for seed, (length, rows) in enumerate(shapes)]
    gathered = padding.gather(parts)
    longest = max(length for length, _ in shapes)
    start = 0
    for part, (length, rows) in zip(parts, shapes, strict=True):
        for name, fill in FILLS.items():
            assert gathered[name].shape[1] == longest
            mine = gathered[name][start : start + rows]
            np.testing.assert_array_equal(mine[:, :length], part[name])
            assert (mine[:, length:] == fill).all()
        cut = padding.cut({"y": gathered["ids"][start : start + rows], "z": np.zeros((rows, 3))}, length)
        np.testing.assert_array_equal(cut["y"], part["ids"])
        assert cut["z"].shape == (rows, 3)
        start += rows


@given(st.integers(1, 600), st.integers(1, 512))
def test_lengths_are_rounded_up_only_on_demand(length: int, longest: int) -> None:
    """Few lengths are run; none is shorter than the row or longer than the model takes."""
    padding = Padding(FILLS, "ids", 32, longest, proven=True, rounded=True)
    run = padding.run_length(length)
    assert length <= run <= max(length, longest)
    assert padding.run_length(run) == run
    assert run in (span(length), longest, length)
    assert (run == length) or length < longest
    assert replace(padding, rounded=False).run_length(length) == length
    assert replace(padding, proven=False).run_length(length) == length


def test_the_shapes_of_bucketed_runs_are_bounded() -> None:
    """Texts of up to 512 tokens run with 32 lengths, those of up to 8192 with 64."""
    for longest, count in ((512, 32), (8192, 64)):
        padding = Padding(FILLS, "ids", 32, longest, proven=True, rounded=True)
        assert len({padding.run_length(length) for length in range(1, longest + 1)}) == count


class Spans(DeviceModel):
    """Sums the ids where the mask is 1, and doubles each; it keeps the shapes that it was run with."""

    signature = Signature(
        tuple(TensorSpec(name, "INT64", (-1, -1)) for name in FILLS),
        (TensorSpec("sum", "INT64", (-1,)), TensorSpec("doubled", "INT64", (-1, -1))),
    )

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def run(self, inputs: Tensors, outputs: Sequence[str] | None = None) -> Tensors:
        self.shapes.append(inputs["ids"].shape)
        return {"sum": (inputs["ids"] * inputs["mask"]).sum(axis=1), "doubled": 2 * inputs["ids"]}

    def run_padded(
        self, parts: Sequence[Tensors], rows: int, outputs: Sequence[str] | None = None
    ) -> Tensors:
        inputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        missing = rows - len(inputs["ids"])
        padded = {name: np.pad(tensor, ((0, missing), (0, 0))) for name, tensor in inputs.items()}
        return {name: tensor[: len(inputs["ids"])] for name, tensor in self.run(padded).items()}

    def close(self) -> None:
        pass


SPANS = Padding(FILLS, "ids", 32, 100, proven=True, axes={"doubled": (1,)}, mask="mask", rounded=True)


@settings(deadline=None)
@given(st.integers(1, 100), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.booleans())
def test_in_buckets_rows_of_tokens_run_with_lengths_that_repeat(
    length: int, counts: list[int], hidden: bool
) -> None:
    """Answers have their own length; rows with hidden tokens are not padded."""
    model = Spans()
    bucketed = BucketedModel(model, BatchBuckets((1, 4, 8)), SPANS)
    parts = [rows_of(length, count, seed) for seed, count in enumerate(counts)]
    if hidden:
        parts[0]["mask"][0, -1] = 0
    answer = bucketed.run_parts(parts)
    inputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert answer["sum"].tolist() == (inputs["ids"] * inputs["mask"]).sum(axis=1).tolist()
    assert answer["doubled"].tolist() == (2 * inputs["ids"]).tolist()
    assert {shape[1] for shape in model.shapes} == {length if hidden else SPANS.run_length(length)}
    assert {shape[0] for shape in model.shapes} <= {1, 4, 8}


def test_rows_of_several_lengths_are_filled_up_once() -> None:
    """The padding is added when a batch is gathered, and cut off when it is scattered."""
    model = Spans()
    bucketed = BucketedModel(model, BatchBuckets((4,)), SPANS)
    parts = [rows_of(length, seed=length) for length in (17, 20, 18)]
    answer = bucketed.run_parts([SPANS.gather(parts)])
    assert model.shapes == [(4, 24)]
    for index, part in enumerate(parts):
        cut = SPANS.cut({"doubled": answer["doubled"][index : index + 1]}, SPANS.length(part))
        assert cut["doubled"].tolist() == (2 * part["ids"]).tolist()


@settings(deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=40), st.integers(1, 64))
def test_batches_of_mixed_lengths_are_bounded_in_tokens_and_padding(lengths: list[int], limit: int) -> None:
    padding = Padding(FILLS, "ids", 32, 512, proven=True)
    queue = Queue(Limits(limit, 10_000, 10**9), lambda rows: 0.0)
    for number, length in enumerate(lengths):
        inputs = rows_of(length)
        group, load = padding.sharing(inputs)
        assert load * 32 >= length
        queue.offer(Entry(number, KEY, inputs, 1, group, 8, 0.0, row_load=load), 0.0)
    served: list[int] = []
    while len(queue):
        slices = queue.take(0.0, DeviceAccount()).slices
        tokens = [padding.length(each.entry.inputs) for each in slices]
        assert len(slices) == 1 or len(slices) * max(tokens) <= 32 * limit, "never more than was measured"
        assert max(tokens) - min(tokens) < max(STEP, max(tokens) / 8 + 1)
        served += [each.entry.id for each in slices]
    assert sorted(served) == list(range(len(lengths)))
    assert queue.rows == 0


def test_unproven_padding_keeps_lengths_apart() -> None:
    padding = Padding(FILLS, "ids", 32, 512)
    groups = {padding.sharing(rows_of(length))[0] for length in (30, 31, 32)}
    assert len(groups) == 3


class Fake(LoadedModel):
    """A model that is a Python function of ids and mask."""

    def __init__(self, function: Callable[[Array, Array], Array]) -> None:
        self.signature = Signature(
            (TensorSpec("ids", "INT64", (-1, -1)), TensorSpec("mask", "INT64", (-1, -1))),
            (TensorSpec("y", "FP32", None),),
        )
        self._function = function

    def run(self, inputs: Tensors, outputs: object = None) -> Tensors:
        return {"y": self._function(inputs["ids"], inputs["mask"]).astype(np.float32)}

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("function", "axes"),
    [
        (lambda ids, mask: (ids * mask).sum(axis=1, keepdims=True) / mask.sum(axis=1, keepdims=True), {}),
        (lambda ids, mask: (ids * mask).max(axis=1, keepdims=True), {}),
        (lambda ids, mask: ids / 3, {"y": (1,)}),
        (lambda ids, mask: ids[:, :, None] * ids[:, None, :], {"y": (1, 2)}),
        (lambda ids, mask: np.cumsum(ids, axis=1), {"y": (1,)}),
    ],
)
def test_harmless_padding_is_proven(
    function: Callable[[Array, Array], Array], axes: dict[str, tuple[int, ...]]
) -> None:
    padding = check_padding(Fake(function), rows_of(32, 8), Padding(FILLS, "ids", 32, 512))
    assert padding.proven, padding.reason
    assert padding.axes == axes
    assert "1 to 32 tokens" in padding.reason


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda ids, mask: ids.mean(axis=1, keepdims=True), "differs"),
        (lambda ids, mask: ids[:, -1:], "differs"),
        (lambda ids, mask: np.cumsum(ids[:, ::-1], axis=1)[:, ::-1], "differs"),
        (lambda ids, mask: ids[:, : 1 + ids.shape[1] // 2], "for 32 tokens"),
        (lambda ids, mask: ids[:, :1] / int(mask.all()), "differs|raised"),
    ],
)
def test_padding_that_shows_is_not_proven(function: Callable[[Array, Array], Array], words: str) -> None:
    with np.errstate(divide="ignore"):
        padding = check_padding(Fake(function), rows_of(32, 8), Padding(FILLS, "ids", 32, 512))
    assert not padding.proven
    assert "never share a batch" in padding.reason
    assert any(word in padding.reason for word in words.split("|")), padding.reason


def test_a_row_with_hidden_tokens_is_not_padded() -> None:
    padding = Padding(FILLS, "ids", 32, 512, proven=True, mask="mask")
    ids = np.ones((2, 5), np.int64)
    shown = {"ids": ids, "mask": np.ones_like(ids)}
    hidden = {"ids": ids, "mask": np.array([[1] * 5, [0] * 5])}
    assert padding.sharing(shown)[0] == padding.sharing({"ids": ids[:, :3], "mask": ids[:, :3]})[0]
    others = {padding.sharing({"ids": ids[:, :n], "mask": ids[:, :n]})[0] for n in range(1, 6)}
    assert padding.sharing(hidden)[0] not in others
    assert padding.sharing(hidden)[0] != padding.sharing({name: t[:, :4] for name, t in hidden.items()})[0]


def test_the_lengths_that_runs_have_are_few_and_known() -> None:
    """Every rounded run has one of these lengths; lengths that are not rounded are not listed."""
    rounded = Padding({"ids": 0}, "ids", 64, 500, proven=True, rounded=True)
    lengths = rounded.run_lengths()
    assert (len(lengths), lengths[0], lengths[-1]) == (32, 8, 500)
    assert {rounded.run_length(length) for length in range(1, 501)} == set(lengths)
    assert replace(rounded, proven=False).run_lengths() == []
    assert replace(rounded, rounded=False).run_lengths() == []
