"""The head of an answer is the same whether C or Python puts it together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from inferpool.http.connection.response_head import ResponsePrefix, response_head
from inferpool.http.predict.response import server_timing

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


def test_the_date_of_a_new_second_is_not_that_of_the_last() -> None:
    prefix = ResponsePrefix()
    first = prefix.of(200, [(b"date", b"now")])
    assert prefix.of(200, [(b"date", b"then")]) == first.replace(b"now", b"then")


@given(
    st.lists(st.tuples(st.sampled_from((b"x", b"x\nx")), st.text("a\r\n\0: ").map(str.encode)), max_size=4)
)
def test_no_header_ends_its_line_or_the_head(headers: list[tuple[bytes, bytes]]) -> None:
    head = response_head(b"HTTP/1.1 200 OK\r\n", headers, False, 0)
    whole = [b"%b: %b" % header for header in headers if not {*b"".join(header)} & {*b"\r\n\0"}]
    assert head.split(b"\r\n") == [b"HTTP/1.1 200 OK", *whole, b"content-length: 0", b"", b""]
    assert head.count(b"\n") == len(whole) + 3
