"""A histogram counts each amount in its bucket, whatever was counted before it."""

from __future__ import annotations

from bisect import bisect_left

from hypothesis import given
from hypothesis import strategies as st
from inferpool.observe.metrics import Distribution

BOUNDS = (0.001, 0.5, 2.0)


@given(st.lists(st.one_of(st.sampled_from((0.0, -1.0, *BOUNDS, 3.0, float("inf"))), st.floats(0, 4))))
def test_amounts_are_counted_in_the_first_bucket_that_is_not_below(amounts: list[float]) -> None:
    found = Distribution(BOUNDS)
    wanted = [0] * (len(BOUNDS) + 1)
    for amount in amounts:
        found.observe(amount)
        wanted[bisect_left(BOUNDS, amount)] += 1
    assert found.counts == wanted
