"""Messages become bodies of `/v2`, and bodies become messages, without a server."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import inferpool
import numpy as np
import orjson
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from inferpool.errors import InvalidInput, MalformedBody
from inferpool.grpc_api.messages import message
from inferpool.grpc_api.translation import to_message, to_rest
from inferpool.grpc_api.wire_format import MOST_FIELDS, split_raw

REQUEST = message("ModelInferRequest")
FOLDER = Path(inferpool.__file__).with_name("grpc_api")


def typed(datatype: str, field: str, *elements: Any, shape: tuple[int, ...] | None = None) -> Any:
    request = REQUEST(model_name="m")
    tensor = request.inputs.add(name="x", datatype=datatype, shape=shape or (len(elements),))
    getattr(tensor.contents, field).extend(elements)
    return request


def translated(request: Any) -> tuple[dict[str, Any], bytes]:
    """The JSON and the tensors of a request that came over the wire."""
    rest, raw = split_raw(request.SerializeToString())
    found = to_rest(REQUEST.FromString(rest), raw)
    body = b"".join(map(bytes, found.parts))
    return orjson.loads(body[: found.header_length]), body[found.header_length :]


def test_the_committed_descriptor_is_that_of_the_proto_file(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "open_inference.proto", tmp_path)
    command = ["--proto_path=.", "--descriptor_set_out=new", "open_inference.proto"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *command], cwd=tmp_path, check=True)
    assert (tmp_path / "new").read_bytes() == (FOLDER / "open_inference.binpb").read_bytes()


def test_everything_that_a_request_says_is_passed_on() -> None:
    request = typed("FP32", "fp32_contents", 1.5, 2.5)
    request.model_version = "best/one"
    request.id = "é"
    request.parameters["timeout"].int64_param = 5_000_000
    request.parameters["priority"].uint64_param = 2**64 - 1
    request.parameters["empty"].SetInParent()
    request.inputs[0].parameters["binary_data_size"].int64_param = 7
    request.outputs.add(name="y").parameters["classification"].int64_param = 3
    fields, data = translated(request)
    assert fields == {
        "id": "é",
        "parameters": {"timeout": 5_000_000, "priority": 2**64 - 1, "binary_data_output": True},
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}],
        "outputs": [{"name": "y", "parameters": {"classification": 3, "binary_data": True}}],
    }
    assert data == np.array([1.5, 2.5], np.float32).tobytes()
    assert to_rest(request, []).path == "/v2/models/m/versions/best%2Fone/infer"


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (typed("INT8", "int_contents", 1, 128), "128, which is out of the range of INT8"),
        (typed("UINT16", "uint_contents", 65_536), "65536, which is out of the range of UINT16"),
        (typed("FP16", "fp32_contents", 1.0), 'FP16", for which there are no typed contents'),
        (typed("INT64", "int_contents", 1), '"int_contents"; send them in "int64_contents"'),
        (typed("FP32", "fp32_contents", 1.0, shape=(2,)), r"1 elements .*\[2\] takes 2"),
        (typed("FP32", "fp32_contents", shape=(1,) * 40), "40 dimensions"),
        (REQUEST(), "names no model"),
    ],
)
def test_contents_that_do_not_fit_their_tensor_are_refused(request_: Any, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        to_rest(request_, [])


def test_raw_contents_belong_to_the_inputs_one_by_one() -> None:
    request = typed("FP32", "fp32_contents", 1.0)
    with pytest.raises(MalformedBody, match='2 members, and "inputs" has 1'):
        to_rest(request, [memoryview(b""), memoryview(b"")])
    with pytest.raises(InvalidInput, match="send one of them"):
        to_rest(request, [memoryview(b"1234")])


@pytest.mark.parametrize("raw", [False, True])
def test_outputs_are_raw_or_typed_as_the_client_wants(raw: bool) -> None:
    texts = b"\x02\0\0\0ab\0\0\0\0"
    numbers = np.array([[1, -2]], np.int8).tobytes()
    header = orjson.dumps(
        {
            "model_name": "m",
            "model_version": "3",
            "outputs": [
                {"name": "t", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": 10}},
                {"name": "n", "datatype": "INT8", "shape": [1, 2], "parameters": {"binary_data_size": 2}},
            ],
        }
    )
    data = to_message(header + texts + numbers, len(header), raw=raw)
    response = message("ModelInferResponse").FromString(data)
    assert (response.model_version, list(response.outputs[1].shape)) == ("3", [1, 2])
    if raw:
        assert list(response.raw_output_contents) == [texts, numbers]
        assert not response.outputs[0].HasField("contents")
    else:
        assert list(response.outputs[0].contents.bytes_contents) == [b"ab", b""]
        assert list(response.outputs[1].contents.int_contents) == [1, -2]
        assert not response.raw_output_contents


def test_an_output_without_a_typed_form_makes_all_of_them_raw() -> None:
    entry = {"name": "y", "datatype": "BF16", "shape": [1], "parameters": {"binary_data_size": 2}}
    header = orjson.dumps({"model_name": "m", "model_version": "1", "outputs": [entry]})
    response = message("ModelInferResponse").FromString(to_message(header + b"ab", len(header), raw=False))
    assert list(response.raw_output_contents) == [b"ab"]


@given(st.lists(st.binary(max_size=9), max_size=5), st.text(max_size=5), st.integers(0, 200))
def test_raw_contents_are_split_off_as_protobuf_reads_them(raw: list[bytes], name: str, size: int) -> None:
    request = REQUEST(model_name=name, raw_input_contents=[*raw, bytes(size)], id="x" * size)
    rest, found = split_raw(request.SerializeToString())
    assert [bytes(part) for part in found] == list(request.raw_input_contents)
    request.ClearField("raw_input_contents")
    assert REQUEST.FromString(rest) == request


@given(st.binary(max_size=40))
def test_what_is_no_message_is_refused_or_read_as_protobuf_reads_it(data: bytes) -> None:
    try:
        rest, raw = split_raw(data)
    except MalformedBody:
        return  # that may be stricter than protobuf, which reads groups
    try:
        whole = REQUEST.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            REQUEST.FromString(rest)
        return
    assert [bytes(part) for part in raw] == list(whole.raw_input_contents)


def test_a_message_of_very_many_members_is_not_parsed() -> None:
    with pytest.raises(MalformedBody, match=f"more than {MOST_FIELDS} members"):
        split_raw(b"\x2a\0" * (MOST_FIELDS + 1))
