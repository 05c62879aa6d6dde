"""A mutated body becomes tensors or a RequestError, the same by either way, and leaves no memory behind."""

from __future__ import annotations

import io
import os
import random
import tracemalloc
import warnings
from collections.abc import Callable

import numpy as np
import orjson
import pytest
from inferpool.allowance import Allowance
from inferpool.errors import RequestError
from inferpool.tensors import ANY, Signature, TensorSpec
from inferpool.wire.native_json import parse_request
from inferpool.wire.npy import decode_npy, decode_npz, encode_npy, encode_npz
from inferpool.wire.v2_request import parse_infer

from tests.fuzz.mutations import mutated
from tests.wire.conftest import WAYS, outcome, reading_by

CASES = int(os.environ.get("WIRE_MUTATIONS", "10000"))
"""Mutations of each kind of body. Set the variable for a longer search."""
SIGNATURE = Signature(
    (
        TensorSpec("x", "FP32", (ANY, 3)),
        TensorSpec("n", "INT64", (ANY,), True),
        TensorSpec("t", "BYTES", (ANY,), True),
    ),
    (),
)
PREDICT = orjson.dumps(
    {
        "model": "m",
        "id": "é",
        "inputs": {"x": [[1, 2.5, -3e2], [0, 1, 2]], "n": [1, 2**60], "t": ["a", "b"]},
        "outputs": ["y"],
        "parameters": {"timeout_ms": 5, "priority": 1},
    }
)
INFER = orjson.dumps(
    {
        "id": "a",
        "parameters": {"timeout": 5, "binary_data_output": True},
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [2, 3], "data": [[1, 2.5, -3e2], [0, 1, 2]]},
            {"name": "t", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]},
        ],
        "outputs": [{"name": "y", "parameters": {"classification": 2}}],
    }
)
TEXT = b"\1\0\0\0a\2\0\0\0bc"
BINARY_HEADER = orjson.dumps(
    {
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [1, 3], "parameters": {"binary_data_size": 12}},
            {"name": "t", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(TEXT)}},
        ]
    }
)
BINARY = BINARY_HEADER + bytes(12) + TEXT


def deflated() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, x=np.zeros((2, 3), np.float32), t=np.array(["a", "bc"]))
    return file.getvalue()


def read_predict(body: bytes) -> None:
    parse_request(body).tensors(SIGNATURE)


def read_infer(body: bytes) -> None:
    parse_infer(body, None).tensors(SIGNATURE)


def read_binary(body: bytes) -> None:
    parse_infer(body, len(BINARY_HEADER)).tensors(SIGNATURE)


def read_npy(body: bytes) -> None:
    decode_npy(body, Allowance(1 << 20))


def read_npz(body: bytes) -> None:
    # zipfile itself warns of members that come twice or overlap.
    with warnings.catch_warnings(action="ignore"):
        decode_npz(body, Allowance(1 << 20))


@pytest.mark.parametrize(
    ("read", "body"),
    [
        (read_predict, PREDICT),
        (read_infer, INFER),
        (read_binary, BINARY),
        (read_npy, encode_npy(np.arange(6, dtype=">f8").reshape(2, 3))),
        (read_npy, encode_npy(np.array(["a", "bc"], dtype=object))),
        (read_npz, encode_npz({"x": np.zeros((2, 3)), "t": np.array(["a"], dtype=object)})),
        (read_npz, deflated()),
    ],
)
def test_a_mutated_body_is_read_or_refused(read: Callable[[bytes], None], body: bytes) -> None:
    chance = random.Random(4)
    read(body)
    refused = 0
    for way in WAYS:
        with reading_by(way):
            for _ in range(CASES // len(WAYS)):
                try:
                    read(mutated(body, chance))
                except RequestError:
                    refused += 1
    assert refused > CASES / 20


@pytest.mark.parametrize(("infer", "body"), [(False, PREDICT), (True, INFER)])
def test_both_ways_agree_on_a_mutated_body(infer: bool, body: bytes) -> None:
    chance = random.Random(5)
    for _ in range(CASES):
        case = mutated(body, chance)
        found = [outcome(case, SIGNATURE, way, infer) for way in WAYS]
        assert found.count(found[0]) == len(found), case


def test_refused_bodies_leave_no_memory_behind() -> None:
    chance = random.Random(6)
    cases = [mutated(PREDICT, chance) for _ in range(500)]

    def read_all() -> int:
        for case in cases:
            for way in WAYS:
                outcome(case, SIGNATURE, way)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        read_all()
        before = read_all()
        after = max(read_all() for _ in range(3))
    finally:
        tracemalloc.stop()
    assert after - before < 64 * 1024
