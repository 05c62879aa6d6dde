"""Large answers are written in pieces, and are those that one call would write."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import numpy as np
import orjson
import pytest
from inferpool.errors import InferpoolError, ModelFailed
from inferpool.tensors import Signature, TensorSpec
from inferpool.wire.json_pieces import PIECE_ELEMENTS, join_pieces, write_answer, write_array, write_value
from inferpool.wire.native_json import encode_response
from inferpool.wire.v2_request import RequestedOutput
from inferpool.wire.v2_response import encode_infer

RANDOM = np.random.default_rng(0)


def join(pieces: Any) -> list[bytes]:
    return join_pieces(pieces, lambda: True)


@pytest.mark.parametrize(
    "shape", [(), (0,), (5000,), (1, 9000), (3, 2, 5000), (2, 0, 3), (9000, 0), (1, 1, 1, 10_000), (4097, 1)]
)
@pytest.mark.parametrize("dtype", ["f4", "f8", "i8", "u1", "?"])
def test_arrays_of_any_shape(shape: tuple[int, ...], dtype: str) -> None:
    array = (RANDOM.standard_normal(shape) * 100).astype(dtype)
    for view in (array, array.T):
        plain = np.ascontiguousarray(view).reshape(view.shape)
        at_once = orjson.dumps(plain if plain.ndim else plain.item(), option=orjson.OPT_SERIALIZE_NUMPY)
        if plain.ndim or dtype != "f4":
            assert b"".join(write_array(view)) == at_once


def test_lists_and_strings() -> None:
    rows = [{"a": 0.5, "b": index} for index in range(1000)]
    assert b"".join(write_value(rows)) == orjson.dumps(rows)
    texts = np.array([f"é{index}" for index in range(2000)], np.object_).reshape(2, 1000)
    assert b"".join(write_array(texts)) == orjson.dumps(texts.tolist())
    with pytest.raises(ModelFailed):
        list(write_value([object()] * 1000))


@pytest.mark.parametrize("count", [0, 3, 10_000])
def test_a_native_answer_is_the_one_that_is_written_at_once(count: int) -> None:
    outputs: dict[str, Any] = {
        "y": RANDOM.standard_normal((count, 3)).astype(np.float32),
        "bits": RANDOM.integers(0, 2**14, count).astype(np.uint16),
        "n": np.arange(count),
    }
    if count:
        outputs["y"][0, 0] = np.nan
    predictions = [[{"label": "é", "score": None}]]
    for labels in (None, predictions):
        pieces = None if labels is None else [orjson.dumps(labels)]
        written = b"".join(join(write_answer("m", "1", "id", outputs, pieces, ("bits",))))
        assert written == encode_response("m", "1", "id", outputs, labels, ("bits",))
    assert b"".join(join(write_answer("m", "1", "id", {}, None))) == encode_response("m", "1", "id", {}, None)


@pytest.mark.parametrize("request_id", ["", "id"])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("classification", [0, 2])
def test_an_answer_of_v2_is_the_one_that_is_written_at_once(
    request_id: str, binary: bool, classification: int
) -> None:
    signature = Signature((), (TensorSpec("y", "FP32", (-1, 3)), TensorSpec("n", "INT64", (-1,))))
    outputs: dict[str, Any] = {
        "y": RANDOM.standard_normal((3000, 3)).astype(np.float32),
        "n": np.arange(3000),
    }
    outputs["y"][5, 1] = np.inf
    requested = [RequestedOutput("y", binary, classification), RequestedOutput("n", False)]
    encode = partial(
        encode_infer, "m", "1", request_id, outputs, requested, False, signature, {"y": ("a", "b")}
    )
    at_once, length = encode()
    in_pieces, length_in_pieces = encode(join)
    assert b"".join(in_pieces) == b"".join(at_once)
    assert length_in_pieces == length


def test_nobody_waits_for_an_answer_any_more() -> None:
    array = RANDOM.standard_normal(300_000)
    wanted = iter([True, False])
    with pytest.raises(InferpoolError, match="gone"):
        join_pieces(write_array(array), lambda: next(wanted))


def test_other_threads_run_while_a_large_answer_is_written() -> None:
    array = RANDOM.standard_normal(200 * PIECE_ELEMENTS)
    waits: list[float] = []
    done = threading.Event()

    def run_now_and_then() -> None:
        while not done.is_set():
            began = time.perf_counter()
            time.sleep(0.001)
            waits.append(time.perf_counter() - began)

    thread = threading.Thread(target=run_now_and_then)
    thread.start()
    began = time.perf_counter()
    join(write_array(array))
    taken_s = time.perf_counter() - began
    done.set()
    thread.join()
    # Written at once it would wait for all of it.
    assert sorted(waits)[len(waits) // 2] < taken_s / 10
