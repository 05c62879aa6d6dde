"""gRPC gives the bits that REST gives, to every client."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inferpool.grpc_api.messages import SERVICE, message
from inferpool.grpc_api.translation import _FIELDS
from inferpool.tensors import DTYPES

from tests.conftest import ROOT
from tests.grpc_api.calls import Caller, metadata_of, raw_request
from tests.onnx_models import ELEMENTS, write_identity
from tests.server import Server

MOST_BYTES = 9 * 2**20
CLIENTS = Path(__file__).parent / "clients"


@pytest.fixture(scope="module")
def server(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An identity model for each datatype, and a classifier."""
    folder = tmp_path_factory.mktemp("identities")
    for datatype in ELEMENTS:
        write_identity(folder, datatype, [datatype])
    (folder / "digits").symlink_to(ROOT / "models" / "digits")
    variables = {"INFERPOOL_CACHE_DIR": str(cache_dir), "INFERPOOL_MEASURE_MS": "0"}
    server = Server(folder, ["--grpc-port", "0", "--max-body-bytes", str(MOST_BYTES)], variables)
    server.wait_loaded()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def caller(server: Server) -> Iterator[Caller]:
    caller = Caller(server)
    yield caller
    caller.close()


def binary(texts: list[str]) -> bytes:
    return b"".join(len(text.encode()).to_bytes(4, "little") + text.encode() for text in texts)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, tuple[int, int], bytes]:
    """A datatype, a shape, and elements in binary form."""
    datatype = draw(st.sampled_from(sorted(ELEMENTS)))
    shape = draw(st.tuples(st.integers(0, 4), st.integers(0, 5)))
    count = shape[0] * shape[1]
    if datatype == "BYTES":
        return datatype, shape, binary(draw(st.lists(st.text(max_size=6), min_size=count, max_size=count)))
    size = count * DTYPES[datatype].itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    return datatype, shape, bytes(byte & 1 for byte in data) if datatype == "BOOL" else data


def rest(server: Server, datatype: str, shape: tuple[int, int], data: bytes) -> bytes:
    """The only output of a request over HTTP, in binary form."""
    entry = {
        "name": "x0",
        "datatype": datatype,
        "shape": shape,
        "parameters": {"binary_data_size": len(data)},
    }
    header = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    answer = server.post(
        f"/v2/models/{datatype}/infer",
        content=header + data,
        headers={"inference-header-content-length": str(len(header))},
    )
    assert answer.status_code == 200, answer.text
    return answer.content[int(answer.headers["inference-header-content-length"]) :]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors())
def test_raw_and_typed_contents_are_the_bits_of_rest(
    server: Server, caller: Caller, tensor: tuple[str, tuple[int, int], bytes]
) -> None:
    datatype, shape, data = tensor
    expected = rest(server, datatype, shape, data)
    answer = caller.infer(raw_request(datatype, "x0", datatype, shape, data))
    [output] = answer.outputs
    assert (output.name, output.datatype, tuple(output.shape)) == ("y0", datatype, shape)
    assert list(answer.raw_output_contents) == [expected] == [data]
    if datatype in _FIELDS:
        field, dtype = _FIELDS[datatype]
        request = message("ModelInferRequest")(model_name=datatype)
        given_tensor = request.inputs.add(name="x0", datatype=datatype, shape=shape)
        elements = np.frombuffer(data, dtype).tolist() if dtype else split(data)
        getattr(given_tensor.contents, field).extend(elements)
        typed = caller.infer(request)
        assert not typed.raw_output_contents
        found = getattr(typed.outputs[0].contents, field)
        if dtype:
            # Python's numbers know one NaN only.
            np.testing.assert_array_equal(np.array(found, dtype), np.array(elements, dtype))
        else:
            assert list(found) == elements


