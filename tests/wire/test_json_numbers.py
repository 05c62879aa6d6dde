"""The module in C: decimals to the last bit, what it leaves to the parser, and that others run meanwhile."""

import os
import sys
import threading
import time
from itertools import product

import numpy as np
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from inferpool.tensors import TensorSpec
from inferpool.wire import json_numbers
from inferpool.wire.json_numbers import FallBack

from tests.wire.conftest import any_shape, outcome


def test_ci_has_the_module():
    if not json_numbers.AVAILABLE and "CI" not in os.environ:
        pytest.skip("the module in C is not there: the project was installed where there is no C compiler")
    assert json_numbers.AVAILABLE


pytestmark = pytest.mark.skipif(
    not json_numbers.AVAILABLE and "CI" not in os.environ,
    reason="the module in C is not there (no C compiler)",
)

DECIMALS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.floats(width=32, allow_nan=False, allow_infinity=False).map(repr),
    st.integers(-(2**63) + 1, 2**63 - 1).map(str),
    # Just half-way between two floats, where rounding is to the even one, and one digit beside it.
    st.builds(
        lambda high, power, beside: f"{(2 * high + 1) * 2**power + beside}.0",
        st.integers(2**52, 2**53 - 1),
        st.integers(0, 9),
        st.sampled_from((-1, 0, 1)),
    ),
    st.builds(
        lambda digits, point, exponent: f"{digits // 10**point}.{digits % 10**point:0{point}}e{exponent}",
        st.integers(0, 10**19 - 1),
        st.integers(1, 18),
        st.integers(-140, 140),
    ),
)


def read(text: str) -> list[float] | None:
    """The numbers of a list as binary64; None where the body is declined."""
    fields = json_numbers.extract_numbers(f'{{"inputs":[{text}]}}'.encode())
    if fields is None:
        return None
    try:
        found = json_numbers.read_extracted(TensorSpec("x", "FP64", (-1,)), fields["inputs"])
    except FallBack:
        return None
    return list(found)


class TestDecimals:
    @given(st.lists(DECIMALS, min_size=1, max_size=5))
    @example(["9007199254740993.0", "-0.0", "0e0", "1E+22", "5e-324", "1.7976931348623157e308"])
    @example(["0.1", "12345678.12345678", "0.00000000000000000000123456789"])
    def test_each_is_the_float_that_python_makes_of_it(self, texts):
        found = read(",".join(texts))
        wanted = np.array([float(text) for text in texts])
        assert found is None or np.array(found).tobytes() == wanted.tobytes()

    @given(st.lists(st.floats(-1e30, 1e30, allow_subnormal=False), min_size=1))
    @example([0.1, 1 / 3, 2.0**-60, 1e22, 123456789.123456789])
    def test_usual_ones_are_not_declined(self, values):
        values = [value if abs(value) > 1e-30 else 0.0 for value in values]
        assert read(",".join(map(repr, values))) == values

    @pytest.mark.parametrize(
        "text", ["01", "1.", ".5", "-", "+1", "1e", "1e+", "0x1", "1_0", "1 2", "1,", ",1", "1]", "NaN", "١"]
    )
    def test_what_json_does_not_write_is_declined(self, text):
        assert read(text) is None

    @pytest.mark.parametrize("text", ["0.12345678901234567891", "123456789012345678901", "1e-200", "1e300"])
    def test_what_takes_more_than_one_product_is_declined(self, text):
        assert read(text) is None


