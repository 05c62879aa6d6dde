"""Outputs become answers of the Open Inference Protocol in JSON and in binary form."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from inferpool.errors import InvalidInput, ModelFailed
from inferpool.tensors import DTYPES, Array, Signature, TensorSpec
from inferpool.wire.v2_request import RequestedOutput, parse_infer
from inferpool.wire.v2_response import encode_infer

from tests.wire.conftest import any_shape

TEXT = st.text(max_size=6)


def given_outputs(**outputs: str) -> Signature:
    return Signature((), tuple(TensorSpec(name, datatype, None) for name, datatype in outputs.items()))


def arrays(datatype: str) -> st.SearchStrategy[Array]:
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
    return hnp.arrays(DTYPES[datatype], shapes, elements=TEXT if datatype == "BYTES" else None)


TENSORS = st.sampled_from(list(DTYPES)).flatmap(
    lambda datatype: st.tuples(st.just(datatype), arrays(datatype))
)


def same(left: Array, right: Array) -> bool:
    equal = left.tolist() == right.tolist() if left.dtype == object else left.tobytes() == right.tobytes()
    return (left.dtype, left.shape, equal) == (right.dtype, right.shape, True)


@given(TENSORS, st.integers(0, 8))
def test_an_output_in_binary_form_can_be_sent_as_an_input(sent: tuple[str, Array], padding: int) -> None:
    datatype, tensor = sent
    parts, length = encode_infer(
        "m", "1", "i", {"x": tensor}, None, True, Signature((), (TensorSpec("x", datatype, None),))
    )
    answer = orjson.loads(parts[0])
    assert length == len(parts[0])
    assert answer["outputs"][0]["shape"] == list(tensor.shape)
    content = b"".join(parts[1:])
    header = orjson.dumps({"inputs": answer["outputs"]}) + b" " * padding
    read = parse_infer(header + content, len(header)).tensors(any_shape(datatype, tensor.ndim))["x"]
    assert same(read, tensor)
    assert read.flags.aligned
    assert read.flags.c_contiguous


@given(TENSORS)
def test_an_output_in_json_can_be_sent_as_an_input(sent: tuple[str, Array]) -> None:
    """Every number comes back as it was; those that are not finite come back as NaN."""
    datatype, tensor = sent
    signature = Signature((), (TensorSpec("x", datatype, None),))
    parts, length = encode_infer("m", "1", "i", {"x": tensor}, None, False, signature)
    assert length is None
    body = orjson.dumps({"inputs": orjson.loads(parts[0])["outputs"]})
    back = parse_infer(body, None).tensors(any_shape(datatype, tensor.ndim))["x"]
    if datatype == "BF16":
        infinite = (tensor & 0x7F80) == 0x7F80
        assert ((back[infinite] & 0x7FFF) > 0x7F80).all()
        assert same(back[~infinite], tensor[~infinite])
        return
    if tensor.dtype.kind == "f":
        tensor = np.where(np.isfinite(tensor), tensor, tensor.dtype.type(np.nan))
    assert same(back, tensor)


class TestAnswers:
    def test_the_output_decides_on_binary_form_and_else_the_request(self) -> None:
        outputs = {"a": np.array([1], np.float32), "b": np.array([2], np.int64), "c": np.array([3], np.uint8)}
        requested = [RequestedOutput("c"), RequestedOutput("a", False), RequestedOutput("b", True)]
        signature = given_outputs(a="FP32", b="INT64", c="UINT8")
        parts, length = encode_infer("m", "2", "i", outputs, requested, True, signature)
        assert length == len(parts[0])
        assert orjson.loads(parts[0]) == {
            "model_name": "m",
            "model_version": "2",
            "id": "i",
            "outputs": [
                {"name": "c", "datatype": "UINT8", "shape": [1], "parameters": {"binary_data_size": 1}},
                {"name": "a", "datatype": "FP32", "shape": [1], "data": [1.0]},
                {"name": "b", "datatype": "INT64", "shape": [1], "parameters": {"binary_data_size": 8}},
            ],
        }
        assert b"".join(parts[1:]) == b"\x03" + struct.pack("<q", 2)

    def test_a_large_output_is_not_copied(self) -> None:
        output = np.zeros((100, 100), np.float32)
        parts, _ = encode_infer("m", "1", "", {"y": output}, None, True, given_outputs(y="FP32"))
        assert np.shares_memory(np.frombuffer(parts[1], np.uint8), output)
        assert "id" not in orjson.loads(parts[0])

    def test_numbers_that_are_not_finite_are_null_and_marked(self) -> None:
        output = np.array([[1, np.nan]], np.float32)
        parts, _ = encode_infer("m", "1", "", {"y": output}, None, False, given_outputs(y="FP32"))
        (entry,) = orjson.loads(parts[0])["outputs"]
        assert entry["data"] == [1.0, None]
        assert entry["parameters"] == {"non_finite": True}

    def test_bf16_keeps_its_name_and_is_written_as_numbers(self) -> None:
        output = np.array([0x3FC0], np.uint16)
        parts, _ = encode_infer("m", "1", "", {"y": output}, None, False, given_outputs(y="BF16"))
        (entry,) = orjson.loads(parts[0])["outputs"]
        assert (entry["datatype"], entry["data"]) == ("BF16", [1.5])

    def test_sequences_and_maps_are_json_text(self) -> None:
        output = [{"a": 0.5}, {"b": 1.0}]
        parts, _ = encode_infer("m", "1", "", {"y": output}, None, False, given_outputs(y="BYTES"))
        (entry,) = orjson.loads(parts[0])["outputs"]
        assert (entry["datatype"], entry["shape"]) == ("BYTES", [2])
        assert [orjson.loads(text) for text in entry["data"]] == output

    @pytest.mark.parametrize(
        ("output", "datatype", "classes"),
        [
            (np.array([[1, 5, 10, 4]], np.int32), "INT32", [["10:2:c", "5:1:b"]]),
            (np.array([[1, 5], [255, 0]], np.uint8), "UINT8", [["5:1:b", "1:0:a"], ["255:0:a", "0:1:b"]]),
            (np.array([[0.5, 0.25, 0.5]], np.float32), "FP32", [["0.500000:0:a", "0.500000:2:c"]]),
            (np.array([1, np.nan, 2, 3], np.float64), "FP64", ["3.000000:3", "2.000000:2:c"]),
            (np.array([[0x3F80, 0xBF80]], np.uint16), "BF16", [["1.000000:0:a", "-1.000000:1:b"]]),
            (np.array([[7]], np.float32), "FP32", [["7.000000:0:a"]]),
            (np.empty((0, 3), np.float32), "FP32", np.empty((0, 2), object)),
            (np.empty((2, 0), np.float32), "FP32", np.empty((2, 0), object)),
        ],
    )
    def test_a_classification_gives_the_best_of_each_row(
        self, output: Array, datatype: str, classes: list[Any] | Array
    ) -> None:
        wanted = [RequestedOutput("y", False, 2)]
        signature = given_outputs(y=datatype)
        parts, _ = encode_infer("m", "1", "", {"y": output}, wanted, False, signature, {"y": ["a", "b", "c"]})
        (entry,) = orjson.loads(parts[0])["outputs"]
        assert entry["datatype"] == "BYTES"
        assert entry["shape"] == list(np.shape(classes))
        assert entry["data"] == np.ravel(classes).tolist()

    @pytest.mark.parametrize("binary", [False, True])
    def test_a_lone_surrogate_in_an_output_is_a_failure_of_the_model(self, binary: bool) -> None:
        output = np.array(["\ud800"], dtype=object)
        with pytest.raises(ModelFailed):
            encode_infer("m", "1", "", {"y": output}, None, binary, given_outputs(y="BYTES"))

    @pytest.mark.parametrize(
        ("output", "datatype"),
        [
            (np.array(["a"], object), "BYTES"),
            (np.array([True]), "BOOL"),
            (np.zeros(1_000_001, np.uint8), "UINT8"),
        ],
    )
    def test_a_classification_of_text_booleans_or_too_many_numbers_is_refused(
        self, output: Array, datatype: str
    ) -> None:
        wanted = [RequestedOutput("y", None, 1)]
        with pytest.raises(InvalidInput, match="a classification takes"):
            encode_infer("m", "1", "", {"y": output}, wanted, True, given_outputs(y=datatype))

    def test_an_output_without_a_spec_has_the_datatype_of_its_array(self) -> None:
        parts, _ = encode_infer("m", "1", "", {"y": np.array([7], np.int16)}, None, False, Signature((), ()))
        (entry,) = orjson.loads(parts[0])["outputs"]
        assert (entry["datatype"], entry["data"]) == ("INT16", [7])