DAMAGED = ("INVALID_ARGUMENT", "NOT_FOUND", "OK")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_message_is_the_fault_of_its_client(caller: Caller, data: st.DataObject) -> None:
    """Whatever the bytes are, nothing but the call itself fails."""
    request = raw_request("INT64", "x0", "INT64", (1, 2), bytes(16))
    request.parameters["priority"].int64_param = 1
    whole = bytearray(request.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    sent = bytes(whole[: data.draw(st.integers(0, len(whole)))]) + data.draw(st.binary(max_size=4))
    call = caller.channel.unary_unary(f"/{SERVICE}/ModelInfer").future(sent, timeout=60)
    assert call.code().name in DAMAGED, call.details()


def split(data: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        found.append(data[at + 4 : end])
        at = end
    return found


def test_a_client_may_choose_the_form_of_the_outputs(caller: Caller) -> None:
    request = raw_request("INT8", "x0", "INT8", (1, 2), b"\x01\xff")
    request.parameters["binary_data_output"].bool_param = False
    answer = caller.infer(request)
    assert list(answer.outputs[0].contents.int_contents) == [1, -1]
    request.parameters["binary_data_output"].int64_param = 1
    assert "send true or false" in caller.refused(request).details()


def test_errors_have_the_status_and_the_code_of_the_catalogue(caller: Caller) -> None:
    request = raw_request("FP32", "x0", "FP32", (1, 2), b"1234")
    error = caller.refused(request)
    assert error.code().name == "INVALID_ARGUMENT"
    assert '"x0"' in error.details()
    assert metadata_of(error)["code"] == "malformed_body"
    error = caller.refused(raw_request("FP32", "x9", "FP32", (1, 1), b"1234"))
    assert (error.code().name, metadata_of(error)["code"]) == ("INVALID_ARGUMENT", "invalid_input")
    request.model_version = "9"
    error = caller.refused(request)
    assert (error.code().name, metadata_of(error)["code"]) == ("NOT_FOUND", "version_not_found")
    assert metadata_of(error)["x-request-id"]


def test_a_message_that_is_too_large_is_refused(caller: Caller) -> None:
    error = caller.refused(raw_request("INT8", "x0", "INT8", (1, MOST_BYTES), bytes(MOST_BYTES)))
    assert error.code().name == "RESOURCE_EXHAUSTED"
    with pytest.raises(grpc.RpcError) as raised:
        caller.call("ModelReady", name="x" * 100_000)
    assert raised.value.code().name == "RESOURCE_EXHAUSTED"


def test_a_large_message_comes_back_whole(caller: Caller) -> None:
    data = os.urandom(8 * 2**20)
    answer = caller.infer(raw_request("UINT8", "x0", "UINT8", (8, 2**20), data))
    assert answer.raw_output_contents[0] == data


@pytest.mark.parametrize("client", ["triton", "kserve"])
def test_published_clients_work_unmodified(server: Server, caller: Caller, client: str) -> None:
    if client == "kserve" and importlib.util.find_spec("kserve") is None:
        pytest.skip("kserve does not run on this Python")
    command = [sys.executable, str(CLIENTS / f"{client}_client.py"), f"localhost:{caller.port}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr


def test_the_health_service_tells_of_the_server_and_of_models(caller: Caller) -> None:
    from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
    from grpc_health.v1.health_pb2_grpc import HealthStub

    stub = HealthStub(caller.channel)
    for name in ("", "inference.GRPCInferenceService", "digits"):
        assert stub.Check(HealthCheckRequest(service=name)).status == HealthCheckResponse.SERVING
    check: Any = stub.Check.future(HealthCheckRequest(service="nobody"))
    assert check.exception().code().name == "NOT_FOUND"
    watch = stub.Watch(HealthCheckRequest(service="nobody"))
    assert next(watch).status == HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


def test_reflection_describes_the_protocol(caller: Caller) -> None:
    from google.protobuf.descriptor_pool import DescriptorPool
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    database = ProtoReflectionDescriptorDatabase(caller.channel)
    assert "grpc.health.v1.Health" in database.get_services()
    service = DescriptorPool(database).FindServiceByName("inference.GRPCInferenceService")
    assert "ModelInfer" in service.methods_by_name


def test_the_server_counts_calls_as_requests(server: Server, caller: Caller) -> None:
    before = server.metric("requests_total", model="INT8", code="200")
    caller.infer(raw_request("INT8", "x0", "INT8", (1, 1), b"1"))
    server.wait_for_metric("requests_total", at_least=before + 1, model="INT8", code="200")
