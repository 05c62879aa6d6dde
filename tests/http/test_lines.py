"""The head of an answer is the same whether C or Python puts it together."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.http import lines
from service.http.lines import Preamble, answer_head, server_timing

BYTES = st.binary(max_size=40)
SECONDS = st.one_of(
    st.floats(-1, 5000), st.integers(0, 3600), st.sampled_from((0.0005, 0.0000005, 1e-9, 3600))
)


def in_python(function, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_lines", None)
        return function(*arguments)


@pytest.fixture(autouse=True)
def needs_c() -> None:
    assert lines._lines is not None or "CI" not in os.environ, "CI has a compiler"
    if lines._lines is None:
        pytest.skip("the project was installed without a C compiler")


@given(BYTES, st.lists(st.tuples(BYTES, BYTES), max_size=6), st.booleans(), st.integers(0, 2**63))
def test_heads_are_the_same(
    opening: bytes, headers: list[tuple[bytes, bytes]], closes: bool, size: int
) -> None:
    assert answer_head(opening, headers, closes, size) == in_python(
        answer_head, opening, headers, closes, size
    )


@given(SECONDS, SECONDS, SECONDS)
def test_timings_are_the_same(queue_s: float, compute_s: float, total_s: float) -> None:
    assert server_timing(queue_s, compute_s, total_s) == in_python(server_timing, queue_s, compute_s, total_s)


def test_a_head_reads_as_it_should() -> None:
    opening = Preamble().of(200, [(b"server", b"here")])
    assert answer_head(opening, [(b"a", b"b"), (b"c", b"")], True, 12) == (
        b"HTTP/1.1 200 OK\r\nserver: here\r\na: b\r\nc: \r\nconnection: close\r\ncontent-length: 12\r\n\r\n"
    )
    assert server_timing(0, 0.0015, 1.2345678) == b"queue;dur=0.000, compute;dur=1.500, total;dur=1234.568"


def test_the_date_of_a_new_second_is_not_that_of_the_last() -> None:
    preamble = Preamble()
    first = preamble.of(200, [(b"date", b"now")])
    assert preamble.of(200, [(b"date", b"then")]) == first.replace(b"now", b"then")


NONSENSE = [
    ("", [], False, 0),
    (b"", [(b"a",)], False, 0),
    (b"", [("a", b"")], False, 0),
    (b"", (), False, 0),
    (b"", [], False, -1),
    (b"", [], False),
]


@pytest.mark.parametrize("wrong", NONSENSE)
def test_nonsense_is_refused(wrong: tuple[object, ...]) -> None:
    with pytest.raises((TypeError, OverflowError)):
        lines._lines.head(*wrong)
