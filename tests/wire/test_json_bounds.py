"""The Python objects that JSON becomes are bounded before they are made."""

from __future__ import annotations

import tracemalloc

import orjson
import pytest
from inferpool.errors import BodyTooLarge, InvalidInput
from inferpool.http.native.api import NATIVE_API
from inferpool.http.predict.budget import BodyAllowance, ByteBudget
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.request_head import RequestHead
from inferpool.tensors import ANY, MOST_ROWS, Signature, TensorSpec
from inferpool.wire import json_bounds
from inferpool.wire.json_bounds import COUNTED_BYTES, check_json
from inferpool.wire.native_json import parse_request

NUMBERS = Signature((TensorSpec("x", "FP32", (ANY, 4)),), ())
TEXTS = Signature((TensorSpec("x", "BYTES", (ANY, 2)),), ())
OPEN = Signature((TensorSpec("x", "FP32", (ANY, ANY)),), ())


def counting_allowance(signature: Signature | None = None) -> tuple[BodyAllowance, ByteBudget]:
    """Return an allowance that grants everything, and the budget that counts it in `decoded`."""
    budget = ByteBudget(2**62)
    context = PredictContext(NATIVE_API, RequestHead("m", None, []), 0.0)
    return BodyAllowance(budget, context, 2**62, signature), budget


@pytest.fixture(params=["the module in C", "Python"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "Python":
        monkeypatch.setattr(json_bounds, "_json_numbers", None)


@pytest.mark.parametrize(
    "value",
    [
        [[]] * 50_000, [{}] * 40_000, ["a" * 40] * 50_000, ["é" * 40] * 20_000, ["日本" * 20] * 20_000,
        ["a" * 40 + "😀"] * 20_000, [1.5] * 50_000, [2**62] * 50_000, [None, True] * 50_000,
        [{"name": n, "shape": [n]} for n in range(20_000)], {str(n): n for n in range(50_000)},
        [[[[[0.25]]]]] * 10_000,
    ],
)  # fmt: skip
@pytest.mark.usefixtures("_way")
def test_no_more_memory_is_taken_than_was_reserved(value: object) -> None:
    text = orjson.dumps(value)
    allowance, budget = counting_allowance()
    check_json(text, allowance)
    tracemalloc.start()
    read = orjson.loads(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read == value
    assert peak <= budget.decoded


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize(
    ("signature", "piece", "fault"),
    [
        (NUMBERS, b'"a"', "JSON strings; the inputs of this model take at most 65536"),
        (NUMBERS, b"{}", "JSON objects; the inputs of this model take at most 65536"),
        (OPEN, b'"a"', "JSON strings; the inputs of this model take at most 65536"),
        (TEXTS, b"{}", "JSON objects; the inputs of this model take at most 65536"),
    ],
)
def test_values_that_the_inputs_cannot_take_are_refused(
    signature: Signature, piece: bytes, fault: str
) -> None:
    text = b"[" + b",".join([piece] * 70_000) + b"]"
    with pytest.raises(InvalidInput, match=fault):
        check_json(text, counting_allowance(signature)[0])
    if piece != b"{}":  # so many objects take too much memory for any request
        check_json(text, counting_allowance()[0])


def test_lists_are_bounded_by_rows_and_shape() -> None:
    text = b"[" + b",".join([b"[]"] * (MOST_ROWS + 70_000)) + b"]"
    with pytest.raises(InvalidInput, match="JSON lists; the inputs of this model take at most 1065537"):
        check_json(text, counting_allowance(NUMBERS)[0])
    with pytest.raises(BodyTooLarge, match="1070001 lists and 0 objects, which take"):
        check_json(text, counting_allowance(OPEN)[0])


def test_strings_and_lists_that_the_inputs_take_are_read() -> None:
    rows = [["a", "b"]] * 40_000
    tensors = parse_request(orjson.dumps({"inputs": rows}), counting_allowance(TEXTS)[0]).tensors(TEXTS)
    assert tensors["x"].shape == (40_000, 2)


def test_too_many_values_for_one_call_of_the_parser_are_refused() -> None:
    text = b"[" + b",".join([b'""'] * 1_300_000) + b"]"
    with pytest.raises(BodyTooLarge, match="1300000 strings, 1 lists and 0 objects, which take"):
        check_json(text, counting_allowance()[0])


def test_depth_is_bounded() -> None:
    deep = b'{"inputs":' + b"[" * 41 + b"]" * 41 + b"}"
    with pytest.raises(InvalidInput, match="nested 42 deep"):
        check_json(deep, counting_allowance()[0])
    check_json(b'{"inputs":' + b"[" * 39 + b"]" * 39 + b"}", counting_allowance()[0])


def test_a_large_list_of_numbers_is_reserved_once_and_read() -> None:
    body = orjson.dumps({"inputs": [[0.5, 1, 2, 3]] * 20_000})
    assert len(body) > COUNTED_BYTES
    allowance, budget = counting_allowance(NUMBERS)
    tensors = parse_request(body, allowance).tensors(NUMBERS)
    assert tensors["x"].shape == (20_000, 4)
    assert 12 * 80_000 <= budget.decoded <= 16 * 80_000


def test_the_first_fault_is_told_even_if_the_body_is_too_large_to_be_read_again() -> None:
    body = orjson.dumps({"inputs": [[0, 1, 2]] * 700_000})
    with pytest.raises(InvalidInput, match=r"has shape \[700000, 3\], the model takes \[-1, 4\]"):
        parse_request(body, counting_allowance(NUMBERS)[0]).tensors(NUMBERS)
