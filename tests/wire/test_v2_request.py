"""Requests of the Open Inference Protocol, in JSON, in binary form and raw, become tensors or errors."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import orjson
import pytest
from inferpool.errors import BodyTooLarge, InvalidInput, MalformedBody, RequestError
from inferpool.tensors import ANY, Signature, TensorSpec
from inferpool.wire.v2_request import RequestedOutput, parse_infer

from tests.wire.conftest import any_shape, takes


def request(**entry: Any) -> bytes:
    return orjson.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [2]} | entry]})


def framed(content: bytes, **entry: Any) -> tuple[bytes, int]:
    header = request(parameters={"binary_data_size": len(content)}, **entry)
    return header + content, len(header)


@pytest.mark.usefixtures("way")
class TestJsonBodies:
    @pytest.mark.parametrize("data", [[[1, 2, 3], [4, 5, 6]], [1, 2, 3, 4, 5, 6]])
    @pytest.mark.parametrize("datatype", ["FP32", "INT64", "UINT8"])
    def test_data_is_flat_or_nested(self, data: list[Any], datatype: str) -> None:
        body = request(shape=[2, 3], data=data, datatype=datatype)
        assert parse_infer(body, None).tensors(any_shape(datatype, 2))["x"].tolist() == [[1, 2, 3], [4, 5, 6]]

    def test_a_scalar_has_an_empty_shape(self) -> None:
        for data in (7, [7]):
            assert parse_infer(request(shape=[], data=data), None).tensors(takes("FP32"))["x"].shape == ()

    @pytest.mark.parametrize(
        "data", [[[1, 2], [3, 4], [5, 6]], [1, 2, 3, 4, 5], [[1, 2, 3], [4, 5]], [[1, 2, 3], [4, 5, [6]]], 1]
    )
    def test_data_that_does_not_fill_the_shape_is_refused(self, data: Any) -> None:
        with pytest.raises(InvalidInput) as caught:
            parse_infer(request(shape=[2, 3], data=data), None).tensors(any_shape("FP32", 2))
        assert caught.value.members["tensor"] == "x"

    def test_a_ragged_tensor_beside_lists_that_are_not_tensors_is_refused(self) -> None:
        decoys = {"data": [[1, 2], [3, 4]], "shape": [[1, 2], [3, 4]]}
        for data in ([[1, 2, 3], [4]], [[1, 2], [[3], 4]], [[1, 2], [3, 4, 5]]):
            entry = {"name": "x", "datatype": "FP32", "shape": [2, 2], "parameters": decoys, "data": data}
            for before in ({"z": decoys, "inputs": [entry]}, {"inputs": [entry], "parameters": decoys}):
                with pytest.raises(InvalidInput):
                    parse_infer(orjson.dumps(before), None).tensors(any_shape("FP32", 2))

    def test_fields_and_parameters_are_read(self) -> None:
        body = orjson.dumps(
            {
                "id": "a",
                "parameters": {"timeout": 1500, "priority": 1, "binary_data_output": True, "mine": "x"},
                "inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}],
                "outputs": [
                    {"name": "p", "parameters": {"binary_data": False, "classification": 3, "own": 1}},
                    {"name": "q"},
                ],
                "unknown": [[1]],
            }
        )
        read = parse_infer(body, None)
        assert (read.id, read.timeout_ms, read.priority, read.binary_data_output) == ("a", 1.5, 1, True)
        assert read.parameters["mine"] == "x"
        assert read.outputs == (RequestedOutput("p", False, 3, {"own": 1}), RequestedOutput("q"))
        assert read.tensors(any_shape("FP32", 1))["x"].tolist() == [1]

    @pytest.mark.parametrize(
        "entry",
        [
            {},
            {"data": [1, 2], "parameters": {"binary_data_size": 8}},
            {"data": [1, 2], "datatype": "FP33"},
            {"data": [1, 2], "datatype": None},
            {"data": [1, 2], "shape": [-2]},
            {"data": [1, 2], "shape": [True]},
            {"data": [1, 2], "shape": [2.5]},
            {"data": [1, 2], "shape": 2},
            {"data": [1, 2], "shape": [2**40, 2**40]},
            {"data": [], "shape": [0, 2**62, 2**62]},
            {"data": [1, 2], "shape": [1] * 40},
            {"data": [1, 2], "name": 1},
            {"data": [1, 2], "name": "z"},
            {"data": [1, 2], "datatype": "INT8"},
            {"data": [1, 2], "parameters": []},
            {"parameters": {"shared_memory_region": "r"}},
            {"data": ["a", "b"]},
            {"data": [1, 1e39]},
            {"data": None},
            {"data": {}},
        ],
    )
    def test_a_wrong_input_is_refused(self, entry: dict[str, Any]) -> None:
        with pytest.raises(InvalidInput):
            parse_infer(request(**entry), None).tensors(any_shape("FP32", 1))

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"inputs": {}},
            {"inputs": [1]},
            {"inputs": [], "id": 1},
            {"inputs": [], "parameters": []},
            {"inputs": [], "parameters": {"timeout": -1}},
            {"inputs": [], "parameters": {"priority": "1"}},
            {"inputs": [], "parameters": {"binary_data_output": 1}},
            {"inputs": [], "outputs": {}},
            {"inputs": [], "outputs": ["y"]},
            {"inputs": [], "outputs": [{"name": "y"}, {"name": "y"}]},
            {"inputs": [], "outputs": [{"name": "y", "parameters": {"classification": -1}}]},
            {"inputs": [], "outputs": [{"name": "y", "parameters": {"shared_memory_region": "r"}}]},
            {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}] * 2},
        ],
    )
    def test_a_wrong_field_is_refused(self, fields: dict[str, Any]) -> None:
        with pytest.raises(InvalidInput):
            parse_infer(orjson.dumps(fields), None)


class TestFraming:
    def test_json_and_binary_inputs_mix(self) -> None:
        signature = Signature(
            tuple(
                TensorSpec(name, datatype, (ANY,))
                for name, datatype in zip("abc", ("INT8", "FP32", "BYTES"), strict=True)
            ),
            (),
        )
        text = struct.pack("<I", 2) + "é".encode() + struct.pack("<I", 0)
        header = orjson.dumps(
            {
                "inputs": [
                    {
                        "name": "c",
                        "datatype": "BYTES",
                        "shape": [2],
                        "parameters": {"binary_data_size": len(text)},
                    },
                    {"name": "b", "datatype": "FP32", "shape": [1], "data": [1.5]},
                    {"name": "a", "datatype": "INT8", "shape": [3], "parameters": {"binary_data_size": 3}},
                ]
            }
        )
        tensors = parse_infer(header + text + b"\x01\x02\xff", len(header)).tensors(signature)
        assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
            "a": [1, 2, -1],
            "b": [1.5],
            "c": ["é", ""],
        }

    def test_an_aligned_tensor_is_a_view_of_the_body(self) -> None:
        for padding in range(4):
            content = np.arange(2, dtype=np.float32).tobytes()
            header = request(parameters={"binary_data_size": 8}) + b" " * padding
            body = header + content
            tensor = parse_infer(body, len(header)).tensors(any_shape("FP32", 1))["x"]
            aligned = np.frombuffer(body, np.float32, 2, len(header)).flags.aligned
            assert np.shares_memory(tensor, np.frombuffer(body, np.uint8)) == aligned
            assert tensor.tolist() == [0, 1]

    @pytest.mark.parametrize("length", [-1, 1, 5000])
    def test_a_wrong_header_length_is_malformed(self, length: int) -> None:
        with pytest.raises(MalformedBody):
            parse_infer(request(data=[1, 2]), length)

    def test_binary_data_needs_the_header_length(self) -> None:
        with pytest.raises(MalformedBody, match="Inference-Header-Content-Length"):
            parse_infer(request(parameters={"binary_data_size": 8}), None)

    def test_missing_and_surplus_bytes_are_malformed(self) -> None:
        body, length = framed(bytes(8))
        for wrong in (body[:-1], body + b"\0"):
            with pytest.raises(MalformedBody):
                parse_infer(wrong, length)

    @pytest.mark.parametrize(
        ("datatype", "shape", "content"),
        [
            ("FP32", [3], bytes(8)),
            ("BYTES", [1], b"\0\0"),
            ("BYTES", [1], b"\x05\0\0\0ab"),
            ("BYTES", [2], b"\x01\0\0\0a"),
            ("BYTES", [1], b"\xff\xff\xff\xff"),
            ("BYTES", [0], b"\0\0\0\0"),
        ],
    )
    def test_binary_data_of_the_wrong_size_is_malformed(
        self, datatype: str, shape: list[int], content: bytes
    ) -> None:
        body, length = framed(content, datatype=datatype, shape=shape)
        with pytest.raises(MalformedBody, match='tensor "x"'):
            parse_infer(body, length).tensors(any_shape(datatype, 1))

    @pytest.mark.parametrize(("datatype", "content"), [("BYTES", b"\x01\0\0\0\xff"), ("BOOL", b"\x02")])
    def test_elements_that_are_impossible_in_the_datatype_are_refused(
        self, datatype: str, content: bytes
    ) -> None:
        body, length = framed(content, datatype=datatype, shape=[1])
        with pytest.raises(InvalidInput, match='tensor "x"'):
            parse_infer(body, length).tensors(any_shape(datatype, 1))


class TestRawBodies:
    def test_the_number_of_rows_follows_from_the_size(self) -> None:
        body = np.arange(6, dtype=np.float32).tobytes()
        read = parse_infer(body, 0)
        assert read.binary_data_output
        assert read.tensors(takes("FP32", ANY, 3))["x"].tolist() == [[0, 1, 2], [3, 4, 5]]

    def test_with_another_variable_dimension_there_is_one_row(self) -> None:
        body = np.arange(6, dtype=np.float32).tobytes()
        assert parse_infer(body, 0).tensors(takes("FP32", ANY, ANY, 2))["x"].shape == (1, 3, 2)
        assert parse_infer(body, 0).tensors(takes("FP32", 2, ANY))["x"].shape == (2, 3)
        assert parse_infer(body[:4], 0).tensors(takes("FP32"))["x"].shape == ()

    def test_a_raw_body_of_text_is_one_string(self) -> None:
        for shape in ((1,), (ANY, 1), ()):
            tensor = parse_infer("é\0".encode(), 0).tensors(takes("BYTES", *shape))["x"]
            assert tensor.reshape(-1).tolist() == ["é\0"]

    @pytest.mark.parametrize(
        ("signature", "size"),
        [
            (takes("FP32", ANY, 3), 13),
            (takes("FP32", ANY, ANY, ANY), 12),
            (takes("FP32", 0, ANY), 12),
            (takes("BYTES", ANY, 2), 4),
            (Signature((TensorSpec("a", "FP32", (1,)), TensorSpec("b", "FP32", (1,))), ()), 8),
        ],
    )
    def test_a_raw_body_without_a_unique_shape_is_refused(self, signature: Signature, size: int) -> None:
        with pytest.raises(RequestError):
            parse_infer(bytes(size), 0).tensors(signature)


@pytest.mark.parametrize("name", ["inputs", "outputs"])
def test_too_many_tensors_are_refused(name: str) -> None:
    member = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
    fields = {"inputs": [member], name: [{**member, "name": str(index)} for index in range(4097)]}
    with pytest.raises(InvalidInput, match=f'"{name}" has 4097 members; it takes 4096'):
        parse_infer(orjson.dumps(fields), None)


def test_a_shape_with_too_many_sizes_is_refused_with_a_short_message() -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1] * 100_000, "data": [1]}
    with pytest.raises(InvalidInput, match="at most 32 sizes") as caught:
        parse_infer(orjson.dumps({"inputs": [tensor]}), None)
    assert len(caught.value.detail) < 500


def test_a_raw_text_is_bounded_as_others_are() -> None:
    signature = Signature((TensorSpec("x", "BYTES", (ANY,)),), ())
    with pytest.raises(BodyTooLarge, match='tensor "x" has 1 strings, which take 17825896 bytes of memory'):
        parse_infer(b"a" * (17 * 2**20), 0).tensors(signature)
