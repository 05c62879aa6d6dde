"""The head of an answer is the same whether C or Python puts it together."""

from __future__ import annotations

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