class TestBody:
    @pytest.mark.parametrize(
        "body",
        [
            b'{[1]:2,"inputs":[1]}',
            b'{"inputs":[1][2]}',
            b'{"inputs":[1]',
            b'{"inputs":[1]}}',
            b'{"inputs":[[1],[2,3]]}',
            b'{"inputs":[[1],2]}',
            b'{"inputs":[1,[2]]}',
            b'{"inputs":[[1,2],[3]}',
            b'{"inputs":' + b"[" * 33 + b"1" + b"]" * 33 + b"}",
            b"[[1,2]]",
            b"\xef\xbb\xbf" + b'{"inputs":[1]}',
            b'{"inputs":"\xff","x":[1]}',
            b"",
            b"[",
            b'"\\',
            b'{"a":"' + b"\\" * 9,
        ],
    )
    def test_what_is_no_regular_body_is_declined(self, body):
        assert json_numbers.extract_numbers(body) is None

    def test_lists_beside_the_inputs_are_plain(self):
        body = b'{"outputs":[1,[2]],"parameters":{"a":[[3,4]],"b":["x",[5]]},"inputs":{"x":[6.5],"y":[[]]}}'
        assert json_numbers.extract_numbers(body) is None  # 1 and [2] do not go together
        body = body.replace(b"[1,[2]]", b"[[1],[2]]")
        fields = json_numbers.extract_numbers(body)
        assert fields is not None
        left = fields.pop("inputs")
        assert fields == {"outputs": [[1], [2]], "parameters": {"a": [[3, 4]], "b": ["x", [5]]}}
        assert isinstance(left["x"], json_numbers.Numbers)
        assert left["y"] == [[]]

    def test_more_lists_than_a_model_has_tensors_are_declined(self):
        lists = ",".join(["[1]"] * 256)
        assert json_numbers.extract_numbers(f'{{"inputs":["a",{lists}]}}'.encode()) is not None
        assert json_numbers.extract_numbers(f'{{"inputs":["a",{lists},[1]]}}'.encode()) is None

    def test_what_is_mostly_no_numbers_is_read_the_plain_way(self):
        """To put the lists back into a megabyte of other things would take longer, and in one go."""
        for text, taken in (("x" * 1000, True), ("x" * 2**20, False)):
            body = orjson.dumps({"inputs": {"x": [[1.5, 2]]}, "id": text})
            assert (json_numbers.extract_numbers(body) is not None) is taken
            assert outcome(body, any_shape("FP32", 2), "numbers") == outcome(
                body, any_shape("FP32", 2), "orjson"
            )

    def test_a_string_that_looks_like_a_mark_is_a_string(self):
        fields = json_numbers.extract_numbers(b'{"model":["0123456789abcdef0"],"inputs":[1]}')
        assert fields is not None
        assert fields["model"] == ["0123456789abcdef0"]

    @given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.sampled_from(("", " ", "\n\t")))
    def test_shapes_are_those_of_the_lists(self, shape, space):
        values = np.arange(np.prod(shape)).reshape(shape).tolist()
        body = orjson.dumps({"inputs": values}).replace(b",", f"{space},{space}".encode())
        body = body.replace(b"[", f"[{space}".encode()).replace(b"]", f"{space}]".encode())
        fields = json_numbers.extract_numbers(body)
        assert fields is not None
        found = json_numbers.read_extracted(TensorSpec("x", "INT16", (-1,) * len(shape)), fields["inputs"])
        assert found.tolist() == values

    @pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64", "INT8", "UINT8", "INT64", "UINT64"])
    def test_every_datatype_has_the_limits_of_the_plain_way(self, datatype):
        edges = (
            "0",
            "-1",
            "127",
            "128",
            "255",
            "256",
            "65504",
            "65520",
            "3.4028235e38",
            "3.4028236e38",
            "2.0",
        )
        edges += ("9223372036854775807", "9223372036854775808", "-9223372036854775808", "1e30", "2.5")
        for first, second in product(edges, repeat=2):
            body = f'{{"inputs":[{first},{second}]}}'.encode()
            signature = any_shape(datatype, 1)
            assert outcome(body, signature, "numbers") == outcome(body, signature, "orjson")


def test_other_threads_run_while_a_large_body_is_read():
    body = b'{"inputs":[' + b"0.123456789," * 4_000_000 + b"1]}"
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for _ in range(3):  # the machine may take the core away from this thread for a while
            longest, took = _longest_pause(body)
            if longest < took / 2:
                return
        pytest.fail(f"this thread stood still for {longest:.3f} s of the {took:.3f} s that reading took")
    finally:
        sys.setswitchinterval(before)


def _longest_pause(body: bytes) -> tuple[float, float]:
    """How long this thread stood still at most while another read `body`, and how long that took."""
    took = 0.0

    def work() -> None:
        nonlocal took
        began = time.perf_counter()
        assert json_numbers.extract_numbers(body) is not None
        took = time.perf_counter() - began

    thread = threading.Thread(target=work)
    longest, last = 0.0, time.perf_counter()
    thread.start()
    while thread.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest, took
