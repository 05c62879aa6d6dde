"""The bound on the bytes of all requests in flight."""

from __future__ import annotations

import pytest
from inferpool.errors import BodyTooLarge, Overloaded
from inferpool.http.native.api import NATIVE_API
from inferpool.http.predict.budget import ByteBudget
from inferpool.http.predict.context import PredictContext
from inferpool.http.predict.request_head import RequestHead


def context() -> PredictContext:
    return PredictContext(NATIVE_API, RequestHead("m", None, []), 0.0)


def test_a_request_alone_may_exceed_the_limit_but_not_what_memory_there_is() -> None:
    budget, alone = ByteBudget(100), context()
    budget.most = 2000
    budget.check(1000)
    budget.reserve(alone, 1000)
    budget.reserve(alone, 1000)
    assert (budget.used, alone.reserved_bytes) == (2000, 2000)
    with pytest.raises(BodyTooLarge, match="takes 2001 bytes of memory, and this server has 2000 for one"):
        budget.reserve(alone, 1)
    assert (budget.used, alone.reserved_bytes) == (2000, 2000), "a refusal reserves nothing"


def test_a_body_that_never_has_room_is_too_large_and_not_told_to_try_again() -> None:
    budget, first = ByteBudget(100), context()
    with pytest.raises(BodyTooLarge):
        budget.check(101)
    budget.reserve(first, 60)
    with pytest.raises(BodyTooLarge):
        budget.check(101)
    with pytest.raises(BodyTooLarge):
        budget.reserve(context(), 101)


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
    budget.hold(first, 500, "a")
    with pytest.raises(Overloaded):
        budget.reserve(context(), 1)
    budget.release(first)
    budget.release(first)
    assert (budget.used, first.reserved_bytes) == (0, 0)
