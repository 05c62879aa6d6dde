"""The head of an answer is the same whether C or Python puts it together."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.http.connection import response_head as heads
from inferpool.http.connection.response_head import ResponsePrefix, response_head, whole_response
from inferpool.http.predict.response import server_timing
from inferpool.http.predict.response_cache import HIT, MISS, NOT_CACHED

BYTES = st.binary(max_size=40)
SECONDS = st.one_of(
    st.floats(-1, 5000), st.integers(0, 3600), st.sampled_from((0.0005, 0.0000005, 1e-9, 3600))
)


def test_a_head_reads_as_it_should() -> None:
    opening = ResponsePrefix().of(200, [(b"server", b"here")])
    assert response_head(opening, [(b"a", b"b"), (b"c", b"")], True, 12) == (
        b"HTTP/1.1 200 OK\r\nserver: here\r\na: b\r\nc: \r\nconnection: close\r\ncontent-length: 12\r\n\r\n"
    )
    assert server_timing(0, 0.0015, 1.2345678) == b"queue;dur=0.000, compute;dur=1.500, total;dur=1234.568"


@given(SECONDS, SECONDS, SECONDS)
def test_times_are_milliseconds_with_three_decimals(queue_s: float, compute_s: float, total_s: float) -> None:
    found = [part.split(b";dur=") for part in server_timing(queue_s, compute_s, total_s).split(b", ")]
    assert [name for name, _ in found] == [b"queue", b"compute", b"total"]
    for (_, text), seconds in zip(found, (queue_s, compute_s, total_s), strict=True):
        assert len(text.partition(b".")[2]) == 3
        assert abs(float(text) - 1000 * min(max(seconds, 0), 3600)) < 0.000501


def test_the_date_of_a_new_second_is_not_that_of_the_last() -> None:
    prefix = ResponsePrefix()
    first = prefix.of(200, [(b"date", b"now")])
    assert prefix.of(200, [(b"date", b"then")]) == first.replace(b"now", b"then")


def test_each_answer_says_what_the_cache_did_for_it() -> None:
    prefix = ResponsePrefix()
    for date in (b"now", b"then"):
        headers = [(b"date", date)]
        lines = b"HTTP/1.1 200 OK\r\ndate: %b\r\n" % date
        for _ in range(2):
            assert prefix.of(200, headers, NOT_CACHED) == lines
            assert prefix.of(200, headers, HIT) == lines + b"cache-status: inferpool; hit\r\n"
            assert prefix.of(200, headers, MISS) == lines + b"cache-status: inferpool; fwd=miss\r\n"


@given(
    st.lists(st.tuples(st.sampled_from((b"x", b"x\nx")), st.text("a\r\n\0: ").map(str.encode)), max_size=4)
)
def test_no_header_ends_its_line_or_the_head(headers: list[tuple[bytes, bytes]]) -> None:
    head = response_head(b"HTTP/1.1 200 OK\r\n", headers, False, 0)
    whole = [b"%b: %b" % header for header in headers if not {*b"".join(header)} & {*b"\r\n\0"}]
    assert head.split(b"\r\n") == [b"HTTP/1.1 200 OK", *whole, b"content-length: 0", b"", b""]
    assert head.count(b"\n") == len(whole) + 3


HEADERS = st.lists(
    st.tuples(st.sampled_from((b"x", b"x\nx")), st.text("a\r\n\0: ").map(str.encode)), max_size=20
)


@given(HEADERS, st.booleans(), st.integers(0, 2**40), st.lists(BYTES, max_size=20))
def test_c_and_python_make_the_same_response(
    headers: list[tuple[bytes, bytes]], closes: bool, size: int, parts: list[bytes]
) -> None:
    made = whole_response(b"HTTP/1.1 200 OK\r\n", headers, closes, size, parts)
    views = [memoryview(part) for part in parts]
    assert whole_response(b"HTTP/1.1 200 OK\r\n", headers, closes, size, views) == made
    with mock.patch.object(heads, "_socketio", None):
        assert whole_response(b"HTTP/1.1 200 OK\r\n", headers, closes, size, parts) == made


def test_c_takes_nothing_but_bytes() -> None:
    module: Any = pytest.importorskip("inferpool.http.connection._socketio")
    assert module.join(b"", [("name", "value")], b"", 0, []) is None
    assert module.join(b"", [], b"", 0, [memoryview(b"")]) is None
    calls: list[tuple[Any, ...]] = [
        (b"", [], b"", 0), ("", [], b"", 0, []), (b"", (), b"", 0, []), (b"", [], b"", "", [])
    ]  # fmt: skip
    for wrong in calls:
        with pytest.raises(TypeError):
            module.join(*wrong)
