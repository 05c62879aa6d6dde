"""Open Inference Protocol bodies become tensors and outputs become answers, in JSON and in binary form."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from inferpool.errors import InvalidInput, MalformedBody, ModelFailed, RequestError
from inferpool.tensors import ANY, DTYPES, Array, Signature, TensorSpec
from inferpool.wire.v2_request import RequestedOutput, parse_infer
from inferpool.wire.v2_response import encode_infer

from tests.wire.conftest import any_shape, takes

TEXT = st.text(max_size=6)


def request(**entry: Any) -> bytes:
    return orjson.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [2]} | entry]})


def framed(content: bytes, **entry: Any) -> tuple[bytes, int]:
    header = request(parameters={"binary_data_size": len(content)}, **entry)
    return header + content, len(header)


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
def test_an_output_in_binary_form_is_taken_back_as_an_input(sent: tuple[str, Array], padding: int) -> None:
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
def test_an_output_in_json_is_taken_back_as_an_input(sent: tuple[str, Array]) -> None:
    datatype, tensor = sent
    if tensor.dtype.kind == "f":
        tensor = np.asarray(np.nan_to_num(tensor))
    signature = Signature((), (TensorSpec("x", datatype, None),))
    parts, length = encode_infer("m", "1", "i", {"x": tensor}, None, False, signature)
    assert length is None
    body = orjson.dumps({"inputs": orjson.loads(parts[0])["outputs"]})
    if datatype == "BF16":
        with pytest.raises(InvalidInput):
            parse_infer(body, None).tensors(any_shape(datatype, tensor.ndim))
        return
    assert same(parse_infer(body, None).tensors(any_shape(datatype, tensor.ndim))["x"], tensor)


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

    def test_a_ragged_tensor_does_not_hide_behind_lists_that_are_no_tensors(self) -> None:
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

    def test_a_truncated_tensor_and_surplus_bytes_are_malformed(self) -> None:
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
    def test_bytes_that_are_not_the_shapes_are_malformed(
        self, datatype: str, shape: list[int], content: bytes
    ) -> None:
        body, length = framed(content, datatype=datatype, shape=shape)
        with pytest.raises(MalformedBody, match='tensor "x"'):
            parse_infer(body, length).tensors(any_shape(datatype, 1))

    @pytest.mark.parametrize(("datatype", "content"), [("BYTES", b"\x01\0\0\0\xff"), ("BOOL", b"\x02")])
    def test_content_that_the_datatype_does_not_have_is_refused(self, datatype: str, content: bytes) -> None:
        body, length = framed(content, datatype=datatype, shape=[1])
        with pytest.raises(InvalidInput, match='tensor "x"'):
            parse_infer(body, length).tensors(any_shape(datatype, 1))


class TestRawBodies:
    def test_rows_are_counted(self) -> None:
        body = np.arange(6, dtype=np.float32).tobytes()
        read = parse_infer(body, 0)
        assert read.binary_data_output
        assert read.tensors(takes("FP32", ANY, 3))["x"].tolist() == [[0, 1, 2], [3, 4, 5]]

    def test_with_another_open_dimension_the_rows_are_one(self) -> None:
        body = np.arange(6, dtype=np.float32).tobytes()
        assert parse_infer(body, 0).tensors(takes("FP32", ANY, ANY, 2))["x"].shape == (1, 3, 2)
        assert parse_infer(body, 0).tensors(takes("FP32", 2, ANY))["x"].shape == (2, 3)
        assert parse_infer(body[:4], 0).tensors(takes("FP32"))["x"].shape == ()

    def test_text_is_one_string(self) -> None:
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
    def test_a_body_whose_shape_does_not_follow_is_refused(self, signature: Signature, size: int) -> None:
        with pytest.raises(RequestError):
            parse_infer(bytes(size), 0).tensors(signature)


class TestAnswers:
    def test_binary_form_goes_by_output_and_else_by_request(self) -> None:
        outputs = {"a": np.float32([1]), "b": np.int64([2]), "c": np.uint8([3])}
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

    def test_what_is_not_finite_is_null_and_marked(self) -> None:
        output = np.float32([[1, np.nan]])
        parts, _ = encode_infer("m", "1", "", {"y": output}, None, False, given_outputs(y="FP32"))
        (entry,) = orjson.loads(parts[0])["outputs"]
        assert entry["data"] == [1.0, None]
        assert entry["parameters"] == {"non_finite": True}

    def test_bf16_keeps_its_name_and_is_written_as_numbers(self) -> None:
        output = np.uint16([0x3FC0])
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
            (np.int32([[1, 5, 10, 4]]), "INT32", [["10:2:c", "5:1:b"]]),
            (np.uint8([[1, 5], [255, 0]]), "UINT8", [["5:1:b", "1:0:a"], ["255:0:a", "0:1:b"]]),
            (np.float32([[0.5, 0.25, 0.5]]), "FP32", [["0.500000:0:a", "0.500000:2:c"]]),
            (np.float64([1, np.nan, 2, 3]), "FP64", ["3.000000:3", "2.000000:2:c"]),
            (np.uint16([[0x3F80, 0xBF80]]), "BF16", [["1.000000:0:a", "-1.000000:1:b"]]),
            (np.float32([[7]]), "FP32", [["7.000000:0:a"]]),
        ],
    )
    def test_a_classification_gives_the_best_of_each_row(
        self, output: Array, datatype: str, classes: list[Any]
    ) -> None:
        wanted = [RequestedOutput("y", False, 2)]
        signature = given_outputs(y=datatype)
        parts, _ = encode_infer("m", "1", "", {"y": output}, wanted, False, signature, {"y": ["a", "b", "c"]})
        (entry,) = orjson.loads(parts[0])["outputs"]
        assert entry["datatype"] == "BYTES"
        assert entry["shape"] == list(np.shape(classes))
        assert entry["data"] == np.ravel(classes).tolist()

    @pytest.mark.parametrize("binary", [False, True])
    def test_a_lone_surrogate_from_the_model_is_its_failure(self, binary: bool) -> None:
        output = np.array(["\ud800"], dtype=object)
        with pytest.raises(ModelFailed):
            encode_infer("m", "1", "", {"y": output}, None, binary, given_outputs(y="BYTES"))

    def test_a_classification_of_text_is_refused(self) -> None:
        with pytest.raises(InvalidInput, match="classification"):
            encode_infer(
                "m",
                "1",
                "",
                {"y": np.array(["a"], object)},
                [RequestedOutput("y", None, 1)],
                True,
                given_outputs(y="BYTES"),
            )


@pytest.mark.parametrize("name", ["inputs", "outputs"])
def test_no_model_has_so_many_tensors(name: str) -> None:
    member = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
    fields = {"inputs": [member], name: [{**member, "name": str(place)} for place in range(4097)]}
    with pytest.raises(InvalidInput, match=f'"{name}" has 4097 members; it takes 4096'):
        parse_infer(orjson.dumps(fields), None)


def test_a_shape_of_many_sizes_is_refused_by_its_first() -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1] * 100_000, "data": [1]}
    with pytest.raises(InvalidInput, match="at most 32 sizes") as caught:
        parse_infer(orjson.dumps({"inputs": [tensor]}), None)
    assert len(caught.value.detail) < 500
