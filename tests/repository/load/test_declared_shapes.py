"""Names and sizes that files declare are believed only as far as runs agree."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from inferpool.backends.base import LoadedModel
from inferpool.errors import InvalidInput
from inferpool.repository.load.declared_shapes import (
    ShapeCorrections,
    corrected,
    free_names,
    output_corrections,
    without_names,
)
from inferpool.tensors import ANY, Signature, Tensors, TensorSpec, check_inputs


class TwoInputs(LoadedModel):
    """A model that answers a function of "a" and "b", whose second dimensions have one name."""

    def __init__(self, function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        specs = (TensorSpec(name, "FP32", (ANY, ANY), symbols=("n", "size")) for name in "ab")
        self.signature = Signature(tuple(specs), (TensorSpec("y", "FP32", (1, 3)),))
        self._function = function

    def run(self, inputs: Tensors, outputs: object = None) -> Tensors:
        return {"y": self._function(inputs["a"], inputs["b"])}

    def close(self) -> None:
        pass


def needs_equal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.shape != b.shape:
        raise ValueError("the sizes differ")
    return a + b


def needs_none(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.stack([a.mean(1), b.mean(1)], 1)


REQUEST = {name: np.ones((1, 4), np.float32) for name in "ab"}


def test_a_name_binds_sizes_if_the_model_needs_them_equal() -> None:
    assert free_names(TwoInputs(needs_equal), REQUEST, batched=True) == ()


def test_a_name_that_binds_nothing_is_dropped() -> None:
    model = TwoInputs(needs_none)
    names = free_names(model, REQUEST, batched=True)
    assert names == ("size",)
    unequal = {"a": np.ones((2, 3), np.float32), "b": np.ones((2, 5), np.float32)}
    with pytest.raises(InvalidInput):
        check_inputs(model.signature, unequal)
    check_inputs(corrected(model.signature, ShapeCorrections(names)), unequal)
    # Whether the rows of an unbatched model have to be equal is its own affair as well.
    assert set(free_names(TwoInputs(lambda a, b: a[:1] + b[:1]), REQUEST, batched=False)) == {"n", "size"}


def test_a_request_that_has_unequal_sizes_is_proof_enough() -> None:
    request = {"a": np.ones((1, 3), np.float32), "b": np.ones((1, 5), np.float32)}
    assert free_names(TwoInputs(needs_equal), request, batched=True) == ("size",)


def test_no_name_is_believed_of_a_model_that_could_not_be_run() -> None:
    assert free_names(TwoInputs(needs_equal), {}, batched=False) == ("n", "size")
    assert without_names(TwoInputs(needs_equal).signature).shared_symbols == {}


@pytest.mark.parametrize(
    ("declared", "shapes", "batched", "right"),
    [
        ((1,), [(1,), (2,)], True, (ANY,)),
        ((1,), [(1,)], True, (ANY,)),
        ((1,), [(1,)], False, None),
        ((ANY, 3), [(1, 3), (2, 3)], True, None),
        ((ANY, 3), [(1, 5)], True, (ANY, ANY)),
        ((ANY, 7, 7), [(1, 7, 7), (1, 14, 7)], True, (ANY, ANY, 7)),
        ((1, 3), [(2,)], False, (ANY,)),
    ],
)
def test_sizes_that_an_output_does_not_have_are_any(
    declared: tuple[int, ...],
    shapes: list[tuple[int, ...]],
    batched: bool,
    right: tuple[int, ...] | None,
) -> None:
    signature = Signature((), (TensorSpec("y", "FP32", declared),))
    runs = [{"y": np.zeros(shape, np.float32)} for shape in shapes]
    found = output_corrections(signature, runs, batched=batched)
    assert dict(found).get("y") == right
    after = corrected(signature, ShapeCorrections((), found)).outputs[0].shape
    assert after == (right or declared)
