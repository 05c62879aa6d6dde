"""Names and errors about tensors stay short, whatever a client or a model calls its tensors."""

from __future__ import annotations

import numpy as np
import pytest
from inferpool.errors import InvalidInput
from inferpool.tensors import (
    ANY,
    JSON,
    Signature,
    TensorSpec,
    check_inputs,
    check_outputs,
    name_text,
    names_text,
    unknown_input,
)

LONG = "n" * 10_000
MANY = Signature(
    tuple(TensorSpec(f"{number}{LONG}", "FP32", (ANY,)) for number in range(1000)),
    tuple(TensorSpec(f"{number}{LONG}", JSON, None) for number in range(1000)),
)


def test_a_name_is_quoted_and_shortened() -> None:
    assert name_text("scores/0:x") == '"scores/0:x"'
    assert name_text("n" * 100) == f'"{"n" * 100}"'
    assert name_text("n" * 101) == f'"{"n" * 100}…"'


def test_long_lists_of_names_end_with_a_count() -> None:
    assert names_text(()) == "none"
    assert names_text(["a"]) == '"a"'
    assert names_text({"a": 1, "b": 2}) == '"a", "b"'
    assert names_text([str(number) for number in range(34)]).endswith('"30", "31" and 2 more')


@pytest.mark.parametrize("given", [{}, {LONG: np.ones(1, np.float32)}])
def test_an_error_about_inputs_is_short(given: dict[str, np.ndarray]) -> None:
    with pytest.raises(InvalidInput) as refused:
        check_inputs(MANY, given)
    assert len(refused.value.detail) < 15_000
    assert "and 968 more" in refused.value.detail


def test_an_error_repeats_only_the_start_of_a_long_name() -> None:
    small = Signature((TensorSpec("x", "FP32", ()),), (TensorSpec("y", "FP32", ()),))
    with pytest.raises(InvalidInput) as refused:
        check_outputs(small, (LONG,))
    for error in (refused.value, unknown_input(small, LONG)):
        assert len(error.detail) < 200
        assert len(str(error.members)) < 200


def test_an_output_that_is_not_a_tensor_has_no_dtype() -> None:
    with pytest.raises(KeyError):
        _ = TensorSpec("scores", JSON, None).dtype


def test_dimensions_with_the_same_symbol_must_be_equal() -> None:
    signature = Signature(
        (
            TensorSpec("ids", "FP32", (ANY, ANY), symbols=("", "tokens")),
            TensorSpec("mask", "FP32", (ANY, ANY), symbols=("", "tokens")),
        ),
        (),
    )
    check_inputs(signature, {"ids": np.ones((2, 3), np.float32), "mask": np.ones((2, 3), np.float32)})
    with pytest.raises(InvalidInput) as refused:
        check_inputs(signature, {"ids": np.ones((2, 3), np.float32), "mask": np.ones((2, 4), np.float32)})
    assert refused.value.detail == (
        'tensor "ids" has shape [2, 3] and tensor "mask" [2, 4]; dimension 1 of the first and dimension 1 of'
        ' the second must be equal ("tokens")'
    )
    assert refused.value.members == {"tensor": "mask", "expected": 3, "got": 4}
