"""The bound on the bytes of all requests in flight."""

from __future__ import annotations

import gzip
import random
from concurrent.futures import ThreadPoolExecutor, as_completed

import pytest
from inferpool.errors import BodyTooLarge, Overloaded
from inferpool.http.native.api import NATIVE_API
from inferpool.http.predict.budget import SMALL_BYTES, BodyAllowance, ByteBudget
from inferpool.http.predict.compression import decompress
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


def test_small_requests_find_room_when_large_ones_have_taken_all() -> None:
    budget = ByteBudget(16 * 2**20)
    large, larger = context(), context()
    budget.reserve(large, 2**20)
    budget.reserve(larger, budget.shared - 2**20)
    assert budget.limit - budget.shared == 2**20
    for refused in (large, larger, context()):
        with pytest.raises(Overloaded, match=f"of {budget.shared} bytes"):
            budget.reserve(refused, SMALL_BYTES + 1)
    with pytest.raises(Overloaded):
        budget.check(SMALL_BYTES + 1)
    with pytest.raises(Overloaded):
        budget.take_decoded(context(), SMALL_BYTES + 1, "a body")
    growing = context()
    for number in range(16):
        budget.check(SMALL_BYTES)
        budget.reserve(context() if number else growing, SMALL_BYTES)
    assert budget.held == budget.limit
    budget.release(growing)
    budget.take_decoded(growing, SMALL_BYTES, "a small body")
    with pytest.raises(Overloaded, match=f"of {budget.limit} bytes"):
        budget.reserve(context(), 1)


def test_a_small_request_that_grows_is_a_large_one() -> None:
    budget, full, growing = ByteBudget(16 * 2**20), context(), context()
    budget.reserve(full, budget.shared)
    budget.reserve(growing, SMALL_BYTES)
    with pytest.raises(Overloaded):
        budget.reserve(growing, 1)


def test_responses_that_are_not_read_count_and_all_is_given_back_at_once() -> None:
    budget, first = ByteBudget(100), context()
    budget.reserve(first, 60)
    budget.hold(first, 500, "a")
    with pytest.raises(Overloaded):
        budget.reserve(context(), 1)
    budget.release(first)
    budget.release(first)
    assert (budget.used, first.reserved_bytes) == (0, 0)


def test_what_a_body_becomes_counts_until_the_response() -> None:
    budget, first, second = ByteBudget(100), context(), context()
    budget.reserve(first, 10)
    budget.take_decoded(first, 60, "a picture")
    assert (budget.held, first.decoded_bytes) == (70, 60)
    with pytest.raises(Overloaded):
        budget.reserve(second, 31)
    budget.settle_decoded(first, 20)
    assert budget.held == 30
    budget.reserve(second, 70)
    budget.settle_decoded(second, 50)
    assert budget.held == 100, "tensors for which nothing was taken are views of the body"
    for each in (first, second, first):
        budget.release(each)
    assert (budget.held, budget.decoded, first.decoded_bytes) == (0, 0, 0)


def test_what_can_never_be_held_is_refused_for_its_size() -> None:
    budget, alone = ByteBudget(100), context()
    budget.reserve(alone, 50)
    with pytest.raises(BodyTooLarge, match="a picture takes 101 bytes of memory with the body"):
        budget.take_decoded(alone, 51, "a picture")
    budget.take_decoded(alone, 50, "a picture")
    budget.settle_decoded(alone, 50)
    with pytest.raises(Overloaded, match="other requests hold 100 of 100 bytes"):
        budget.take_decoded(context(), 1, "a picture")


def test_a_thread_waits_for_the_memory_that_another_one_decodes_with() -> None:
    budget, first, second = ByteBudget(100), context(), context()
    budget.take_decoded(first, 80, "a picture")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(budget.take_decoded, second, 80, "a picture")
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        budget.settle_decoded(first, 20)
        waiting.result(20)
    assert (budget.held, second.decoded_bytes) == (100, 80)


def test_threads_that_wait_for_one_another_do_not_wait_for_ever() -> None:
    budget, first, second = ByteBudget(100), context(), context()
    budget.take_decoded(first, 50, "a body")
    budget.take_decoded(second, 40, "a body")
    with ThreadPoolExecutor(2) as threads:
        jobs = {threads.submit(budget.take_decoded, each, 30, "a picture"): each for each in (first, second)}
        refused = next(as_completed(jobs, 20))
        assert isinstance(refused.exception(), Overloaded)
        budget.settle_decoded(jobs.pop(refused), 0)  # what the event loop does with every body
        (served,) = jobs
        served.result(20)
    assert budget.held == jobs[served].decoded_bytes


def test_memory_of_other_requests_that_does_not_come_back_soon_is_not_waited_for() -> None:
    budget, first = ByteBudget(100), context()
    budget.take_decoded(first, 80, "a picture")
    budget.settle_decoded(first, 80)  # decoded, and waits in a queue
    with pytest.raises(Overloaded, match="no room for 21 bytes: other requests hold 80 of 100 bytes"):
        budget.take_decoded(context(), 21, "a picture")


def test_a_compressed_body_takes_what_it_becomes_and_not_what_it_might_become() -> None:
    """Its size after decompression is bounded by a hundred times its size, more than a small server has."""
    numbers = random.Random(0)
    for plain in (b"[1]", b",".join(b"%.6f" % numbers.random() for _ in range(100_000))):
        budget, sender = ByteBudget(2**20 + len(plain)), context()
        assert decompress(gzip.compress(plain), "gzip", BodyAllowance(budget, sender, 2**26, None)) == plain
        assert budget.decoded == sender.decoded_bytes == len(plain)
    budget, sender = ByteBudget(2**20), context()
    with pytest.raises(BodyTooLarge, match="decompressing the body takes"):
        decompress(gzip.compress(bytes(2**20)), "gzip", BodyAllowance(budget, sender, 2**26, None))
    budget.settle_decoded(sender, 0)
    assert budget.held == 0
