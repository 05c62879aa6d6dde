"""The bound on the bytes of all requests in flight."""

from __future__ import annotations

import pytest
from inferpool.errors import Overloaded
from inferpool.http.native.api import NATIVE_API
from inferpool.http.predict.budget import ByteBudget
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.request_head import RequestHead


def context() -> PredictContext:
    return PredictContext(NATIVE_API, RequestHead("m", None, []), 0.0)


def test_a_request_alone_gets_its_bytes_whatever_the_limit() -> None:
    budget, alone = ByteBudget(100), context()
    budget.check(1000)
    budget.reserve(alone, 1000)
    budget.reserve(alone, 1000)
    assert (budget.used, alone.reserved_bytes) == (2000, 2000)


def test_a_request_beside_others_is_refused_beyond_the_limit() -> None:
    budget, first, second = ByteBudget(100), context(), context()
    budget.reserve(first, 60)
    budget.check(40)
    with pytest.raises(Overloaded, match="no room for 41 bytes: other requests hold 60 of 100 bytes"):
        budget.check(41)
    budget.reserve(second, 40)
    with pytest.raises(Overloaded):
        budget.reserve(second, 1)
    assert (budget.used, second.reserved_bytes) == (100, 40), "a refusal reserves nothing"


def test_responses_that_are_not_read_count_and_all_is_given_back_at_once() -> None:
    budget, first = ByteBudget(100), context()
    budget.reserve(first, 60)
    budget.hold(first, 500)
    with pytest.raises(Overloaded):
        budget.reserve(context(), 1)
    budget.release(first)
    budget.release(first)
    assert (budget.used, first.reserved_bytes) == (0, 0)
