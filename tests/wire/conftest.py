"""Reads a body by each way, and gives the outcome in a form that compares."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from inferpool.errors import RequestError
from inferpool.tensors import ANY, DTYPES, Array, Signature, TensorSpec
from inferpool.wire import json_numbers, native_json
from inferpool.wire.v2_request import parse_infer

WAYS = ("orjson", *(["numbers"] if json_numbers.AVAILABLE else []))
"""The ways of reading JSON: orjson alone, and the module in C if it was built."""
INTEGERS = [name for name, dtype in DTYPES.items() if dtype.kind in "iu" and name != "BF16"]
FLOATS = ["FP16", "FP32", "FP64"]


@contextmanager
def reading_by(way: str) -> Iterator[None]:
    """Read all bodies by this way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_numbers, "AVAILABLE", way == "numbers")
        yield


def takes(datatype: str, *shape: int, name: str = "x") -> Signature:
    """Return the signature of a model with one input."""
    return Signature((TensorSpec(name, datatype, shape),), ())


def any_shape(datatype: str, rank: int) -> Signature:
    return takes(datatype, *[ANY] * rank)


def predict(body: bytes, signature: Signature, way: str) -> dict[str, Array]:
    with reading_by(way):
        return native_json.parse_request(body).tensors(signature)


def outcome(body: bytes, signature: Signature, way: str, infer: bool = False) -> tuple[object, ...]:
    """Return the bits of the tensors, or the members of the error."""
    try:
        with reading_by(way):
            request = parse_infer(body, None) if infer else native_json.parse_request(body)
            tensors = request.tensors(signature)
    except RequestError as error:
        return type(error), error.detail, error.members
    return tuple((name, bits(tensor)) for name, tensor in tensors.items())


def bits(tensor: Array) -> tuple[object, ...]:
    content = tensor.tolist() if tensor.dtype == np.object_ else tensor.tobytes()
    return str(tensor.dtype), tensor.shape, content


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test once for each way of reading JSON."""
    with reading_by(request.param):
        yield request.param
