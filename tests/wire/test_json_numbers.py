"""The module in C reads decimals exactly, leaves other bodies to orjson, and lets other threads run."""

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


@pytest.mark.parametrize(
    "text", [b"", b"nul", b"n", b"[nul]", b"n\0ull", b"[1,nulnull]", b"null", b"nnull", b"a null "]
)
def test_null_is_found_wherever_it_is(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert json_numbers.has_null(text) == (b"null" in text)
    monkeypatch.setattr(json_numbers, "AVAILABLE", False)
    assert json_numbers.has_null(text) == (b"null" in text)


def test_ci_has_the_module() -> None:
    if not json_numbers.AVAILABLE and "CI" not in os.environ:
        pytest.skip("the project was installed without a C compiler")
    assert json_numbers.AVAILABLE


pytestmark = pytest.mark.skipif(
    not json_numbers.AVAILABLE and "CI" not in os.environ,
    reason="the project was installed without a C compiler",
)

DECIMALS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.floats(width=32, allow_nan=False, allow_infinity=False).map(repr),
    st.integers(-(2**63) + 1, 2**63 - 1).map(str),
    # Just half-way between two floats, or one digit beside it; ties are rounded to even.
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
    """Return the numbers of a list as binary64; None if the module does not take the body."""
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
    def test_each_number_is_the_float_that_python_reads(self, texts: list[str]) -> None:
        found = read(",".join(texts))
        wanted = np.array([float(text) for text in texts])
        assert found is None or np.array(found).tobytes() == wanted.tobytes()

    @given(st.lists(st.floats(-1e30, 1e30, allow_subnormal=False), min_size=1))
    @example([0.1, 1 / 3, 2.0**-60, 1e22, 123456789.123456789])
    def test_usual_numbers_are_taken(self, values: list[float]) -> None:
        values = [value if abs(value) > 1e-30 else 0.0 for value in values]
        assert read(",".join(map(repr, values))) == values

    @pytest.mark.parametrize(
        "text", ["01", "1.", ".5", "-", "+1", "1e", "1e+", "0x1", "1_0", "1 2", "1,", ",1", "1]", "NaN", "١"]
    )
    def test_numbers_that_are_not_json_are_not_taken(self, text: str) -> None:
        assert read(text) is None

    @pytest.mark.parametrize("text", ["0.12345678901234567891", "123456789012345678901", "1e-200", "1e300"])
    def test_numbers_that_need_more_than_one_multiplication_are_not_taken(self, text: str) -> None:
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
    def test_irregular_bodies_are_not_taken(self, body: bytes) -> None:
        assert json_numbers.extract_numbers(body) is None

    def test_lists_outside_the_inputs_are_plain(self) -> None:
        body = b'{"outputs":[1,[2]],"parameters":{"a":[[3,4]],"b":["x",[5]]},"inputs":{"x":[6.5],"y":[[]]}}'
        assert json_numbers.extract_numbers(body) is None  # a list of 1 and [2] is irregular
        body = body.replace(b"[1,[2]]", b"[[1],[2]]")
        fields = json_numbers.extract_numbers(body)
        assert fields is not None
        left = fields.pop("inputs")
        assert fields == {"outputs": [[1], [2]], "parameters": {"a": [[3, 4]], "b": ["x", [5]]}}
        assert isinstance(left["x"], json_numbers.Numbers)
        assert left["y"] == [[]]

    def test_too_many_lists_are_not_taken(self) -> None:
        lists = ",".join(["[1]"] * 256)
        assert json_numbers.extract_numbers(f'{{"inputs":["a",{lists}]}}'.encode()) is not None
        assert json_numbers.extract_numbers(f'{{"inputs":["a",{lists},[1]]}}'.encode()) is None

    @pytest.mark.parametrize("lists", [1, 2, 3, 4, 5, 12, 13, 40])
    @pytest.mark.parametrize("count", [1, 7, 63, 127, 128, 511, 512, 513, 2000])
    def test_bodies_of_any_size_give_all_of_their_lists(self, lists: int, count: int) -> None:
        """Small bodies and few lists are kept on the stack while they are read."""
        values = {f"x{number}": [number + index / 8 for index in range(count)] for number in range(lists)}
        fields = json_numbers.extract_numbers(orjson.dumps({"inputs": values}))
        assert fields is not None
        spec = TensorSpec("x", "FP64", (-1,))
        found = {name: list(json_numbers.read_extracted(spec, own)) for name, own in fields["inputs"].items()}
        assert found == values

    def test_a_body_with_few_numbers_and_much_else_is_read_by_orjson(self) -> None:
        """Putting the lists back into a megabyte of other values would hold the GIL for longer."""
        for text, taken in (("x" * 1000, True), ("x" * 2**20, False)):
            body = orjson.dumps({"inputs": {"x": [[1.5, 2]]}, "id": text})
            assert (json_numbers.extract_numbers(body) is not None) is taken
            assert outcome(body, any_shape("FP32", 2), "numbers") == outcome(
                body, any_shape("FP32", 2), "orjson"
            )

    def test_a_string_that_resembles_a_mark_stays_a_string(self) -> None:
        fields = json_numbers.extract_numbers(b'{"model":["0123456789abcdef0"],"inputs":[1]}')
        assert fields is not None
        assert fields["model"] == ["0123456789abcdef0"]

    @given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.sampled_from(("", " ", "\n\t")))
    def test_the_nesting_is_the_shape_with_any_spaces(self, shape: list[int], space: str) -> None:
        values = np.arange(np.prod(shape)).reshape(shape).tolist()
        body = orjson.dumps({"inputs": values}).replace(b",", f"{space},{space}".encode())
        body = body.replace(b"[", f"[{space}".encode()).replace(b"]", f"{space}]".encode())
        fields = json_numbers.extract_numbers(body)
        assert fields is not None
        found = json_numbers.read_extracted(TensorSpec("x", "INT16", (-1,) * len(shape)), fields["inputs"])
        assert found.tolist() == values

    @pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64", "INT8", "UINT8", "INT64", "UINT64"])
    def test_every_datatype_has_the_same_limits_by_either_way(self, datatype: str) -> None:
        edges = [
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
        ]
        edges += ["9223372036854775807", "9223372036854775808", "-9223372036854775808", "1e30", "2.5"]
        for first, second in product(edges, repeat=2):
            body = f'{{"inputs":[{first},{second}]}}'.encode()
            signature = any_shape(datatype, 1)
            assert outcome(body, signature, "numbers") == outcome(body, signature, "orjson")

    @pytest.mark.parametrize("datatype", ["INT8", "INT64", "UINT64"])
    @pytest.mark.parametrize(
        "texts",
        [
            ["1.0", "-0.0", "127.0"], ["1", "2.0"], ["1.5", "1"], ["9007199254740991.0", "1"],
            ["9007199254740992.0", "1"], ["9007199254740993", "1.0"], ["-9007199254740993", "1.0"],
            ["1e3", "1"], ["1e-3", "1"], ["1e30", "1"],
        ],
    )  # fmt: skip
    def test_whole_numbers_with_a_fraction_are_integers_by_either_way(
        self, datatype: str, texts: list[str]
    ) -> None:
        body = f'{{"inputs":[{",".join(texts)}]}}'.encode()
        signature = any_shape(datatype, 1)
        assert outcome(body, signature, "numbers") == outcome(body, signature, "orjson")

    def test_whole_numbers_with_a_fraction_need_no_parser(self) -> None:
        fields = json_numbers.extract_numbers(b'{"inputs":[1.0,2.0,3]}')
        assert fields is not None
        found = json_numbers.read_extracted(TensorSpec("x", "INT64", (-1,)), fields["inputs"])
        assert found.tolist() == [1, 2, 3]
        assert found.dtype == np.int64


def test_other_threads_run_while_a_large_body_is_read() -> None:
    body = b'{"inputs":[' + b"0.123456789," * 4_000_000 + b"1]}"
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for _ in range(5):  # the machine may take the core from this thread for a while
            longest, took = _longest_pause(body)
            if longest < took / 2:
                return
        pytest.fail(f"this thread paused for {longest:.3f} s of the {took:.3f} s that reading took")
    finally:
        sys.setswitchinterval(before)


def _longest_pause(body: bytes) -> tuple[float, float]:
    """Return the longest pause of this thread while another reads `body`, and how long reading takes."""
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
