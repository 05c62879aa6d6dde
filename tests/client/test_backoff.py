from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inferpool.client.backoff import FIRST_S, LONGEST_S, MOST_WAIT_S, Backoff, read_retry_after


@given(st.integers(0, 40), st.one_of(st.none(), st.floats(0, MOST_WAIT_S)), st.floats(0, 1))
def test_a_client_never_comes_back_before_the_server_says(
    attempt: int, retry_after_s: float | None, fraction: float
) -> None:
    wait_s = Backoff(41, lambda: fraction).wait_s(attempt, retry_after_s)
    assert wait_s is not None
    said = retry_after_s or 0.0
    assert said <= wait_s <= said + min(LONGEST_S, FIRST_S * 2**attempt)


def test_clients_that_were_refused_together_come_back_apart() -> None:
    waits = {Backoff(3).wait_s(2, 1.0) for _ in range(20)}
    assert len(waits) == 20


def test_there_is_an_end_to_repetitions() -> None:
    assert Backoff(2).wait_s(2, None) is None
    assert Backoff(2).wait_s(1, None) is not None
    assert Backoff(0).wait_s(0, 1.0) is None
    assert Backoff(2).wait_s(0, MOST_WAIT_S + 1) is None
    with pytest.raises(ValueError, match="retries is -1"):
        Backoff(-1)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("3", 3.0),
        (" 0 ", 0.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 90.0),
        ("Thu, 01 Jan 1970 00:00:01 GMT", 0.0),
        ("-3", None),
        ("soon", None),
        ("9" * 40, None),
        ("", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str | None, seconds: float | None) -> None:
    assert read_retry_after(header, lambda: 10.0) == seconds
